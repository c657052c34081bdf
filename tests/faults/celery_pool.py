"""A Celery worker whose pool process works in this process, and the tasks that it runs.

All of it is Celery's: the worker that judges the settings, what a process of its pool does at its start and at its end,
and how it runs a task (`fast_trace_task`). Results and leases are files. Messages that a task sends stay in memory.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from typing import Any, NoReturn

from billiard.einfo import ExceptionWithTraceback
from celery import Celery
from celery.app import trace
from celery.apps.worker import Worker
from celery.backends.filesystem import FilesystemBackend
from celery.concurrency.prefork import process_destructor, process_initializer
from kombu.transport.memory import Transport

from rcon_celery import install
from rcon_plugins.settings.file import from_mapping
from tests.faults.report import report, report_of_process

_HOSTNAME = "w@faults"
#: Loaded here, so that no case does it.
_LOADED = (FilesystemBackend, Transport)


def make(base: str, folder: str, policies: dict[str, Any]) -> Celery:
    """Return the application. Each task has the policy of its own name."""
    app = Celery("faults", broker="memory://", backend=f"file://{folder}", set_as_current=False)
    app.conf.update(worker_redirect_stdouts=True, accept_content=["json"])
    routes = [{"task": name, "policy": name} for name in policies]
    install(app, from_mapping({"policy": policies, "route": routes, "cgroup": base}))

    @app.task(name="tenant")
    def tenant() -> dict[str, Any]:
        print("printed by a task")
        os.chdir("/tmp")  # which the next task must not notice
        return report_of_process()

    @app.task(name="late", acks_late=True)
    def late(seconds: float) -> dict[str, Any]:
        time.sleep(seconds)
        return report_of_process()

    @app.task(name="die")
    def die() -> None:
        os._exit(3)

    @app.task(name="quick")
    def quick() -> None:
        time.sleep(300)

    @app.task(name="inline")
    def inline() -> dict[str, Any]:
        return report()

    return app


class PoolProcess:
    """The worker's main process and a process of its pool in one, as with the pool ``solo``."""

    def __init__(self, app: Celery) -> None:
        """Make the worker, which judges the settings and makes the cgroups. Raises `RconError`."""
        self._app = app
        self._worker = Worker(app=app, pool="prefork", concurrency=1, hostname=_HOSTNAME, loglevel="INFO")
        app.log.redirect_stdouts("WARNING")
        self.log = _Log()
        logging.getLogger().addHandler(self.log)

    def start(self) -> None:
        """Do what a new pool process does."""
        process_initializer(self._app, _HOSTNAME)

    def run(self, name: str, *args: Any, number: str = "", redelivered: bool = False, **headers: Any) -> Any:
        """Run a task from its message; return the result from the backend, or raise what the pool sends instead."""
        number = number or name
        message = self._app.amqp.as_task_v2(number, name, args, {})
        delivery = {"exchange": "", "routing_key": "celery", "redelivered": redelivered}
        request = {**message.headers, **headers, "headers": headers, "delivery_info": delivery}
        failed, value, _ = trace.fast_trace_task(name, number, request, message.body, None, None)
        if not failed:
            return self._app.AsyncResult(number).result
        error = value.exception
        raise error.exc if isinstance(error, ExceptionWithTraceback) else error

    def run_until_killed(self, *task: Any, **options: Any) -> NoReturn:
        """Start, and run a task, during which this fork is to be killed."""
        try:
            self.start()
            self.run(*task, **options)
        finally:
            os._exit(1)  # the task was refused

    def end(self) -> None:
        """Do what a pool process does at its end, and then the worker's main process."""
        process_destructor(os.getpid(), 0)
        worker = self._app.rcon.worker
        if worker is not None:
            worker.close()


class _Log(logging.Handler):
    """Keeps the warnings of the server."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.said: list[str] = []
        #: The lines with a traceback. Celery logs one for each task that failed; any other is a fault.
        self.tracebacks: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())
        if record.exc_info and record.name != "celery.app.trace":
            self.tracebacks.append(f"{record.name}: {record.getMessage()} {sys.exc_info()[1]!r}")
