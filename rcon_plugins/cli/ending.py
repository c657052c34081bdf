"""How a command ends: exit statuses, and the one line on standard error."""

from __future__ import annotations

import contextlib

import click

#: As env(1), nohup(1) and chroot(1): the command itself failed and nothing was run; what it was to run cannot be
#: executed; that was not found.
OWN_FAILURE, NOT_EXECUTABLE, NOT_FOUND = 125, 126, 127
BAD_USAGE = 2


class Refused(click.ClickException):
    """Raised when a command cannot do what it was asked to. ``status`` is what it then exits with."""

    def __init__(self, message: str, status: int = OWN_FAILURE) -> None:
        super().__init__(message)
        self.status = status


def say(program: str, message: str) -> None:
    """One line on standard error, whatever is in ``message``; none where that is closed."""
    with contextlib.suppress(OSError):
        click.echo(f"{program}: {' '.join(message.split())}", err=True)
