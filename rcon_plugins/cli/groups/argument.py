"""The argument GROUP: found, or refused with those that are near; completed with Tab."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click
from click.shell_completion import CompletionItem

from rcon_plugins.errors import RconError, UnknownGroup

if TYPE_CHECKING:
    from rcon_plugins.groups.find import Group


class GroupArgument(click.ParamType):  # type: ignore[type-arg]  # generic in newer clicks only
    """The name of a group, as `rcon_plugins.groups.find.find_group` takes it."""

    name = "group"

    def convert(self, value: str, _param: click.Parameter | None, ctx: click.Context | None) -> Group:
        """Find it. Bad usage where it is unknown, or names several."""
        from rcon_plugins.groups.find import find_group

        try:
            return find_group(value)
        except UnknownGroup as error:
            raise click.UsageError(str(error), ctx) from None

    def shell_complete(
        self, _ctx: click.Context, _param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        """The names of the groups that begin so, with what their owner is."""
        from rcon_plugins.cli.columns import short_command
        from rcon_plugins.groups.find import find_groups

        try:
            groups = find_groups().groups
        except RconError:
            return []  # no cgroups, no groups: nothing to complete, and no place for a message
        return [
            CompletionItem(group.label, help=short_command(group.owner.command or ""))
            for group in groups
            if group.label.startswith(incomplete)
        ]


GROUP = GroupArgument()
