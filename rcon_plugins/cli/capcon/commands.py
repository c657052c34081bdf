"""``capcon``: the click group and its commands, for help and completion. Each imports its module when it is called."""

from __future__ import annotations

import sys
from typing import NoReturn

import click

from rcon_plugins.cli.completion import OwnParser, SuggestingGroup, running_a_command, with_options
from rcon_plugins.cli.exit import run_group
from rcon_plugins.cli.options import CAPCON_OPTIONS, EXPLAIN_OPTIONS

#: explain: the command would not hold what was requested.
NOT_AS_REQUESTED = 1

_SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


def main() -> NoReturn:
    """Run capcon with ``sys.argv`` and exit."""
    sys.exit(run_main(sys.argv[1:]))


def run_main(arguments: list[str]) -> int:
    """Run capcon with these arguments; return the exit status if no command was executed in its place."""
    return run_group(capcon, "capcon", arguments)


@click.group(cls=SuggestingGroup, context_settings=_SETTINGS)
@click.version_option(package_name="rcon-plugins", message="%(prog)s %(version)s")
def capcon() -> None:
    """Run a command as any user, with only the named capabilities and files; show and explain the rights it holds.

    \b
    Examples:
      capcon run -u nobody -c net_bind_service -- python3 -m http.server 80
      capcon explain --user nobody --cap net_raw -- ping -c 1 127.0.0.1
      capcon show 1

    \b
    Exit status: that of the command, or
      1    explain: the command would not hold what was requested
      2    bad usage
      125  capcon itself failed; nothing was run
      126  the command cannot be executed
      127  the command was not found

    \b
    Completion in bash (zsh: zsh_source, fish: fish_source):
      eval "$(_CAPCON_COMPLETE=bash_source capcon)"
    """


@capcon.command(cls=OwnParser, short_help="Run a command with only these capabilities and files.")
@with_options(CAPCON_OPTIONS)
@running_a_command
def run(words: list[str]) -> int:
    """Run COMMAND in place of capcon, so that signals, terminal and exit status are its own.

    What is not requested stays as it is: without --user, --cap and --drop-all, COMMAND has the user and capabilities
    of the caller. This needs no root where the caller already holds the requested rights.

    \b
    Run a web server on port 80 as nobody:
      capcon run -u nobody -c net_bind_service -- python3 -m http.server 80
    Build without any privilege, and let the build change only its own folder:
      capcon run --drop-all --no-new-privs --read-only / --write work -- make

    \b
    Exit status: that of COMMAND, or
      2    bad usage
      125  capcon itself failed, or the caller may not give these rights;
           nothing was run
      126  COMMAND cannot be executed
      127  COMMAND was not found
    """
    from rcon_plugins.cli.capcon import run

    return run.run(words)


@capcon.command(cls=OwnParser, short_help="Explain step by step which rights a command would hold.")
@with_options(EXPLAIN_OPTIONS)
@running_a_command
def explain(words: list[str]) -> int:
    """Explain which rights COMMAND will hold after execve(2): what it loses and gains in each step. Runs nothing.

    \b
    Examples:
      capcon explain --user nobody --cap net_raw -- ping -c 1 127.0.0.1

    \b
    Exit status:
      0    COMMAND would hold what was requested
      1    it would not, or the caller may not give these rights
      2    bad usage
      125  capcon itself failed
      126  COMMAND cannot be executed
      127  COMMAND was not found
    """
    from rcon_plugins.cli.capcon import explain

    text, as_requested = explain.explain(words)
    click.echo(text)
    return 0 if as_requested else NOT_AS_REQUESTED


@capcon.command(short_help="Show the user and the capabilities of a process.")
@click.argument("pid", type=click.IntRange(min=1), required=False)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def show(pid: int | None, as_json: bool) -> int:
    """Show the user, the groups and all capability sets of the process or thread PID.

    Without PID, show those of capcon itself, which are those that the shell gives to its commands.

    \b
    Examples:
      capcon show 1
      capcon show --json | jq .effective

    \b
    Exit status:
      0    success
      2    bad usage
      125  there is no such process, or it cannot be read
    """
    from rcon_plugins.cli.capcon import show

    click.echo(show.show(pid, as_json))
    return 0
