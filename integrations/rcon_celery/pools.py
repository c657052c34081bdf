"""Which of Celery's pools can be confined, and what of them decides how."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from rcon_plugins.confinement.isolation import Server


class Pool(NamedTuple):
    """``children``: tasks run in processes that the pool makes, and each of these has a manager of its own."""

    server: Server
    children: bool = False

    @property
    def alone(self) -> bool:
        """Whether the process that runs a task does nothing else meanwhile, so that it can be forked."""
        return not self.server.threads and not self.server.greenlets


_KNOWN = {
    "celery.concurrency.prefork.TaskPool": Pool(Server(threads=False, tasks=True), children=True),
    "celery.concurrency.solo.TaskPool": Pool(Server(threads=False, tasks=True)),
    "celery.concurrency.thread.TaskPool": Pool(Server(threads=True, tasks=True)),
    "celery.concurrency.gevent.TaskPool": Pool(Server(threads=False, greenlets=True, tasks=True)),
}


def pool_of(pool_class: Any) -> Pool | None:
    """What is known of a pool's class, or None where its tasks cannot be confined. Subclasses count."""
    for base in pool_class.__mro__:
        known = _KNOWN.get(f"{base.__module__}.{base.__qualname__}")
        if known is not None:
            return known
    return None


def refusal(pool_class: Any) -> str:
    """Why the tasks of this pool cannot be confined, and what to use instead."""
    name = f"{pool_class.__module__}.{pool_class.__qualname__}"
    reason = (
        "eventlet's loop does not survive the forks that make executor processes"
        if ".eventlet" in name
        else "nothing is known of how it runs tasks"
    )
    return f"the pool {name} cannot be confined: {reason}; use prefork, threads, solo or gevent (-P prefork)"


def after_fork(pool: Pool) -> list[Callable[[], object]]:
    """What has to be renewed in an executor process forked from a worker with this pool."""
    if not pool.server.greenlets:
        return []
    import gevent  # type: ignore[import-untyped]

    return [gevent.reinit]  # else its event loop and threads are those of the worker
