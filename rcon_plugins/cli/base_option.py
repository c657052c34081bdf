"""The cgroup that a command makes its groups in, where the caller names one: ``--cgroup``, or the environment."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import click

from rcon_plugins.errors import SettingsError
from rcon_plugins.kernel.cgroup import Hierarchy
from rcon_plugins.settings.file import check_cgroup
from rcon_plugins.tree.nested import own_location

#: The variable that names it for all commands of a shell; an option, or a settings file, comes before it.
VARIABLE = "RCON_CGROUP"


def base_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """Give a click command ``--cgroup``, as ``cgroup`` of its options."""
    return click.option(
        "--cgroup",
        metavar="PATH",
        help=f"Make groups in this cgroup: /rcon. Else {VARIABLE} in the environment; else it is found.",
    )(function)


def named_base(option: str | None, setting: str | None = None) -> str | None:
    """The cgroup that is named by the option, the setting or the environment; None: it is to be found.

    The environment is for where no limits hold: inside of a group, a variable that was meant for outside names nothing.
    Raises `click.UsageError` for what is no path.
    """
    if option is not None:
        return _checked("--cgroup", option)
    if setting is not None:
        return setting
    variable = os.environ.get(VARIABLE)
    if not variable:
        return None
    location = own_location(Hierarchy.discover())
    return None if location is not None and location.boundary is not None else _checked(VARIABLE, variable)


def _checked(where: str, path: str) -> str:
    try:
        check_cgroup(path)
    except SettingsError as error:
        raise click.UsageError(f"{where}: {error.problem} ({error.hint})") from None
    return path
