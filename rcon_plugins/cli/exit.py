"""How a command ends: its exit status, and one line on standard error where it failed. Imports no click."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from rcon_plugins.errors import DelegationError, RconError, on_one_line

if TYPE_CHECKING:
    import click

#: The statuses of env(1), nohup(1) and chroot(1): rcon itself failed and ran nothing; the command cannot be executed;
#: the command was not found.
OWN_FAILURE, NOT_EXECUTABLE, NOT_FOUND = 125, 126, 127
BAD_USAGE = 2
#: 128 + SIGINT, as a shell reports it.
INTERRUPTED = 130


class BadUsage(Exception):
    """Raised for a command line that is wrong. The message names the option, its value and the remedy.

    ``command`` is the command whose ``--help`` the message points to; by default the one that is running.
    """

    def __init__(self, message: str, command: str | None = None) -> None:
        super().__init__(message)
        self.command = command


class Refused(Exception):
    """Raised when a command cannot do what the user requested. ``status`` is its exit status."""

    def __init__(self, message: str, status: int = OWN_FAILURE) -> None:
        super().__init__(message)
        self.status = status


def say(program: str, message: str) -> None:
    """Print ``message`` as one line on standard error. Do nothing where standard error is closed.

    A message may name what another user made, such as a cgroup: escape what controls the terminal.
    """
    if sys.stderr is None:
        return
    with contextlib.suppress(OSError, ValueError):
        print(f"{program}: {on_one_line(' '.join(message.split()))}", file=sys.stderr, flush=True)


def interrupted() -> int:
    """Return the exit status of a loop that Ctrl-C ended, and ignore a second Ctrl-C on the way out."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    return INTERRUPTED


def discard_output() -> None:
    """Send standard output to /dev/null, so that Python's flush at exit does not fail on a closed or full one."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def status_of(act: Callable[[], int], program: str, command: str) -> int:
    """Call ``act`` and return the exit status. Report an error as one line that begins with ``program``.

    ``command`` is the command that runs, such as ``rcon run``.
    """
    try:
        return act()
    except BadUsage as error:
        say(program, _with_help(str(error), error.command or command))
        return BAD_USAGE
    except Refused as error:
        say(program, str(error))
        return error.status
    except RconError as error:
        say(program, shortened(error))
        return OWN_FAILURE
    except OSError as error:
        # An error of the kernel's files is a KernelError; this one comes from writing to standard output.
        say(program, f"{error.filename or 'standard output'}: {error.strerror}")
        discard_output()
        return OWN_FAILURE


def shortened(error: RconError) -> str:
    """Return the message of an error; for a user without a cgroup, with one way to get it, and rcon doctor for others.

    A way of several steps is left out: they are for root, and too many for one line.
    """
    first, *more = (getattr(error, "hint", None) or "").split("; ")
    if not isinstance(error, DelegationError) or not more or os.geteuid() == 0:
        return str(error)
    if more[0].startswith("or"):
        return f"{error.problem} ({first}; rcon doctor shows other ways)"
    return f"{error.problem} (rcon doctor shows how to get one)"


def _with_help(message: str, command: str) -> str:
    """Return ``message`` with the command that prints the help, in the parentheses of its remedy if it has one."""
    if not message.endswith(")"):
        return f"{message} (see {command} --help)"
    return f"{message[:-1]}{'' if message.endswith('?)') else ';'} see {command} --help)"


def run_group(group: click.Group, program: str, arguments: list[str]) -> int:
    """Run a click group with these arguments and return the exit status, as `status_of` does."""
    import click

    def act() -> int:
        try:
            status = group.main(arguments, prog_name=program, standalone_mode=False)
        except click.UsageError as error:
            # click 8.2 and newer raise the help of a group that is called without a command.
            if isinstance(error, getattr(click.exceptions, "NoArgsIsHelpError", ())):
                click.echo(error.format_message(), err=True)
                return BAD_USAGE
            path = error.ctx.command_path if error.ctx else program
            raise BadUsage(error.format_message().rstrip("."), path) from None
        except click.ClickException as error:
            raise Refused(str(error)) from None
        except click.exceptions.Exit as error:
            return error.exit_code
        except click.Abort:
            return INTERRUPTED
        return status if isinstance(status, int) else 0

    return status_of(act, program, " ".join([program, *arguments[:1]]))
