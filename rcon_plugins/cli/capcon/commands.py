"""``capcon``: any command, as any user, with just these capabilities and these files.

The subcommands import what they need when they are called, so that completing a word or printing a usage is quick.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, NoReturn

import click

from rcon_plugins.cli.completion import Command, Word, capability_names, group_names, user_names
from rcon_plugins.cli.exit import finish

if TYPE_CHECKING:
    from rcon_plugins.cli.request import Asked

#: explain: the command would not hold what was asked.
NOT_AS_ASKED = 1

_SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


def main() -> NoReturn:
    """The console script: does what ``sys.argv`` says and exits."""
    sys.exit(run_main(sys.argv[1:]))


def run_main(arguments: list[str]) -> int:
    """What `main` does, with these arguments; returns the exit status where a command was not run instead."""
    return finish(capcon, "capcon", arguments)


def _asking(function: Any) -> Any:
    """The options that say what a command shall hold, the same for `run` and for `explain`."""
    options = [
        click.option(
            "--user",
            "-u",
            type=Word("user", user_names),
            metavar="NAME|UID",
            help="Run as this user, without capabilities but --cap.",
        ),
        click.option(
            "--group",
            "-g",
            type=Word("group", group_names),
            metavar="NAME|GID",
            help="In this group instead of the user's own.",
        ),
        click.option(
            "--groups",
            type=Word("groups", group_names, several=True),
            metavar="NAME,...",
            help="In just these other groups instead of those the group database gives the user; '' for none.",
        ),
        click.option(
            "--cap",
            "-c",
            "caps",
            type=Word("capabilities", capability_names, several=True),
            multiple=True,
            metavar="NAME,...",
            help="With just these capabilities: net_bind_service,net_raw.",
        ),
        click.option("--drop-all", is_flag=True, help="Without any capability."),
        click.option(
            "--no-new-privs",
            is_flag=True,
            help="No program it runs may gain anything: setuid bits and file capabilities do nothing.",
        ),
        click.option(
            "--read-only",
            "read_only",
            type=click.Path(),
            multiple=True,
            metavar="PATH",
            help="It may read and execute what is below PATH, ...",
        ),
        click.option(
            "--write",
            type=click.Path(),
            multiple=True,
            metavar="PATH",
            help="... change what is below PATH, and do nothing with any other file (Landlock).",
        ),
        click.option("--keep-env", is_flag=True, help="Leave HOME, USER, LOGNAME and SHELL as they are."),
        click.argument("command", nargs=-1, type=Command(), required=True),
    ]
    for option in reversed(options):
        function = option(function)
    return function


def _asked(options: dict[str, Any]) -> Asked:
    from rcon_plugins.cli.request import Asked

    return Asked.of(**options)


@click.group(context_settings=_SETTINGS)
@click.version_option(package_name="rcon-plugins", message="%(prog)s %(version)s")
def capcon() -> None:
    """Run any command as any user with just the capabilities and files named; show and explain what it holds.

    \b
    Exit status: the command's own, or
      125  capcon itself failed, and nothing was run
      126  the command cannot be executed
      127  the command was not found
        2  bad usage
        1  explain: the command would not hold what was asked

    \b
    Completion of words, in bash (likewise zsh_source, fish_source):
      eval "$(_CAPCON_COMPLETE=bash_source capcon)"
    """


@capcon.command(
    context_settings={"allow_interspersed_args": False},
    short_help="Run a command with just these capabilities and files.",
)
@_asking
def run(**options: Any) -> int:
    """Run COMMAND, in place of capcon: signals, terminal and exit status are its own.

    What is not asked for stays as it is: without --user, --cap and --drop-all the command has the identity and the
    capabilities of the caller. Root is not needed where the caller already holds what it gives.

    \b
    A web server on port 80, as nobody:
      capcon run --user nobody --cap net_bind_service -- python3 -m http.server 80
    Without any privilege: a build that can change nothing but its own folder:
      capcon run --drop-all --no-new-privs --read-only / --write ./work -- make -C work
    """
    from rcon_plugins.cli.capcon import run

    return run.run(_asked(options))


@capcon.command(
    context_settings={"allow_interspersed_args": False},
    short_help="Say what a command would hold, step by step; run nothing.",
)
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
@_asking
def explain(as_json: bool, **options: Any) -> int:
    """Say what COMMAND will hold after execve(2), step by step and why, and what will be lost. Runs nothing.

    Exits with 1 if it would not hold what was asked, or if the caller may not give it.

    \b
      capcon explain --user nobody --cap net_raw -- ping -c 1 127.0.0.1
    """
    from rcon_plugins.cli.capcon import explain

    text, as_asked = explain.explain(_asked(options), as_json)
    click.echo(text)
    return 0 if as_asked else NOT_AS_ASKED


@capcon.command(short_help="Show the identity and the capabilities of a process.")
@click.argument("pid", type=click.IntRange(min=1), required=False)
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
def show(pid: int | None, as_json: bool) -> int:
    """Show the identity and all capability sets of the process or thread PID.

    Without PID those of capcon itself, which are what the shell gives to the commands it runs.

    \b
      capcon show 1
    """
    from rcon_plugins.cli.capcon import show

    click.echo(show.show(pid, as_json))
    return 0
