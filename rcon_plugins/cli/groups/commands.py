"""The click commands that take a GROUP, and ``rcon ls`` and ``rcon top``. Each imports its work when it is called."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from rcon_plugins.cli.completion import GroupArgument, Word, event_kinds, with_options
from rcon_plugins.cli.options import SET_OPTIONS

if TYPE_CHECKING:
    from rcon_plugins.groups.find import Group

_SORTS = ("cpu", "throttled", "memory", "share", "read", "write", "pids", "pressure", "hits", "name")

_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
_group = click.argument("group", type=GroupArgument())


@click.command(short_help="List all groups with their limits and usage.")
@_json
def ls(as_json: bool) -> int:
    """List every group on this machine: of servers, commands and programs, of all users, nested groups too.

    Columns: the group's name, its processes, the memory it uses now, the CPU time it has used since it was made, how
    often limits were reached, its limits, and the process that owns it. A line below names each server that refused
    requests or tasks which no route names.

    The other commands take the name as GROUP. It is the policy's name, or with a key tenant~a.example, or where two
    groups have the same name, with the instance before it: rcon-123-4567/tenant~a.example.

    \b
    Examples:
      rcon ls
      rcon ls --json | jq '.[] | select(.usage.oom_kills > 0) | .group'

    \b
    Exit status:
      0    success
      125  no cgroups are mounted
    """
    from rcon_plugins.cli.groups import ls

    return ls.ls(as_json)


@click.command(short_help="Show one group: limits, usage, pressure, processes.")
@_group
@_json
def stat(group: Group, as_json: bool) -> int:
    """Show GROUP: its limits, current and total usage, limit hits, pressure, and its processes.

    \b
    Examples:
      rcon stat tenant~a.example
      rcon stat --json sleep-1234 | jq .usage.memory_peak

    \b
    Exit status:
      0    success
      2    there is no such group
      125  the group could not be read
    """
    from rcon_plugins.cli.groups import stat

    return stat.stat(group, as_json)


@click.command(short_help="Show the usage of all groups, live.")
@click.option(
    "--sort", type=click.Choice(_SORTS), default="cpu", show_default=True, help="Show the highest first."
)
@click.option(
    "--interval",
    type=click.FloatRange(0.1, 3600),
    default=2.0,
    show_default=True,
    metavar="SECONDS",
    help="Time between two refreshes.",
)
@click.option("--iterations", type=click.IntRange(1), metavar="N", help="Stop after N refreshes.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object a line for each refresh.")
@click.option(
    "--celery",
    metavar="APP",
    help="Show the groups of all workers of a Celery application (as celery -A APP).",
)
def top(sort: str, interval: float, iterations: int | None, as_json: bool, celery: str | None) -> int:
    """Show the usage of all groups, refreshed every few seconds. Without a terminal, print plain tables.

    \b
    Columns:
      CPU        CPU use; 100% is one CPU
      THROTTLED  share of CPU periods in which it used up its quota and waited
      MEMORY     memory in use, and how much of the memory limit that is
      PROCS      processes and threads
      STALLED    longest wait for cpu, memory or io, in % of the last 10 s
      HITS       limits reached, in total
      READ/s     bytes read from disks in a second
      WRITE/s    bytes written to disks in a second
      KILLS      OOM kills, in total (part of HITS)

    The first line has the requests and tasks that no route names (unroutable), if there are any.

    Keys: q quits, ? shows help, a letter sorts, R reverses the order, the arrow keys scroll.

    \b
    Examples:
      rcon top --sort memory
      rcon top --iterations 1 --interval 5
      rcon top --json | jq -c '.groups[] | select(.new_hits > 0)'
      rcon top --celery proj

    \b
    Exit status:
      0    success
      2    bad usage
      125  no cgroups are mounted, or Celery is not installed
      130  interrupted without a terminal
    """
    from rcon_plugins.cli.top import samples
    from rcon_plugins.cli.top import top as command

    source = samples.local if celery is None else samples.celery_workers(celery)
    return command.top(source, sort=sort, interval=interval, iterations=iterations, to_json=as_json)


@click.command("set", short_help="Change the limits of a running group.")
@_group
@with_options(SET_OPTIONS)
@_json
def set_command(group: Group, as_json: bool, **options: Any) -> int:
    """Change limits of GROUP while it runs: all that are given, or none if one is refused. Other limits stay.

    The value max removes a limit (--cpu, --memory, --memory-high, --swap, --read, --write, --read-iops, --write-iops,
    --pids). The command prints the limits in force afterwards.

    A memory limit below current usage: cgroup v2 reclaims what it can and kills the rest; v1 refuses the limit. A
    server may write the limits of its policy again; rcon says so.

    \b
    Examples:
      rcon set sleep-1234 --cpu 50% --memory 1G
      rcon set tenant~a.example --pids max
      rcon set backup --write 5M --device /srv

    \b
    Exit status:
      0    all limits are in force
      2    bad usage, no such group, or a limit that cannot be enforced here;
           nothing was changed
      125  the kernel refused a limit; nothing was changed
    """
    from rcon_plugins.cli.groups import set as command

    return command.set_limits(group, options, as_json)


@click.command(short_help="Suspend all processes of a group.")
@_group
def freeze(group: Group) -> int:
    """Suspend all processes of GROUP, and return when all are. They keep their memory until `rcon thaw` resumes them.

    Clients of a frozen server wait, and timeouts go on counting.

    \b
    Examples:
      rcon freeze backup-1234

    \b
    Exit status:
      0    all processes are frozen
      2    no such group, or a group of a server's threads
      125  the kernel refused
    """
    from rcon_plugins.cli.groups import control

    return control.freeze(group)


@click.command(short_help="Resume a frozen group.")
@_group
def thaw(group: Group) -> int:
    """Resume the processes of GROUP that `rcon freeze` suspended.

    \b
    Examples:
      rcon thaw backup-1234

    \b
    Exit status:
      0    all processes run again
      2    no such group, or a group of a server's threads
      125  the kernel refused
    """
    from rcon_plugins.cli.groups import control

    return control.thaw(group)


@click.command(short_help="Kill all processes of a group.")
@_group
@click.option("--grace", metavar="TIME", help="Send SIGTERM first, and SIGKILL only after this: 5s.")
@_json
def kill(group: Group, grace: str | None, as_json: bool) -> int:
    """Kill every process of GROUP with SIGKILL, in nested groups and new sessions too, and print them.

    With --grace, each process gets SIGTERM first, and SIGCONT, so that stopped and frozen ones handle it.

    Returns when all have ended. The group itself goes with its owner. A server answers the requests it loses with an
    error. A group of a server's threads cannot be killed: stop the server instead.

    \b
    Examples:
      rcon kill sleep-1234
      rcon kill --grace 5s nightly
      rcon kill --json tenant~a.example | jq '.killed[].pid'

    \b
    Exit status:
      0    all processes have ended
      2    no such group, or a group of a server's threads
      125  some processes did not end
    """
    from rcon_plugins.cli.groups import control

    return control.kill(group, grace, as_json)


@click.command(short_help="Print the events of a group as they happen.")
@_group
@click.option(
    "--kind",
    "kinds",
    type=Word("kinds", event_kinds, several=True),
    multiple=True,
    metavar="KIND,...",
    help="Print only these kinds; by default all.",
)
@click.option(
    "--threshold", "thresholds", multiple=True, metavar="SIZE", help="Print when memory reaches SIZE: 900M."
)
@click.option(
    "--pressure",
    multiple=True,
    metavar="RESOURCE[:STALL/WINDOW]",
    help="Print when processes waited for cpu, memory or io: memory:200ms/2s.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object a line for each event.")
def watch(
    group: Group,
    kinds: tuple[str, ...],
    thresholds: tuple[str, ...],
    pressure: tuple[str, ...],
    as_json: bool,
) -> int:
    """Print a line for each event of GROUP as it happens, until the group is gone.

    Kinds: memory_high, memory_limit, oom_kill, memory_usage (of --threshold), pids_limit, cpu_throttled, pressure (of
    --pressure), empty. This machine may not report all of them; --kind refuses one that it does not.

    \b
    Examples:
      rcon watch tenant~a.example
      rcon watch nightly --kind oom_kill,memory_limit --json
      rcon watch nightly --threshold 900M --pressure memory:500ms/2s

    \b
    Exit status:
      0    the group is gone
      2    bad usage, no such group, or an event that is not reported here
      125  the group could not be watched
      130  interrupted
    """
    from rcon_plugins.cli.groups import watch

    return watch.watch_group(group, kinds, thresholds, pressure, as_json)
