"""Words of a command line that a shell can complete: users, groups, capabilities."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from typing import TYPE_CHECKING

import click
from click.shell_completion import CompletionItem

if TYPE_CHECKING:
    _Word = click.ParamType[str]  # generic from click 8.2 on
else:
    _Word = click.ParamType


class Word(_Word):
    """A word, or with ``several`` words with commas between them; completed to one of those that ``known`` gives."""

    def __init__(self, name: str, known: Callable[[], list[str]], *, several: bool = False) -> None:
        self.name = name
        self._known = known
        self._several = several

    def shell_complete(
        self,
        ctx: click.Context,  # noqa: ARG002  click gives it
        param: click.Parameter,  # noqa: ARG002
        incomplete: str,
    ) -> list[CompletionItem]:
        before, comma, last = incomplete.rpartition(",") if self._several else ("", "", incomplete)
        return [CompletionItem(before + comma + name) for name in self._known() if name.startswith(last)]


class Command(_Word):
    """A word of a command that is run: completed, as in a shell, to programs first and to files then."""

    name = "command"

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        if ctx.params.get(param.name or "") or "/" in incomplete:
            return [CompletionItem(incomplete, type="file")]
        return [CompletionItem(name) for name in program_names() if name.startswith(incomplete)]


def program_names() -> list[str]:
    """The programs in the folders of PATH that may be executed."""
    found = set()
    for folder in os.get_exec_path():
        with contextlib.suppress(OSError), os.scandir(folder) as entries:
            found |= {entry.name for entry in entries if os.access(entry, os.X_OK) and not entry.is_dir()}
    return sorted(found)


def event_kinds() -> list[str]:
    """The kinds of events that a group may tell."""
    from rcon_plugins.kernel.events import KINDS

    return sorted(KINDS)


def capability_names() -> list[str]:
    """The capabilities of this kernel, as one writes them, that there are."""
    from rcon_plugins.cli.request import short_names

    return short_names()


def user_names() -> list[str]:
    """The names of users that there are."""
    import pwd

    return [entry.pw_name for entry in pwd.getpwall()]


def group_names() -> list[str]:
    """The names of groups of users that there are."""
    import grp

    return [entry.gr_name for entry in grp.getgrall()]
