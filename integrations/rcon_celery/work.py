"""A task as `Work`: what routes match, and what ``per`` takes its key from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from celery.canvas import signature

from rcon_plugins.errors import ConfinementError
from rcon_plugins.work import Work

#: Celery's own tasks that run the bodies of others, in the process they are in themselves.
_RUN_OTHERS: Final = frozenset({"celery.map", "celery.starmap"})
_OWN: Final = "celery.app.builtins"


def is_own(cls: Any) -> bool:
    """Whether a task is a part of Celery itself that only sends others off, or looks after them."""
    return str(cls.__module__) == _OWN and cls.name not in _RUN_OTHERS


def work_of(task: Any, args: Any, kwargs: Any) -> Work:
    """The work that a task is, by its request. Raises `ConfinementError` where nobody can say what it would run."""
    name = task.name
    if name in _RUN_OTHERS:
        name = _mapped(task.app, kwargs.get("task", args[0] if args else None))
    attributes = {"task": name}
    queue = _queue(task.app, task.request.delivery_info or {})
    if queue:
        attributes["queue"] = queue
    return Work("task", name, attributes)


def _mapped(app: Any, inner: object) -> str:
    """The name of the task whose body is run for each item, found as Celery finds it: what was sent may be a name, or
    say another than it comes to. Raises what Celery would, and `ConfinementError`.
    """
    name = str(signature(inner, app=app).type.name)
    if name in _RUN_OTHERS:
        raise ConfinementError(
            f"{name} inside of another would run tasks that nobody has named; map the task itself"
        )
    return name


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
