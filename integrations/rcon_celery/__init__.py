"""Confine each task that a Celery worker runs.

::

    from rcon_celery import confined, install

    app = Celery("proj", broker=…)
    install(app)                                  # or install(app, "rcon.toml"), with routes

    @app.task
    @confined(memory="512M", timeout="60s")
    def render(name): ...

Call `install` before the tasks are used. Outside of workers, and in eager mode, tasks run unconfined as before.

The modules, in the order in which a task passes them: `install` (an application), `worker` (the worker's main process),
`pool_process` (a process that runs tasks), `call`, `codec` and `wire` (one task, on its way to an executor process),
`service` (the executor process), `results` (its outcome), ``retry/`` (the task's next attempt). `decorator` and
`task_annotations` connect a task's code to them. `handlers` and `contexts` run the handlers of signals, and enter the
contexts of tracers and loggers, beside the body. `child_processes` lets a body start processes. `termination` kills the
body of a task that Celery terminates. `remote_control` sends commands to all workers.
"""

from __future__ import annotations

from rcon_celery.decorator import confined
from rcon_celery.handlers import handler_side
from rcon_celery.install import install
from rcon_celery.results import outcome_of
from rcon_celery.retry.attempt import expand

__all__ = ["confined", "expand", "handler_side", "install", "outcome_of"]
