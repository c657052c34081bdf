"""``rcon``: the click group. A subcommand is imported when it is called; help and completion import none."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Collection, Mapping
from importlib import import_module
from typing import Any, NamedTuple, NoReturn

import click
from click.shell_completion import CompletionItem

from rcon_plugins.cli.completion import SuggestingGroup
from rcon_plugins.cli.exit import run_group
from rcon_plugins.errors import RconError, SettingsError

#: The environment variable that names the plugins whose commands rcon offers.
PLUGINS = "RCON_PLUGINS"

_RUN = "rcon_plugins.cli.run.commands"
_GROUPS = "rcon_plugins.cli.groups.commands"
_MACHINE = "rcon_plugins.cli.machine.commands"


class Subcommand(NamedTuple):
    """A subcommand that is not imported yet: its section of the help, ``module:attribute``, and its short help."""

    section: str
    location: str
    short_help: str

    def load(self) -> click.Command:
        """Import and return the click command."""
        module, _, attribute = self.location.partition(":")
        found: click.Command = getattr(import_module(module), attribute)
        return found


#: The built-in subcommands by name, in the order of the help.
SUBCOMMANDS = {
    "run": Subcommand("Run", f"{_RUN}:run", "Run a command within limits."),
    "attach": Subcommand("Run", f"{_RUN}:attach", "Limit processes that already run, and release them."),
    "ls": Subcommand("Look", f"{_GROUPS}:ls", "List all groups with their limits and usage."),
    "top": Subcommand("Look", f"{_GROUPS}:top", "Show the usage of all groups, live."),
    "stat": Subcommand("Look", f"{_GROUPS}:stat", "Show one group: limits, usage, pressure, processes."),
    "watch": Subcommand("Look", f"{_GROUPS}:watch", "Print the events of a group as they happen."),
    "set": Subcommand("Change", f"{_GROUPS}:set_command", "Change the limits of a running group."),
    "freeze": Subcommand("Change", f"{_GROUPS}:freeze", "Suspend all processes of a group."),
    "thaw": Subcommand("Change", f"{_GROUPS}:thaw", "Resume a frozen group."),
    "kill": Subcommand("Change", f"{_GROUPS}:kill", "Kill all processes of a group."),
    "check": Subcommand("Settings", f"{_MACHINE}:check", "Check a policy file against this machine."),
    "which": Subcommand("Settings", f"{_MACHINE}:which", "Show the policy that a request or task gets."),
    "schema": Subcommand("Settings", f"{_MACHINE}:schema", "Print the JSON schema of a policy file."),
    "doctor": Subcommand("Machine", f"{_MACHINE}:doctor", "Show which limits work here, and how to fix the rest."),
    "gc": Subcommand("Machine", f"{_MACHINE}:gc", "Remove cgroups whose owner has died."),
}  # fmt: skip
_OF_PLUGINS = "Plugins"


def main() -> NoReturn:
    """Run rcon with ``sys.argv`` and exit."""
    sys.exit(run_main(sys.argv[1:]))


def run_main(arguments: list[str]) -> int:
    """Run rcon with these arguments and return the exit status."""
    return run_group(rcon, "rcon", arguments)


class Rcon(SuggestingGroup):
    """A group that lists, describes and completes its subcommands without importing them.

    With RCON_PLUGINS set, the commands of those plugins are there too.
    """

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return all names: the built-in ones in the order of the help, then those of plugins."""
        more = {*super().list_commands(ctx), *self._of_plugins()} - SUBCOMMANDS.keys()
        return [*SUBCOMMANDS, *sorted(more)]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return the command of this name, imported if needed; None if there is none."""
        known = super().get_command(ctx, cmd_name)
        if known is None and cmd_name in SUBCOMMANDS:
            known = SUBCOMMANDS[cmd_name].load()
            self.add_command(known, cmd_name)
        return known or self._of_plugins().get(cmd_name)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the commands in sections."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for name, text in self._short_helps(ctx):
            section = SUBCOMMANDS[name].section if name in SUBCOMMANDS else _OF_PLUGINS
            sections.setdefault(section, []).append((name, text))
        widest = max(len(name) for rows in sections.values() for name, _ in rows)
        for section, rows in sections.items():
            with formatter.section(section):
                formatter.write_dl([(name.ljust(widest), text) for name, text in rows])

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Return the names that begin with ``incomplete``, and the group's own options."""
        try:
            helps = self._short_helps(ctx)
        except RconError:  # a broken plugin; a completion cannot show the message
            helps = [(name, one.short_help) for name, one in SUBCOMMANDS.items()]
        names = [CompletionItem(name, help=text) for name, text in helps if name.startswith(incomplete)]
        return names + click.Command.shell_complete(self, ctx, incomplete)

    def _short_helps(self, ctx: click.Context) -> list[tuple[str, str]]:
        found = []
        for name in self.list_commands(ctx):
            if name in SUBCOMMANDS:
                found.append((name, SUBCOMMANDS[name].short_help))
            elif (command := self.get_command(ctx, name)) is not None and not command.hidden:
                found.append((name, command.get_short_help_str(limit=80)))
        return found

    def _of_plugins(self) -> Mapping[str, click.Command]:
        return plugin_commands(os.environ.get(PLUGINS, ""))


@functools.cache
def plugin_commands(names: str) -> Mapping[str, click.Command]:
    """Return the commands of the plugins that ``names`` lists, separated by commas.

    Raises `SettingsError` for a plugin that is not installed or fails, and for a command whose name is taken.
    """
    listed = [name for part in names.split(",") if (name := part.strip())]
    if not listed:
        return {}
    from rcon_plugins.builtin.plugins import commands_manager

    manager = commands_manager(listed, PLUGINS)
    found: dict[str, click.Command] = {}
    for name in listed:
        # One plugin at a time, so that an error names the plugin.
        cli = click.Group("rcon")
        others = [manager.get_plugin(other) for other in listed if other != name]
        try:
            manager.subset_hook_caller("rcon_commands", others)(cli=cli)
        except Exception as error:
            raise _plugin_error(f"{type(error).__name__}: {error}", name) from error
        _check_names(cli.commands, SUBCOMMANDS.keys() | found.keys(), name)
        found.update(cli.commands)
    return found


def _check_names(commands: Collection[str], taken: Collection[str], plugin: str) -> None:
    for name in sorted(set(commands) & set(taken)):
        raise _plugin_error(f"there is already a command {name!r}", plugin)


def _plugin_error(problem: str, name: str) -> SettingsError:
    return SettingsError(
        f"plugin {name!r} cannot add its commands: {problem}",
        key=PLUGINS,
        value=name,
        hint="fix the plugin, or remove it from the variable",
    )


_SETTINGS: dict[str, Any] = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


@click.group(cls=Rcon, context_settings=_SETTINGS)
@click.version_option(package_name="rcon-plugins", message="%(prog)s %(version)s")
def rcon() -> None:
    """Run commands within limits, see and change what is confined on this machine, and check policy files.

    \b
    Examples:
      rcon run --cpu 30% --memory 1G -- make -j8
      rcon top
      rcon check /etc/rcon.toml

    \b
    Exit status (rcon run: that of its command):
      0    success
      1    check, which, doctor, gc: the answer is no; see --help of the command
      2    bad usage
      125  rcon itself failed
      130  interrupted

    \b
    Completion in bash (zsh: zsh_source, fish: fish_source):
      eval "$(_RCON_COMPLETE=bash_source rcon)"
    """
