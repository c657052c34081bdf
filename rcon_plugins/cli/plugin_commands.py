"""Subcommands of ``rcon`` from plugins: those that the environment variable ``RCON_PLUGINS`` names."""

from __future__ import annotations

import functools
import os
from collections.abc import Collection, Mapping

import click

from rcon_plugins.builtin.plugins import commands_manager
from rcon_plugins.errors import SettingsError

VARIABLE = "RCON_PLUGINS"


def commands(built_in: Collection[str]) -> Mapping[str, click.Command]:
    """By name, what the plugins add. Raises `SettingsError` for a plugin or a command that cannot be."""
    return _commands(os.environ.get(VARIABLE, ""), frozenset(built_in))


@functools.cache
def _commands(text: str, built_in: frozenset[str]) -> Mapping[str, click.Command]:
    names = [name for part in text.split(",") if (name := part.strip())]
    manager = commands_manager(names, VARIABLE)
    found: dict[str, click.Command] = {}
    for name in names:
        # One at a time, so that whose fault something is can be said.
        cli = click.Group("rcon")
        others = [manager.get_plugin(other) for other in names if other != name]
        try:
            manager.subset_hook_caller("rcon_commands", others)(cli=cli)
        except Exception as error:
            raise _refused(f"{type(error).__name__}: {error}", name) from error
        for taken in sorted(cli.commands.keys() & (built_in | found.keys())):
            raise _refused(f"there is a command {taken!r} already", name)
        found.update(cli.commands)
    return found


def _refused(problem: str, name: str) -> SettingsError:
    return SettingsError(
        f"the plugin {name!r} cannot add its commands: {problem}",
        key=VARIABLE,
        value=name,
        hint="mend it, or take its name out",
    )
