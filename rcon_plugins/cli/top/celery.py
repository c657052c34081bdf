"""``rcon top --celery``: the groups of all workers of a Celery application."""

from __future__ import annotations

from functools import partial
from importlib import import_module

import click

from rcon_plugins.cli.columns import printable
from rcon_plugins.cli.exit import Refused, say
from rcon_plugins.cli.top.live import Source
from rcon_plugins.errors import SettingsError


def workers(application: str) -> Source:
    """The workers of what ``celery -A`` calls so. Raises click.UsageError, or `Refused` where there is no Celery."""
    try:
        # By name: the core knows no server, and Celery is there only where somebody asked for it.
        remote = import_module("rcon_celery.remote_control")
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("celery", "kombu", "rcon_celery"):
            raise
        raise Refused(
            f"--celery: {error.name} is not installed here (pip install 'rcon-plugins[celery]')"
        ) from None
    try:
        app = remote.load(application)
    except SettingsError as error:
        raise click.UsageError(f"--celery: {error}") from None
    source: Source = remote.Workers(app, partial(_note, "rcon")).samples
    return source


def _note(program: str, message: str) -> None:
    say(program, f"note: {printable(message)}")
