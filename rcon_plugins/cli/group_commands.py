"""``rcon ls``, ``stat`` and the others that take a GROUP: what is confined on this machine, and what to do to it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from rcon_plugins.cli.group_argument import GROUP

if TYPE_CHECKING:
    from rcon_plugins.groups import Group

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
    from rcon_plugins.cli import listing

    return listing.ls(as_json)


@click.command(short_help="Show all about one group: limits, usage, pressure, processes.")
@_group
@_json
def stat(group: Group, as_json: bool) -> int:
    """Show all about GROUP: its limits, what it used and uses, limit hits, pressure, and its processes.

    \b
      rcon stat tenant~a.example
      rcon stat --json sleep-1234 | jq .usage.memory_peak
    """
    from rcon_plugins.cli import listing

    return listing.stat(group, as_json)
