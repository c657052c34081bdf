"""Confine each task that a Celery worker runs.

::

    from rcon_celery import confined, install

    app = Celery("proj", broker=…)
    install(app)                                  # or install(app, "rcon.toml"), with routes

    @app.task
    @confined(memory="512M", timeout="60s")
    def render(name): ...

`install` comes before the tasks are used. Outside of workers, in eager mode too, tasks run as they always did.
"""

from __future__ import annotations

from rcon_celery.decorator import confined
from rcon_celery.installation import install
from rcon_celery.results import outcome_of
from rcon_celery.retry.attempt import expand

__all__ = ["confined", "expand", "install", "outcome_of"]
