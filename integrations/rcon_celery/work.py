"""A task as `Work`: what routes match, and what ``per`` takes its key from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from rcon_plugins.work import Work

#: Celery's own tasks that run the bodies of others, in the process they are in themselves.
_RUN_OTHERS: Final = frozenset({"celery.map", "celery.starmap"})
_OWN: Final = "celery.app.builtins"


def is_own(cls: Any) -> bool:
    """Whether a task is a part of Celery itself that only sends others off, or looks after them."""
    return str(cls.__module__) == _OWN and cls.name not in _RUN_OTHERS


def work_of(task: Any, args: Any, kwargs: Any) -> Work:
    """The work that a task is, by its request."""
    name = task.name
    if name in _RUN_OTHERS:
        inner = kwargs.get("task", args[0] if args else None)
        name = inner.get("task", name) if isinstance(inner, Mapping) else name
    attributes = {"task": name}
    queue = _queue(task.app, task.request.delivery_info or {})
    if queue:
        attributes["queue"] = queue
    return Work("task", name, attributes)


def _queue(app: Any, delivery: Mapping[str, Any]) -> str | None:
    """The queue that a message came from. What is delivered says where it was sent to."""
    exchange, key = delivery.get("exchange") or "", delivery.get("routing_key")
    queues: Mapping[str, Any] = app.amqp.queues
    if not exchange and key in queues:
        return str(key)
    for name, queue in queues.items():
        if queue.routing_key == key and (queue.exchange is None or queue.exchange.name == exchange):
            return str(name)
    return str(key) if key else None
