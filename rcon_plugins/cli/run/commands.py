"""The click commands ``rcon run`` and ``rcon attach``: their help. Each imports its work when it is called."""

from __future__ import annotations

from typing import Any

import click

from rcon_plugins.cli.completion import OwnParser, running_a_command, with_options
from rcon_plugins.cli.options import ATTACH_OPTIONS, RUN_OPTIONS


@click.command(cls=OwnParser, short_help="Run a command within limits.")
@with_options(RUN_OPTIONS)
@running_a_command
def run(words: list[str]) -> int:
    """Run COMMAND within limits. They hold before its first instruction, and for all processes it starts.

    Terminal, job control, standard streams and signals work as without rcon. When COMMAND ends, rcon kills what it
    left in the background, and removes the group.

    \b
    Limit a build to 30 % of one CPU and 1 GiB:
      rcon run --cpu 30% --memory 1G -- make -j8
    Slow down the disk traffic of a backup:
      rcon run --read 10M --write 10M -- tar xf backup.tar
    Allow a minute and eight processes:
      rcon run --timeout 1m --pids 8 -- ./untrusted.sh
    Run as another user on one CPU, and write the usage to a file:
      rcon run --user nobody --cpus 0 --json usage.json -- ./job

    \b
    Exit status: that of COMMAND; 128+n if signal n ended it (137: a memory limit
    or the timeout); or
      2    bad usage, or a limit that cannot be enforced here; nothing was run
      125  rcon itself failed; nothing was run
      126  COMMAND cannot be executed
      127  COMMAND was not found
    """
    from rcon_plugins.cli.run import run

    return run.run(words)


@click.command(short_help="Limit processes that already run, and release them.")
@with_options(ATTACH_OPTIONS)
@click.argument("what", metavar="PID...", nargs=-1, required=True)
def attach(**options: Any) -> int:
    """Move the running processes PID... into a group with limits. Processes they start later are in it too.

    Either all processes move, or none. The group is removed when its last process ends; until then a small process
    watches it. With --release, name groups that attach made, or processes in them.

    \b
    Limit a process that already runs:
      rcon attach --cpu 30% 4711
      rcon attach --cpu 50% --write 5M --children --group backup $(pidof rsync)
    Release it again:
      rcon attach --release backup

    \b
    Exit status:
      0    all processes were moved
      2    bad usage, a process that cannot be moved, or a limit that cannot be
           enforced here; no process was moved
      125  rcon itself failed
    """
    from rcon_plugins.cli.run import attach

    return attach.attach(options)
