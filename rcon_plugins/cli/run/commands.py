"""``rcon run`` and ``rcon attach``: the declarations."""

from __future__ import annotations

from typing import Any

import click

from rcon_plugins.cli.base_option import base_option
from rcon_plugins.cli.completion import Command, Word, capability_names, user_names
from rcon_plugins.cli.limit_options import limit_options


@click.command(short_help="Run a command within limits.", context_settings={"allow_interspersed_args": False})
@limit_options
@click.option(
    "--user",
    "-u",
    type=Word("user", user_names),
    metavar="NAME|UID",
    help="Run as this user, without capabilities but --cap.",
)
@click.option(
    "--cap",
    "-c",
    type=Word("names", capability_names, several=True),
    multiple=True,
    metavar="NAME,...",
    help="With just these capabilities: net_raw.",
)
@click.option("--group", "-g", metavar="NAME", help="Call its group so; else by the command and a number.")
@click.option(
    "--policy", metavar="NAME", help="Limits, user and all else of this policy; options come on top."
)
@click.option("--settings", type=click.Path(), metavar="FILE", help="The settings file that --policy is in.")
@click.option("--timeout", metavar="TIME", help="End it, and all it started, after this: 20s, 5m, 1h.")
@click.option(
    "--on-event", metavar="CMD", help="Run this for each event, as JSON on its input; may answer limits."
)
@click.option(
    "--json",
    type=click.Path(),
    metavar="FILE",
    help="Write there how it ended and what it used; - is standard output.",
)
@base_option
@click.argument("command", nargs=-1, type=Command(), required=True)
def run(**options: Any) -> int:
    """Run COMMAND within limits that hold before its first instruction; all it starts is within them too.

    Terminal, job control, standard streams and signals are as without rcon. When COMMAND ends, what it left behind
    in the background is ended too, and the group is gone.

    \b
    One heavy program, held down:
      rcon run --cpu 30% --memory 1G -- make -j8
      rcon run --read 10M --write 10M -- tar xf backup.tar
    At most a minute, and eight processes:
      rcon run --timeout 1m --pids 8 -- ./untrusted.sh
    As somebody else, on one CPU, with the result for a program:
      rcon run --user nobody --cpus 0 --json usage.json -- ./job

    \b
    Exit status: the command's own, 128+n where signal n ended it (137: a limit on memory or time), or
      2    bad usage, or a limit that this machine cannot enforce; nothing was run
      125  rcon itself failed, and nothing was run
      126  the command cannot be executed
      127  the command was not found
    """
    from rcon_plugins.cli.run import run

    return run.run(options)


@click.command(short_help="Put running processes in a group with limits, and let them go.")
@limit_options
@click.option(
    "--group", "-g", metavar="NAME", help="Call the group so; else by the first command and its number."
)
@click.option("--children", is_flag=True, help="Take what they have started too, and what that has started.")
@click.option("--release", is_flag=True, help="Put processes, or all of a group, back where they were.")
@base_option
@click.argument("what", metavar="PID...", nargs=-1, required=True)
def attach(**options: Any) -> int:
    """Take the running processes PID... into a group with limits; what they start from now on is in it too.

    All of them are taken, or none. The group goes away by itself after the last of them has ended; until then a small
    process watches over it. With --release the arguments are groups that attach made, or processes in them.

    \b
    Hold down what is running already:
      rcon attach --cpu 30% 4711
      rcon attach --cpu 50% --write 5M --children --group backup $(pidof rsync)
    And let it go again:
      rcon attach --release backup

    \b
    Exit status:
      0    done
      2    bad usage, a process that cannot be taken, or a limit that this machine cannot enforce; none was taken
      125  rcon itself failed
    """
    from rcon_plugins.cli.run import attach

    return attach.attach(options)
