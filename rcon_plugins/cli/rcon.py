"""``rcon``: one command line for cgroups.

A subcommand's module is imported when it is called, and by it what it needs: start-up is part of what a command does.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from typing import NoReturn

import click
from click.shell_completion import CompletionItem

from rcon_plugins.cli.exit import finish
from rcon_plugins.cli.lazy import Lazy, LazyGroup
from rcon_plugins.errors import RconError

_GROUPS = "rcon_plugins.cli.groups.commands"
_RUN = "rcon_plugins.cli.run.commands"
_POLICY = "rcon_plugins.cli.machine.policy_commands"
_MACHINE = "rcon_plugins.cli.machine.commands"
#: By name: where it is, and its short help. Only the one that is called is imported.
SUBCOMMANDS = {
    "attach": Lazy(f"{_RUN}:attach", "Put running processes in a group with limits, and let them go."),
    "check": Lazy(f"{_POLICY}:check", "Say how each policy of FILE would be enforced here, and why."),
    "freeze": Lazy(f"{_GROUPS}:freeze", "Stop the processes of a group, until thaw."),
    "kill": Lazy(f"{_GROUPS}:kill", "End all processes of a group, double forks and new sessions too."),
    "ls": Lazy(f"{_GROUPS}:ls", "List the groups: who made them, within which limits, what they use."),
    "doctor": Lazy(f"{_MACHINE}:doctor", "Say what works on this machine, and what would mend the rest."),
    "gc": Lazy(f"{_MACHINE}:gc", "Remove what dead owners left in the cgroup tree."),
    "run": Lazy(f"{_RUN}:run", "Run a command within limits."),
    "schema": Lazy(f"{_POLICY}:schema", "Print the JSON schema of a policy file."),
    "set": Lazy(f"{_GROUPS}:set_command", "Set limits of a group while it runs."),
    "stat": Lazy(f"{_GROUPS}:stat", "Show all about one group: limits, usage, pressure, processes."),
    "thaw": Lazy(f"{_GROUPS}:thaw", "Let the processes of a frozen group go on."),
    "top": Lazy(f"{_GROUPS}:top", "Show what every group uses, live."),
    "watch": Lazy(f"{_GROUPS}:watch", "Print a line for each event of a group."),
    "which": Lazy(f"{_POLICY}:which", "Say which policy of FILE a work gets, and as whom it runs."),
}

_PLUGINS_VARIABLE = "RCON_PLUGINS"
_SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


def main() -> NoReturn:
    """The console script: does what ``sys.argv`` says and exits."""
    sys.exit(run_main(sys.argv[1:]))


def run_main(arguments: list[str]) -> int:
    """What `main` does, with these arguments; returns the exit status."""
    return finish(rcon, "rcon", arguments)


class _Rcon(LazyGroup):
    """The built-in commands, and those of the plugins that an environment variable names: only then at any cost."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The names of all."""
        return sorted({*super().list_commands(ctx), *self._of_plugins()})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """A built-in command, else one of a plugin; None where there is none."""
        return super().get_command(ctx, cmd_name) or self._of_plugins().get(cmd_name)

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """The names that begin so; of the built-in ones alone where a plugin is broken: no place for a message."""
        try:
            return super().shell_complete(ctx, incomplete)
        except RconError:
            return [CompletionItem(name) for name in self.lazy if name.startswith(incomplete)]

    def _of_plugins(self) -> Mapping[str, click.Command]:
        if not os.environ.get(_PLUGINS_VARIABLE):
            return {}
        from rcon_plugins.cli import plugin_commands

        return plugin_commands.commands(self.lazy)


@click.group(cls=_Rcon, subcommands=SUBCOMMANDS, context_settings=_SETTINGS)
@click.version_option(package_name="rcon-plugins", message="%(prog)s %(version)s")
def rcon() -> None:
    """Run commands within limits; see what is confined on this machine, and change it; check policy files.

    \b
    Exit status (of run: that of the command):
      0    all is well
      1    check: the settings are wrong, or cannot be enforced here; which: the work would be refused
      2    bad usage
      125  no answer: which was given settings that are wrong, or rcon itself failed
      130  interrupted

    \b
    Completion of words, in bash (likewise zsh_source, fish_source):
      eval "$(_RCON_COMPLETE=bash_source rcon)"
    """
