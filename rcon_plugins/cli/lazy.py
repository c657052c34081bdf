"""A click group whose subcommands are imported when they are called, not before: their names and short helps are known.

Printing a usage, completing a word or running one subcommand loads no other::

    @click.group(cls=LazyGroup, subcommands={"run": Lazy("rcon_plugins.cli.run.commands:run", "Run a command.")})
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any, NamedTuple

import click
from click.shell_completion import CompletionItem


class Lazy(NamedTuple):
    """A subcommand that is not imported yet: ``module:attribute`` of the `click.Command`, and its short help."""

    home: str
    short_help: str

    def load(self) -> click.Command:
        """Import it."""
        module, _, attribute = self.home.partition(":")
        found: click.Command = getattr(import_module(module), attribute)
        return found


class LazyGroup(click.Group):
    """Lists, describes and completes subcommands without importing them. `add_command` goes on working beside it."""

    def __init__(self, *args: Any, subcommands: Mapping[str, Lazy] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.lazy = dict(subcommands or {})

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The names, in the order of the alphabet."""
        return sorted({*super().list_commands(ctx), *self.lazy})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of this name, imported if need be; None where there is none."""
        known = super().get_command(ctx, cmd_name)
        if known is None and cmd_name in self.lazy:
            known = self.lazy[cmd_name].load()
            self.add_command(known, cmd_name)
        return known

    def _short_helps(self, ctx: click.Context) -> list[tuple[str, str]]:
        found = []
        for name in self.list_commands(ctx):
            if name in self.lazy:
                found.append((name, self.lazy[name].short_help))
            elif (command := self.get_command(ctx, name)) is not None and not command.hidden:
                found.append((name, command.get_short_help_str(limit=80)))
        return found

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The table of commands in the help text."""
        rows = self._short_helps(ctx)
        if rows:
            with formatter.section("Commands"):
                formatter.write_dl(rows)

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """The names that begin so, and the options of the group itself."""
        names = [
            CompletionItem(name, help=text)
            for name, text in self._short_helps(ctx)
            if name.startswith(incomplete)
        ]
        return names + click.Command.shell_complete(self, ctx, incomplete)
