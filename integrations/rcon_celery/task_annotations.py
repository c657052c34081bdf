"""Make the code of a task run in another process, with the setting ``task_annotations`` alone.

Celery sets annotations as attributes of a task's class when it binds the task. This package annotates ``__call__``,
which the worker calls if a class defines it, and ``run``, the code itself, which ``autoretry_for`` wraps. So the
worker's process decides about a retry, after a death as after an exception. An application's own ``__call__`` runs in
the process that runs the code, because it prepares that process.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from celery.app.annotations import prepare
from celery.app.task import Task
from celery.utils.functional import firstmethod

from rcon_plugins.errors import ConfinementError

#: The attribute of a task's request that holds one of the two objects below. A message can set an attribute of this
#: name, but not to these objects.
STAGE = "rcon_stage"
_CONFINE_NEXT, _BEGUN = object(), object()

_first = firstmethod("annotate")
_first_any = firstmethod("annotate_any")


class TaskCode(NamedTuple):
    """The code of a task without this package: its class's own ``__call__``, if it defines one, and its ``run``."""

    call: Callable[..., Any] | None
    run: Callable[..., Any]

    def execute(self, task: Any, args: Any, kwargs: Any) -> Any:
        """Run the code in this thread, as the worker would. The task's request must be set."""
        if self.call is not None:
            return self.call(task, *args, **kwargs)
        return self.run.__get__(task, type(task))(*args, **kwargs)


class Runner(Protocol):
    """Confines the tasks of this process."""

    def run(self, task: Any, code: TaskCode, args: Any, kwargs: Any) -> Any:
        """Run the code of a task confined; return its result or raise its exception."""


class Host(Protocol):
    """The installation that makes the annotations."""

    @property
    def runner(self) -> Runner | None:
        """The runner of this process; None outside of workers and in executor processes, which are confined already."""

    def register(self, cls: type, code: TaskCode) -> bool:
        """Note the class and code of a task; return False for a task that is never confined."""

    def request_class(self, own: object) -> type:
        """Return the class of the requests of a task, made from its own."""


class Annotations:
    """The application's own annotations, together with those of this package."""

    def __init__(self, own: object, host: Host) -> None:
        self._own = prepare(own)
        self._host = host

    def annotate(self, cls: Any) -> dict[str, Any] | None:
        """Return the attributes to set on a task's class."""
        found: dict[str, Any] = dict(_first(self._own, cls) or {})
        code = _code_of(cls, {**found, **dict(self.annotate_any() or {})})
        if self._host.register(cls, code):
            found |= {"__call__": _call(self._host, code), "run": _run(self._host, cls, code)}
            found["Request"] = self._host.request_class(found.get("Request") or cls.Request)
        return found or None

    def annotate_any(self) -> dict[str, Any] | None:
        """Return the attributes that the application sets on every task."""
        found: dict[str, Any] | None = _first_any(self._own)
        if found is not None:
            found = {name: value for name, value in dict(found).items() if name not in ("__call__", "run")}
        return found


def begin(request: Any) -> None:
    """Note that the code of the task with this request runs. A task that it calls runs as a part of it."""
    vars(request)[STAGE] = _BEGUN


def _code_of(cls: Any, annotations: dict[str, Any]) -> TaskCode:
    call = annotations.get("__call__")
    if call is None:
        owner = next(base for base in cls.__mro__ if "__call__" in vars(base))
        call = None if owner is Task else vars(owner)["__call__"]
    run = annotations.get("run") or inspect.getattr_static(cls, "run")
    return TaskCode(call, run)


def _call(host: Host, code: TaskCode) -> Callable[..., Any]:
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N807 - it becomes the method of that name
        request = self.request_stack.top
        traced = request is not None and not request.called_directly
        stage = vars(request).get(STAGE) if traced else _BEGUN
        if stage is _CONFINE_NEXT or stage is _BEGUN:
            return (code.call or Task.__call__)(self, *args, **kwargs)
        if host.runner is not None and not request.is_eager:
            vars(request)[STAGE] = _CONFINE_NEXT
            return self.run(*args, **kwargs)
        begin(request)
        return code.call(self, *args, **kwargs) if code.call is not None else self.run(*args, **kwargs)

    return __call__


def _run(host: Host, cls: Any, code: TaskCode) -> Any:
    @functools.wraps(code.run)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        request = self.request_stack.top
        if request is None or vars(request).get(STAGE) is not _CONFINE_NEXT:
            return code.run.__get__(self, type(self))(*args, **kwargs)
        if host.runner is None:
            raise ConfinementError(f"{self.name}: this process cannot confine tasks any more")
        vars(request)[STAGE] = _BEGUN
        return host.runner.run(self, code, args, kwargs)

    if not isinstance(code.run, staticmethod):
        return run

    @functools.wraps(code.run)
    def run_static(*args: Any, **kwargs: Any) -> Any:
        return run(cls.app.tasks[cls.name], *args, **kwargs)

    return staticmethod(run_static)
