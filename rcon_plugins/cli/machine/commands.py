"""``rcon doctor`` and ``rcon gc``: what this machine offers, and what dead owners left on it."""

from __future__ import annotations

import click

from rcon_plugins.cli.base_option import base_option, named_base

#: doctor: something that limits need is missing. gc: something could not be removed.
NOT_ALL = 1

_json = click.option("--json", "as_json", is_flag=True, help="As JSON.")


@click.command(short_help="Say what works on this machine, and what would mend the rest.")
@click.option("--user", metavar="NAME", help="As this user, as far as root can tell (needs root).")
@base_option
@_json
def doctor(user: str | None, cgroup: str | None, as_json: bool) -> int:
    """Say what this machine offers, what works on it for this user, and for each thing missing the remedy.

    A process is really put under limits, for a moment; nothing of it stays. Lines begin with

    \b
      ok   it is there, or works
      NO   a limit cannot be set; the line below says what to do
      --   it is not there, and no limit needs it

    \b
    Exit status:
      0    every limit can be set
      1    some cannot: there is a line with NO
      2    bad usage
      125  no answer: rcon itself failed

    \b
      rcon doctor
      sudo rcon doctor --user www-data
      rcon doctor --json | jq '.missing[].remedy'
    """
    from rcon_plugins.cli.machine import doctor

    text, good = doctor.doctor(user, as_json, named_base(cgroup))
    click.echo(text)
    return 0 if good else NOT_ALL


@click.command(short_help="Remove what dead owners left in the cgroup tree.")
@click.option("--dry-run", is_flag=True, help="Only say what would be done.")
@click.option(
    "--below", metavar="CGROUP", default="/", show_default=True, help="Only in this part of the tree."
)
@_json
def gc(below: str, dry_run: bool, as_json: bool) -> int:
    """Remove the cgroups of servers and commands that were killed before they could: anywhere in the tree.

    What runs in their work is killed; what `rcon attach` had taken is put back to where it was; a server's own
    processes are left alone, and so is the tree they are in. Nothing of a living owner is touched. A later start
    removes what is left under its own base; this finds the rest too.

    \b
    Exit status:
      0    nothing is left (with --dry-run: or would be)
      1    something is: its line says why
      2    bad usage
      125  rcon itself failed

    \b
      rcon gc --dry-run
      rcon gc
    """
    from rcon_plugins.cli.machine import gc

    text, good = gc.gc(below, dry_run, as_json)
    if text:
        click.echo(text)
    return 0 if good else NOT_ALL
