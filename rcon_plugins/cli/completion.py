"""Our options and arguments as click knows them: declared for help, and completed with Tab."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import CompletionItem

from rcon_plugins.cli.exit import BadUsage
from rcon_plugins.cli.options import HelpRequested, Option
from rcon_plugins.errors import RconError, UnknownGroup

if TYPE_CHECKING:
    from rcon_plugins.groups.find import Group

    _Word = click.ParamType[str]  # generic from click 8.2 on
else:
    _Word = click.ParamType


class Word(_Word):
    """A word that is completed to one of ``known()``; with ``several``, words separated by commas."""

    def __init__(self, name: str, known: Callable[[], list[str]], *, several: bool = False) -> None:
        self.name = name
        self._known = known
        self._several = several

    def shell_complete(
        self,
        ctx: click.Context,  # noqa: ARG002  click passes it
        param: click.Parameter,  # noqa: ARG002
        incomplete: str,
    ) -> list[CompletionItem]:
        before, comma, last = incomplete.rpartition(",") if self._several else ("", "", incomplete)
        return [CompletionItem(before + comma + name) for name in self._known() if name.startswith(last)]


class CommandWord(_Word):
    """A word of the command to run: the first is completed to programs, the others to files, as in a shell."""

    name = "command"

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        if ctx.params.get(param.name or "") or "/" in incomplete:
            return [CompletionItem(incomplete, type="file")]
        return [CompletionItem(name) for name in program_names() if name.startswith(incomplete)]


class GroupArgument(click.ParamType):  # type: ignore[type-arg]  # generic from click 8.2 on
    """The argument GROUP: a name that `rcon_plugins.groups.find.find_group` finds."""

    name = "group"

    def convert(self, value: str, _param: click.Parameter | None, _ctx: click.Context | None) -> Group:
        """Return the group of this name. Raise `BadUsage` where there is none, or more than one."""
        from rcon_plugins.groups.find import find_group

        try:
            return find_group(value)
        except UnknownGroup as error:
            raise BadUsage(str(error)) from None

    def shell_complete(
        self, _ctx: click.Context, _param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        """Return the names that begin with ``incomplete``, each with the command of its owner."""
        from rcon_plugins.cli.columns import short_command
        from rcon_plugins.groups.find import find_groups

        try:
            groups = find_groups().groups
        except RconError:
            return []  # a completion cannot show a message
        return [
            CompletionItem(group.label, help=short_command(group.owner.command or ""))
            for group in groups
            if group.label.startswith(incomplete)
        ]


def program_names() -> list[str]:
    """Return the names of the executable files in the folders of PATH."""
    found = set()
    for folder in os.get_exec_path():
        with contextlib.suppress(OSError), os.scandir(folder) as entries:
            found |= {entry.name for entry in entries if os.access(entry, os.X_OK) and not entry.is_dir()}
    return sorted(found)


def event_kinds() -> list[str]:
    """Return the kinds of events that a group can report."""
    from rcon_plugins.kernel.events import KINDS

    return sorted(KINDS)


def capability_names() -> list[str]:
    """Return the capabilities of this kernel, without ``cap_``."""
    from rcon_plugins.cli.request import short_names

    return short_names()


def user_names() -> list[str]:
    """Return the names in the user database."""
    import pwd

    return [entry.pw_name for entry in pwd.getpwall()]


def group_names() -> list[str]:
    """Return the names in the group database."""
    import grp

    return [entry.gr_name for entry in grp.getgrall()]


#: What the value of an option is completed to, by `Option.completes`; the plural names take several words.
KNOWN: dict[str, Callable[[], list[str]]] = {
    "oom": lambda: ["group", "process"],
    "user": user_names,
    "group": group_names,
    "groups": group_names,
    "capabilities": capability_names,
}


def with_options(options: Sequence[Option]) -> Callable[[Any], Any]:
    """Return a decorator that declares ``options`` to click."""

    def decorate(function: Any) -> Any:
        for option in reversed(options):
            declared: dict[str, Any] = {"help": option.help, "hidden": option.hidden}
            if not option.metavar:
                declared["is_flag"] = True
            else:
                declared |= {"metavar": option.metavar, "multiple": option.several}
            if option.completes == "path":
                declared["type"] = click.Path()
            elif option.completes:
                several = option.several or option.completes == "groups"
                declared["type"] = Word(option.completes, KNOWN[option.completes], several=several)
            function = click.option(*option.flags, option.name, **declared)(function)
        return function

    return decorate


def running_a_command(function: Any) -> Any:
    """Declare the argument COMMAND: the words of the command to run."""
    return click.argument("command", nargs=-1, type=CommandWord(), required=True)(function)


class SuggestingGroup(click.Group):
    """A group whose message for an unknown command names the most similar one."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Return the command of the first word. Raise `click.UsageError` if there is none."""
        unknown = not args[0].startswith("-") and self.get_command(ctx, args[0]) is None
        if unknown and not ctx.resilient_parsing:
            import difflib

            near = difflib.get_close_matches(args[0], self.list_commands(ctx), n=1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise click.UsageError(f"No such command {args[0]!r}{hint}", ctx)
        return super().resolve_command(ctx, args)


class OwnParser(click.Command):
    """A command that parses its words with `rcon_plugins.cli.options.parse`.

    click has the options for help and completion only; the callback gets the list of words.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("context_settings", {"allow_interspersed_args": False})
        super().__init__(*args, **kwargs)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Leave the words as they are, except to complete one of them."""
        if ctx.resilient_parsing:
            return super().parse_args(ctx, args)
        ctx.args = list(args)
        return ctx.args

    def invoke(self, ctx: click.Context) -> Any:
        """Call the callback with the words, or print the help."""
        if self.callback is None:
            raise TypeError(f"{self.name} has no callback")
        try:
            return self.callback(ctx.args)
        except HelpRequested:
            click.echo(ctx.get_help())
            return 0
