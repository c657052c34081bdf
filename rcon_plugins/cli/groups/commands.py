"""``rcon ls``, ``stat`` and the others that take a GROUP: what is confined on this machine, and what to do to it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from rcon_plugins.cli.completion import Word, event_kinds
from rcon_plugins.cli.groups.argument import GROUP
from rcon_plugins.cli.limit_options import limit_options_at_once

if TYPE_CHECKING:
    from rcon_plugins.groups.find import Group

_SORTS = ("cpu", "throttled", "memory", "share", "read", "write", "pids", "pressure", "hits", "name")

_json = click.option("--json", "as_json", is_flag=True, help="As JSON.")
_group = click.argument("group", type=GROUP)


@click.command(short_help="List the groups: who made them, within which limits, what they use.")
@_json
def ls(as_json: bool) -> int:
    """List every group on this machine: of servers, of commands, of programs; everybody's, nested ones too.

    A group is named as short as can be: `tenant~a.example`, or, where two have that name, with the instance before it:
    `rcon-123-4567/tenant~a.example`. Such a name is the GROUP of the other commands.

    \b
      rcon ls
      rcon ls --json | jq '.[] | select(.usage.oom_kills > 0) | .group'
    """
    from rcon_plugins.cli.groups import ls

    return ls.ls(as_json)


@click.command(short_help="Show all about one group: limits, usage, pressure, processes.")
@_group
@_json
def stat(group: Group, as_json: bool) -> int:
    """Show all about GROUP: its limits, what it used and uses, limit hits, pressure, and its processes.

    \b
      rcon stat tenant~a.example
      rcon stat --json sleep-1234 | jq .usage.memory_peak
    """
    from rcon_plugins.cli.groups import ls

    return ls.stat(group, as_json)


@click.command(short_help="Show what every group uses, live.")
@click.option(
    "--sort", type=click.Choice(_SORTS), default="cpu", show_default=True, help="The most of this first."
)
@click.option(
    "--interval",
    type=click.FloatRange(0.1, 3600),
    default=2.0,
    show_default=True,
    metavar="SECONDS",
    help="Time between refreshes.",
)
@click.option("--iterations", type=click.IntRange(1), metavar="N", help="End after so many refreshes.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line for each refresh.")
@click.option(
    "--celery", metavar="APP", help="Those of all workers of this Celery application, as for celery -A APP."
)
def top(sort: str, interval: float, iterations: int | None, as_json: bool, celery: str | None) -> int:
    """Show what every group uses, and again every few seconds. Without a terminal, plain tables.

    CPU% of one CPU; THR% of the periods in which it waited for its CPU quota; MEM% of its memory limit; WAIT, in % of
    the last ten seconds, for which some of it waited for cpu/memory/io (cgroup v2); HITS of the memory limit/of the
    pids limit/OOM kills, since the group was made.

    Keys: q quits, a letter of the last line sorts, R turns the order round, arrows scroll.

    \b
      rcon top --sort memory
      rcon top --iterations 1 --interval 5
      rcon top --json | jq -c '.groups[] | select(.new_hits > 0)'
      rcon top --celery proj
    """
    from rcon_plugins.cli.top import live

    source: live.Source = live.local
    if celery is not None:
        from rcon_plugins.cli.top.celery import workers

        source = workers(celery)
    return live.show(source, sort=sort, interval=interval, iterations=iterations, to_json=as_json)


@click.command("set", short_help="Set limits of a group while it runs.")
@_group
@limit_options_at_once
@_json
def set_command(group: Group, as_json: bool, **options: Any) -> int:
    """Set limits of GROUP while it runs: all that are given, or, if one cannot be, none. The others stay as they are.

    `max` takes a limit away (of --cpu, --memory, --memory-high, --swap, --read, --write, --read-iops, --write-iops,
    --pids). Prints what is in force afterwards.

    A memory limit below what is in use: the kernel takes back what it can, and kills what does not fit (cgroup v2), or
    refuses the limit (v1). A server may write the limits of its policy again; rcon says so.

    \b
      rcon set sleep-1234 --cpu 50% --memory 1G
      rcon set tenant~a.example --pids max
      rcon set backup --write 5M --device /srv
    """
    from rcon_plugins.cli.groups import change

    return change.set_limits(group, options, as_json)


@click.command(short_help="Stop the processes of a group, until thaw.")
@_group
def freeze(group: Group) -> int:
    """Stop all processes of GROUP, and return when they are. They keep their memory, and go on after `rcon thaw`.

    Clients of a server wait meanwhile, and its timeouts go on counting.

    \b
      rcon freeze backup-1234
    """
    from rcon_plugins.cli.groups import change

    return change.freeze(group)


@click.command(short_help="Let the processes of a frozen group go on.")
@_group
def thaw(group: Group) -> int:
    """Let the processes of GROUP go on, where `rcon freeze` stopped them.

    \b
      rcon thaw backup-1234
    """
    from rcon_plugins.cli.groups import change

    return change.thaw(group)


@click.command(short_help="End all processes of a group, double forks and new sessions too.")
@_group
@_json
def kill(group: Group, as_json: bool) -> int:
    """End every process of GROUP with SIGKILL, also those below it and those that forked away, and say which.

    Returns when none is left. The group itself goes with its owner. A server answers the requests that it kills with an
    error. Groups of threads cannot be killed: they are the server.

    \b
      rcon kill sleep-1234
      rcon kill --json tenant~a.example | jq '.ended[].pid'
    """
    from rcon_plugins.cli.groups import change

    return change.kill(group, as_json)


@click.command(short_help="Print a line for each event of a group.")
@_group
@click.option(
    "--kind",
    "kinds",
    type=Word("kinds", event_kinds, several=True),
    multiple=True,
    metavar="KIND[,KIND]",
    help="These kinds only; without it, all.",
)
@click.option(
    "--threshold", "thresholds", multiple=True, metavar="SIZE", help="Tell when memory reaches this."
)
@click.option(
    "--pressure",
    multiple=True,
    metavar="RESOURCE[:STALL/WINDOW]",
    help="Tell when cpu, memory or io was waited for: memory:200ms/2s.",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line for each event.")
def watch(
    group: Group,
    kinds: tuple[str, ...],
    thresholds: tuple[str, ...],
    pressure: tuple[str, ...],
    as_json: bool,
) -> int:
    """Print a line for each event of GROUP as it happens, until the group is gone: limits reached, OOM kills ...

    Kinds: memory_high, memory_limit, oom_kill, memory_usage (of a --threshold), pids_limit, cpu_throttled, pressure (of
    a --pressure), empty. Which can be told depends on the machine; one asked for by name that cannot is refused.

    \b
      rcon watch tenant~a.example
      rcon watch nightly --kind oom_kill,memory_limit --json
      rcon watch nightly --threshold 900M --pressure memory:500ms/2s
    """
    from rcon_plugins.cli.groups import watch

    return watch.watch_group(group, kinds, thresholds, pressure, as_json)
