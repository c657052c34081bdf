"""How a task's body comes to be run elsewhere: by the setting ``task_annotations``, and nothing else.

Celery sets what annotations say on a task's class when it binds the task. Ours say ``__call__``, which is what the
worker calls where a class has one of its own, and ``run``, which is the body: also below what ``autoretry_for`` puts
around it. So a retry is decided in the worker's process, for a death as for an exception; and a ``__call__`` of the
application's own runs where the body runs, which is what it prepares for.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from celery.app.annotations import prepare
from celery.app.task import Task
from celery.utils.functional import firstmethod

#: What of us is noted on a task's request, under this name: one of the two objects below. A message can put anything
#: under any name there, but not these.
STAGE = "rcon_stage"
_HAND_OVER, _BEGUN = object(), object()

_first = firstmethod("annotate")
_first_any = firstmethod("annotate_any")


class Body(NamedTuple):
    """What a task is without us: its ``__call__``, if it has one of its own, and its ``run``."""

    call: Callable[..., Any] | None
    run: Callable[..., Any]


class Host(Protocol):
    """What the annotations need of an installation."""

    def adopt(self, cls: type, body: Body) -> bool:
        """Take note of a task's class; False where it is never confined."""

    def takes_over(self, task: Any) -> bool:
        """Whether this process is one that confines tasks."""

    def hand_over(self, task: Any, body: Body, args: Any, kwargs: Any) -> Any:
        """Run a task's body confined, and return or raise what it does."""


class Annotations:
    """The application's own annotations, and ours on top."""

    def __init__(self, theirs: object, host: Host) -> None:
        self.theirs = theirs
        self._own = prepare(theirs)
        self._host = host

    def annotate(self, cls: Any) -> dict[str, Any] | None:
        """What to set on a task's class."""
        found: dict[str, Any] = dict(_first(self._own, cls) or {})
        body = _body_of(cls, {**found, **dict(self.annotate_any() or {})})
        if self._host.adopt(cls, body):
            found |= {"__call__": _call(self._host, body), "run": _run(self._host, cls, body)}
        return found or None

    def annotate_any(self) -> dict[str, Any] | None:
        """What the application sets on every task."""
        found: dict[str, Any] | None = _first_any(self._own)
        if found is not None:
            found = {name: value for name, value in dict(found).items() if name not in ("__call__", "run")}
        return found


def _body_of(cls: Any, annotations: dict[str, Any]) -> Body:
    call = annotations.get("__call__")
    if call is None:
        owner = next(base for base in cls.__mro__ if "__call__" in vars(base))
        call = None if owner is Task else vars(owner)["__call__"]
    run = annotations.get("run") or inspect.getattr_static(cls, "run")
    return Body(call, run)


def _call(host: Host, body: Body) -> Callable[..., Any]:
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N807 - it becomes the method of that name
        request = self.request_stack.top
        traced = request is not None and not request.called_directly
        stage = vars(request).get(STAGE) if traced else _BEGUN
        if stage is _HAND_OVER or stage is _BEGUN:
            return (body.call or Task.__call__)(self, *args, **kwargs)
        # From here on a call of the task is one that its own code makes.
        begin(request)
        if host.takes_over(self):
            vars(request)[STAGE] = _HAND_OVER
            return self.run(*args, **kwargs)
        return body.call(self, *args, **kwargs) if body.call is not None else self.run(*args, **kwargs)

    return __call__


def _run(host: Host, cls: Any, body: Body) -> Any:
    def run_task(task: Any, args: Any, kwargs: Any) -> Any:
        request = task.request_stack.top
        if request is None or vars(request).get(STAGE) is not _HAND_OVER:
            return body.run.__get__(task, type(task))(*args, **kwargs)
        begin(request)
        return host.hand_over(task, body, args, kwargs)

    if isinstance(body.run, staticmethod):

        @functools.wraps(body.run)
        def run(*args: Any, **kwargs: Any) -> Any:
            return run_task(cls.app.tasks[cls.name], args, kwargs)

        return staticmethod(run)

    @functools.wraps(body.run)
    def run_bound(self: Any, *args: Any, **kwargs: Any) -> Any:
        return run_task(self, args, kwargs)

    return run_bound


def begin(request: Any) -> None:
    """Note that the body of the task with this request is under way: what its code calls is called here."""
    vars(request)[STAGE] = _BEGUN


def perform(task: Any, body: Body, args: Any, kwargs: Any) -> Any:
    """Run a task's body in this thread, as the worker would have. Its request is in place."""
    if body.call is not None:
        return body.call(task, *args, **kwargs)
    return body.run.__get__(task, type(task))(*args, **kwargs)
