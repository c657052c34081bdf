"""Words of a command line that a shell can complete: users, groups, capabilities."""

from __future__ import annotations

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


def capability_names() -> list[str]:
    """The capabilities of this kernel, as one writes them, that there are."""
    from rcon_plugins.cli.asked import short_names

    return short_names()


def user_names() -> list[str]:
    """The names of users that there are."""
    import pwd

    return [entry.pw_name for entry in pwd.getpwall()]


def group_names() -> list[str]:
    """The names of groups of users that there are."""
    import grp

    return [entry.gr_name for entry in grp.getgrall()]
