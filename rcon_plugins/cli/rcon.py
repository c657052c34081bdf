"""``rcon``: one command line for cgroups.

A subcommand's module is imported when it is called, and by it what it needs: start-up is part of what a command does.
"""

from __future__ import annotations

import sys
from typing import NoReturn

import click

from rcon_plugins.cli.ending import finish
from rcon_plugins.cli.lazy import Lazy, LazyGroup

_GROUPS = "rcon_plugins.cli.group_commands"
_POLICY = "rcon_plugins.cli.policy_commands"
#: By name: where it is, and its short help. Only the one that is called is imported.
SUBCOMMANDS = {
    "check": Lazy(f"{_POLICY}:check", "Say how each policy of FILE would be enforced here, and why."),
    "freeze": Lazy(f"{_GROUPS}:freeze", "Stop the processes of a group, until thaw."),
    "kill": Lazy(f"{_GROUPS}:kill", "End all processes of a group, double forks and new sessions too."),
    "ls": Lazy(f"{_GROUPS}:ls", "List the groups: who made them, within which limits, what they use."),
    "run": Lazy("rcon_plugins.cli.run_command:run", "Run a command within limits."),
    "schema": Lazy(f"{_POLICY}:schema", "Print the JSON schema of a policy file."),
    "set": Lazy(f"{_GROUPS}:set_command", "Set limits of a group while it runs."),
    "stat": Lazy(f"{_GROUPS}:stat", "Show all about one group: limits, usage, pressure, processes."),
    "thaw": Lazy(f"{_GROUPS}:thaw", "Let the processes of a frozen group go on."),
    "top": Lazy(f"{_GROUPS}:top", "Show what every group uses, live."),
    "which": Lazy(f"{_POLICY}:which", "Say which policy of FILE a work gets, and as whom it runs."),
}

_SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


def main() -> NoReturn:
    """The console script: does what ``sys.argv`` says and exits."""
    sys.exit(run_main(sys.argv[1:]))


def run_main(arguments: list[str]) -> int:
    """What `main` does, with these arguments; returns the exit status."""
    return finish(rcon, "rcon", arguments)


@click.group(cls=LazyGroup, subcommands=SUBCOMMANDS, context_settings=_SETTINGS)
@click.version_option(package_name="rcon-plugins", message="%(prog)s %(version)s")
def rcon() -> None:
    """Say what a policy file comes to on this machine, before a server does.

    \b
    Exit status:
      0    all is well
      1    check: the settings are wrong, or cannot be enforced here; which: the work would be refused
      2    bad usage
      125  no answer: which was given settings that are wrong, or rcon itself failed

    \b
    Completion of words, in bash (likewise zsh_source, fish_source):
      eval "$(_RCON_COMPLETE=bash_source rcon)"
    """
