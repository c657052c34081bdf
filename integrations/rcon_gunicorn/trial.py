"""A trial of a worker at a reload: made as gunicorn makes one, and ended before it serves.

A reload of gunicorn makes new workers and ends the old ones at once, before it knows whether the new ones can serve.
The hook ``on_reload`` comes before both. Source: gunicorn's ``arbiter.py``.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable
from typing import Any, NoReturn

from rcon_plugins.errors import RconError, fork_refused, on_one_line

#: How long a trial may take, seconds: to load the application and to make one executor process. gunicorn's own
#: ``timeout`` for a worker that does not answer, if that is longer.
_SECONDS = 60.0
_LONGEST_REASON = 2048


class TrialPassed(BaseException):
    """Raised in a trial in place of serving. Not an `Exception`: hooks of the site may catch those."""


def why_not(server: Any, prepare: Callable[[], object], clean_up: Callable[[int], object]) -> str | None:
    """Make a worker on trial, and return why it could not serve; None if it could.

    ``prepare`` is called first in its process, ``clean_up`` with its pid when it has ended. The hook
    ``post_worker_init`` has to raise `TrialPassed`. Call it in the master, which does nothing else meanwhile. Raises
    `KernelError` if no process can be made.
    """
    reading, writing = os.pipe2(os.O_CLOEXEC)
    try:
        try:
            pid = os.fork()
        except OSError as error:
            raise fork_refused(error) from None
        if pid == 0:
            _run(server, prepare, writing)
        seconds = max(_SECONDS, float(server.timeout))
        in_time = _has_ended(pid, time.monotonic() + seconds)
        clean_up(pid)
        os.set_blocking(reading, False)
        try:
            reason = os.read(reading, 4 * _LONGEST_REASON).decode(errors="replace")
        except BlockingIOError:
            reason = ""
    finally:
        os.close(reading)
        os.close(writing)
    if reason == "passed":
        return None
    if not in_time:
        return f"a worker on trial could not serve within {seconds:g} s"
    return reason or "a worker on trial ended before it could serve; the log has its last lines"


def _has_ended(pid: int, until: float) -> bool:
    """Wait for a child, and kill it if it lives longer. Return whether it ended in time."""
    while not os.waitpid(pid, os.WNOHANG)[0]:
        if time.monotonic() > until:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return False
        time.sleep(0.02)
    return True


def _run(server: Any, prepare: Callable[[], object], result: int) -> NoReturn:
    """Do in the child what gunicorn does in a worker, and report how that ended."""
    worker, reason = None, ""
    try:
        prepare()
        for sibling in server.WORKERS.values():
            sibling.tmp.close()
        worker = server.worker_class(
            server.worker_age,
            server.pid,
            server.LISTENERS,
            server.app,
            server.timeout / 2.0,
            server.cfg,
            server.log,
        )
        worker.pid = os.getpid()
        server.cfg.post_fork(server, worker)
        worker.init_process()
    except TrialPassed:
        reason = "passed"
    except BaseException as error:  # noqa: BLE001 - also what an application raises to end its process
        reason = on_one_line(
            str(error) if isinstance(error, RconError) else f"{type(error).__name__}: {error}"
        )
    with contextlib.suppress(BaseException):
        os.write(result, reason[:_LONGEST_REASON].encode(errors="backslashreplace"))
    try:
        if worker is not None:
            server.cfg.worker_exit(server, worker)
    finally:
        os._exit(0)


def keep_old_workers(server: Any, workers: int | None) -> None:
    """Have the rest of the reload make no worker and end none. Call it in ``on_reload``.

    ``workers`` is the number before the reload; None if it is not known.
    """
    server.cfg.set("workers", 0)  # so many new workers are made
    server.num_workers = len(server.WORKERS) if workers is None else workers
    # The reload waits until each worker is newer than those before it, which the old ones now are.
    for rank, worker in enumerate(sorted(server.WORKERS.values(), key=lambda worker: worker.age), 1):
        worker.age = server.worker_age + rank


def restore_workers(server: Any) -> None:
    """Undo in a new worker what `keep_old_workers` set: the application sees it as ``wsgi.multiprocess``."""
    if not server.cfg.workers:
        server.cfg.set("workers", server.num_workers)


def make_newer_workers(server: Any) -> None:
    """Have the workers to come be newer than all there are, also after `keep_old_workers`."""
    server.worker_age = max([server.worker_age, *(worker.age for worker in server.WORKERS.values())])
