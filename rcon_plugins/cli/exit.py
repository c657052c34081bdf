"""How a command ends: exit statuses, and the one line on standard error."""

from __future__ import annotations

import contextlib
import os
import signal
import sys

import click

from rcon_plugins.errors import RconError

#: As env(1), nohup(1) and chroot(1): the command itself failed and nothing was run; what it was to run cannot be
#: executed; that was not found.
OWN_FAILURE, NOT_EXECUTABLE, NOT_FOUND = 125, 126, 127
BAD_USAGE = 2
INTERRUPTED = 130  # as a shell tells of SIGINT


class Refused(click.ClickException):
    """Raised when a command cannot do what it was asked to. ``status`` is what it then exits with."""

    def __init__(self, message: str, status: int = OWN_FAILURE) -> None:
        super().__init__(message)
        self.status = status


def say(program: str, message: str) -> None:
    """One line on standard error, whatever is in ``message``; none where that is closed."""
    with contextlib.suppress(OSError):
        click.echo(f"{program}: {' '.join(message.split())}", err=True)


def interrupted() -> int:
    """The exit status of a loop that Ctrl-C ends. A second one, on the way out, does nothing any more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    return INTERRUPTED


def _is_help(error: click.UsageError) -> bool:
    """Whether it is no fault but the help of a command that was called without a word; click has that from 8.2 on."""
    return isinstance(error, getattr(click.exceptions, "NoArgsIsHelpError", ()))


def finish(group: click.Group, program: str, arguments: list[str]) -> int:
    """Do what the arguments say, and return the exit status; what goes wrong is one line on standard error."""
    try:
        status = group.main(arguments, prog_name=program, standalone_mode=False)
    except click.UsageError as error:
        if _is_help(error):
            click.echo(error.format_message(), err=True)
            return BAD_USAGE
        path = error.ctx.command_path if error.ctx else program
        say(program, f"{error.format_message().rstrip('.')} ({path} --help)")
        return BAD_USAGE
    except Refused as error:
        say(program, error.format_message())
        return error.status
    except (RconError, click.ClickException) as error:
        say(program, str(error))
        return OWN_FAILURE
    except click.exceptions.Exit as error:
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        return INTERRUPTED
    except OSError as error:
        # What the kernel says of its files is a KernelError; this is standard output, which takes no more.
        say(program, f"{error.filename or 'standard output'}: {error.strerror}")
        with contextlib.suppress(OSError, ValueError):
            os.dup2(
                os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno()
            )  # nothing is to be flushed at exit either
        return OWN_FAILURE
    return status if isinstance(status, int) else 0
