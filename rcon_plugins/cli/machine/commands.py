"""The click commands ``check``, ``which``, ``schema``, ``doctor`` and ``gc``. Each imports its work when called."""

from __future__ import annotations

import click

from rcon_plugins.cli.completion import with_options
from rcon_plugins.cli.options import CGROUP

#: check, which, doctor, gc: the answer is no.
NO = 1

_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
_file = click.argument("file", type=click.Path())


@click.command(short_help="Check a policy file against this machine.")
@_file
@click.option(
    "--server",
    type=click.Choice(["sync", "gthread", "gevent", "celery"]),
    default="gthread",
    show_default=True,
    help="The kind of server: a gunicorn worker class, or a Celery worker.",
)
@_json
def check(file: str, server: str, as_json: bool) -> int:
    """Check the policy file FILE, and show how this machine would enforce each policy, and why.

    A limit that this machine or this user cannot enforce is REFUSED, with the reason and the remedy. A note says where
    a policy guards against accidents only. If all is well and root runs the check, it makes the base cgroup if that is
    missing.

    \b
    Examples:
      rcon check /etc/rcon.toml
      sudo -u www-data rcon check --server sync /etc/rcon.toml

    \b
    Exit status:
      0    every policy can be enforced here
      1    the file is wrong, or a policy cannot be enforced here
      2    bad usage
      125  rcon itself failed
    """
    from rcon_plugins.cli.machine import check

    text, good = check.check(file, server, as_json)
    click.echo(text)
    return 0 if good else NO


@click.command(short_help="Show the policy that a request or task gets.")
@_file
@click.option("--host", help="Host of the request.")
@click.option("--path", help="Path of the request.")
@click.option("--method", help="Method of the request.")
@click.option("--task", help="Name of the task.")
@click.option("--queue", help="Queue of the task.")
@click.option("--command", "command", help="Name of the command.")
@click.option(
    "--attribute",
    multiple=True,
    metavar="NAME=VALUE",
    help="Any other attribute: remote_addr, header:NAME ...",
)
@_json
def which(file: str, as_json: bool, attribute: tuple[str, ...], **named: str | None) -> int:
    """Show which route of FILE a request, task or command takes, and its policy, key, cgroup and user.

    This does not say whether this machine can enforce the policy: `rcon check` does.

    \b
    Examples:
      rcon which /etc/rcon.toml --host shop.example --path /img/logo.png
      rcon which /etc/rcon.toml --task reports.monthly

    \b
    Exit status:
      0    it would run
      1    it would be refused
      2    bad usage
      125  the file is wrong, or rcon itself failed
    """
    from rcon_plugins.cli.machine import which

    text, good = which.which(file, which.attributes_of(named, attribute), as_json)
    click.echo(text)
    return 0 if good else NO


@click.command(short_help="Print the JSON schema of a policy file.")
def schema() -> int:
    """Print the JSON schema of a policy file, for editors and pipelines.

    \b
    Examples:
      rcon schema > rcon.schema.json

    \b
    Exit status:
      0    success
    """
    import json

    from rcon_plugins.settings.file import json_schema

    click.echo(json.dumps(json_schema(), indent=2))
    return 0


@click.command(short_help="Show which limits work here, and how to fix the rest.")
@click.option("--user", metavar="NAME", help="Examine the machine as this user (needs root).")
@with_options([CGROUP])
@_json
def doctor(user: str | None, cgroup: str | None, as_json: bool) -> int:
    """Show what this machine offers and which limits this user can set, and a remedy for each limit that is missing.

    The check limits a real process for a moment, and removes all traces. Each line begins with

    \b
      ok   available, or works
      NO   a limit cannot be set; the next line has the remedy
      --   not available, but no limit needs it

    \b
    Examples:
      rcon doctor
      sudo rcon doctor --user www-data
      rcon doctor --json | jq '.missing[].remedy'

    \b
    Exit status:
      0    every limit can be set
      1    some cannot: see the lines with NO
      2    bad usage
      125  rcon itself failed
    """
    from rcon_plugins.cli.machine import doctor
    from rcon_plugins.cli.options import named_base

    text, good = doctor.doctor(user, as_json, named_base(cgroup))
    click.echo(text)
    return 0 if good else NO


@click.command(short_help="Remove cgroups whose owner has died.")
@click.option("--dry-run", is_flag=True, help="Only print what would be done.")
@click.option(
    "--below", metavar="CGROUP", default="/", show_default=True, help="Search only this part of the tree."
)
@click.option(
    "--unknown",
    is_flag=True,
    help="Remove also cgroups without processes whose owner is in a PID namespace that cannot be seen from here.",
)
@_json
def gc(below: str, dry_run: bool, as_json: bool, unknown: bool) -> int:
    """Remove the cgroups of servers and commands that were killed before they could remove them, in the whole tree.

    Their requests, tasks and commands are killed. Processes of `rcon attach` return to their previous cgroups. A
    server's own processes keep running, and their cgroups stay. Cgroups of living owners are not touched, nor those of
    owners in another container. The next start of a server does the same below its own base.

    \b
    Examples:
      rcon gc --dry-run
      rcon gc

    \b
    Exit status:
      0    nothing of a dead owner is left (with --dry-run: nothing would be)
      1    something is left: its line says why
      2    bad usage
      125  rcon itself failed
    """
    from rcon_plugins.cli.machine import gc

    text, good = gc.gc(below, dry_run, as_json, unknown=unknown)
    if text:
        click.echo(text)
    return 0 if good else NO
