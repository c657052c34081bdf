"""Divide the handlers of Celery's signals between the pool's process and the process that runs the body of a task.

Plain Celery runs a handler of ``task_prerun`` in the process and thread that then run the body, so handlers prepare
both: they open or close connections, choose a tenant's schema, bind a context. A confined body has a process of its
own. So each handler has a **side**:

========= ===================================================================
side      where it runs
========= ===================================================================
"inside"  beside the body: in the executor process, or in the thread that runs the body
"outside" in the pool's process, where Celery runs it
"both"    in both, each time once
========= ===================================================================

A handler with a side of its own (`handler_side`, ``handler_sides`` of `install`) runs there. Of the others, handlers of
``task_prerun`` and ``task_postrun`` run inside, and handlers of ``worker_process_init`` and ``worker_process_shutdown``
on both sides. `LIBRARIES` lists the libraries whose handlers of tasks run elsewhere.

Celery sends the signals of a task itself. So this module puts a `_Sided` in the place of each handler in Celery's list
of handlers, which leaves it out where it does not run. Celery still calls it, and logs what it raises.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final, Literal, Protocol, TypeVar, get_args

from celery import signals, states
from celery.exceptions import Ignore, Reject, Retry

from rcon_plugins.errors import SettingsError

Side = Literal["inside", "outside", "both"]
_F = TypeVar("_F", bound=Callable[..., Any])

#: The sides of handlers of ``task_prerun`` and ``task_postrun``, by the library that they belong to.
LIBRARIES: Final[Mapping[str, Side]] = {
    # Connections to databases: those of the body, and those of a result backend that uses Django's.
    "celery.fixups": "both",
    # The schema of the tenant: for the body, and for a result backend whose table is in it.
    "tenant_schemas_celery": "both",
    # They measure the task from its start to its end, also if it is killed. Their context goes to the body.
    "opentelemetry": "outside",
    "ddtrace": "outside",
    "django_structlog": "outside",
}
_TASK_SIGNALS: Final = (signals.task_prerun, signals.task_postrun)
_PROCESS_SIGNALS: Final = (signals.worker_process_init, signals.worker_process_shutdown)

#: The attribute of a handler that holds its side.
_SIDE: Final = "__rcon_side__"
#: The attribute of a task's request that holds one of the objects below. A message can set an attribute of this name,
#: but not to these objects.
PROGRESS: Final = "rcon_handlers"
#: Celery has sent ``task_prerun``; the handlers beside the body have not run.
_WAITING: Final = object()
#: The handlers beside the body run.
_BEGUN: Final = object()
#: The handlers beside the body have run, also those of ``task_postrun``.
_DONE: Final = object()


def handler_side(side: Side) -> Callable[[_F], _F]:
    """Choose where a handler of a signal of Celery runs: "inside", "outside" or "both".

    "inside" is the executor process, beside the body of the task; "outside" is the pool's process. It holds for
    handlers of ``task_prerun``, ``task_postrun``, ``worker_process_init`` and ``worker_process_shutdown``. Put it below
    ``connect``::

        @task_prerun.connect
        @handler_side("outside")
        def count(task_id, **kwargs): ...

    Raises `SettingsError` for another word.
    """
    _check(side, "handler_side")

    def mark(handler: _F) -> _F:
        setattr(handler, _SIDE, side)
        return handler

    return mark


class Confines(Protocol):
    """The installation whose tasks are confined."""

    def confines(self, task: Any) -> bool:
        """Return whether this process passes the body of the task on, to where its handlers run."""


class Handlers:
    """The handlers of one application's signals, with the side of each."""

    def __init__(self, host: Confines, sides: Mapping[str, Side]) -> None:
        """``sides`` are chosen by the name of a module, or of a package that holds it.

        Raises `SettingsError` for a word that is no side.
        """
        for module, side in sides.items():
            _check(side, f"handler_sides[{module!r}]")
        self._host = host
        self._sides = sides
        self._here = threading.local()

    def divide(self) -> None:
        """Have each handler that is connected run on its side only. Call it again when others may be connected."""
        for signal in (*_TASK_SIGNALS, *_PROCESS_SIGNALS):
            with signal.lock:
                for number, (key, receiver) in enumerate(signal.receivers):
                    if not isinstance(receiver, _Sided):
                        signal.receivers[number] = (key, _Sided(receiver, self._side(signal, receiver), self))

    @contextlib.contextmanager
    def beside(self, task: Any, args: Any, kwargs: Any, *, outside_too: bool = False) -> Iterator[Ended]:
        """Run the handlers of ``task_prerun`` before the ``with`` block, and those of ``task_postrun`` after it.

        Call it in the thread that runs the body. ``outside_too``: Celery has run the handlers "outside" and "both" in
        this thread. Say in the block how the body ended.
        """
        ended = Ended(task)
        named = {"sender": task, "task_id": task.request.id, "task": task, "args": args, "kwargs": kwargs}
        self._send(signals.task_prerun, outside_too=outside_too, **named)
        try:
            yield ended
        finally:
            self._send(
                signals.task_postrun, outside_too=outside_too, **named, retval=ended.retval, state=ended.state
            )

    def call(self, task: Any, args: Any, kwargs: Any, body: Callable[[], Any], *, outside_too: bool) -> Any:
        """Run a body with the handlers beside it, in this thread of the pool's process."""
        begin(task.request)
        try:
            with self.beside(task, args, kwargs, outside_too=outside_too) as ended:
                try:
                    value = body()
                except BaseException as error:
                    ended.by(error)
                    raise
                ended.with_result(value)
                return value
        finally:
            finish(task.request)

    def start_process(self, hostname: str) -> None:
        """Send ``worker_process_init`` in an executor process."""
        # Most often no handler runs there. To find that out by sending costs a new process copies of some 40 pages.
        if any(
            not isinstance(receiver, _Sided) or receiver.side != "outside"
            for _, receiver in signals.worker_process_init.receivers
        ):
            self._send(signals.worker_process_init, sender=hostname)
        # Some of these handlers connect others: those inside just now, those outside before the fork server was forked.
        self.divide()

    def end_process(self, hostname: str, pid: int) -> None:
        """Send ``worker_process_shutdown`` in an executor process that ends."""
        self._send(signals.worker_process_shutdown, sender=hostname, pid=pid, exitcode=0)

    def end_processes(self) -> bool:
        """Return whether a handler of ``worker_process_shutdown`` runs in executor processes."""
        return any(
            receiver.side != "outside" and not receiver.is_ours
            for _, receiver in list(signals.worker_process_shutdown.receivers)
            if isinstance(receiver, _Sided)
        )

    def is_turn(self, side: Side, signal: Any, sender: Any) -> bool:
        """Return whether a handler of this side runs now, where the signal is being sent."""
        here = getattr(self._here, "outside_too", None)
        if here is not None:
            return side == "inside" if here else side != "outside"
        if side != "inside":
            return True
        if signal in _PROCESS_SIGNALS:
            return False
        request = vars(sender.request)
        progress = request.get(PROGRESS)
        if signal is signals.task_prerun:
            if not self._host.confines(sender):
                return True  # the body runs here, and nobody else calls its handlers
            request[PROGRESS] = _WAITING
            return False
        # A task that was killed has not run them.
        return progress is not _WAITING and progress is not _DONE

    def _send(self, celery_signal: Any, *, outside_too: bool = False, **named: Any) -> None:
        """Send a signal, here, to the handlers beside the body. Celery logs their exceptions."""
        self._here.outside_too = outside_too
        try:
            celery_signal.send(**named)
        finally:
            self._here.outside_too = None

    def _side(self, signal: Any, receiver: Any) -> Side:
        handler = receiver() if isinstance(receiver, weakref.ReferenceType) else receiver
        while isinstance(handler, functools.partial):
            handler = handler.func
        side: Side | None = getattr(handler, _SIDE, None)
        if side is not None:
            return side
        function = getattr(handler, "__func__", handler)
        module = str(getattr(function, "__module__", None) or type(function).__module__)
        chosen = _of_module(self._sides, module)
        if chosen is not None:
            return chosen
        if signal in _PROCESS_SIGNALS:
            return "both"
        return _of_module(LIBRARIES, module) or "inside"


class Ended:
    """How a body ended, in the words of ``task_postrun``: ``state`` and ``retval``. None if that is unknown."""

    def __init__(self, task: Any) -> None:
        self._task = task
        self.state: str | None = None
        self.retval: Any = None

    def with_result(self, value: Any) -> None:
        """Note that it returned this."""
        self.state, self.retval = states.SUCCESS, value

    def by(self, error: BaseException) -> None:
        """Note that it raised this."""
        if isinstance(error, Retry):
            self.state, self.retval = states.RETRY, error
        elif isinstance(error, Reject):
            self.state, self.retval = states.REJECTED, error
        elif isinstance(error, Ignore):
            self.state, self.retval = states.IGNORED, error
        elif isinstance(error, Exception):
            if _is_retried(self._task, error):
                self.state, self.retval = states.RETRY, Retry(exc=error)
            else:
                self.state, self.retval = states.FAILURE, error


class _Sided:
    """Runs a handler of a signal where that is its turn. It takes the handler's place in Celery's list."""

    def __init__(self, receiver: Any, side: Side, handlers: Handlers) -> None:
        """``receiver`` is the handler, or a weak reference to it."""
        self._receiver = receiver
        self.side = side
        self._handlers = handlers

    @property
    def _handler(self) -> Any:
        weak = isinstance(self._receiver, weakref.ReferenceType)
        return self._receiver() if weak else self._receiver

    @property
    def is_ours(self) -> bool:
        """Whether the handler belongs to this package."""
        function = getattr(self._handler, "__func__", self._handler)
        return str(getattr(function, "__module__", "")).partition(".")[0] == __name__.partition(".")[0]

    def __call__(self, signal: Any, sender: Any, **named: Any) -> Any:
        handler = self._handler
        if handler is None or not self._handlers.is_turn(self.side, signal, sender):
            return None
        return handler(signal=signal, sender=sender, **named)

    def __repr__(self) -> str:
        return repr(self._handler)


def begin(request: Any) -> None:
    """Note that the handlers beside the body of this request's task run from now on."""
    vars(request)[PROGRESS] = _BEGUN


def finish(request: Any) -> None:
    """Note that the handlers beside the body of this request's task have all run."""
    vars(request)[PROGRESS] = _DONE


def _of_module(sides: Mapping[str, Side], module: str) -> Side | None:
    """Return the side of a module, or of the innermost package that has one."""
    while module:
        if module in sides:
            return sides[module]
        module = module.rpartition(".")[0]
    return None


def _check(side: str, key: str) -> None:
    if side not in get_args(Side):
        raise SettingsError(
            f"{side!r} is no side of a handler",
            key=key,
            hint=f"one of: {', '.join(map(repr, get_args(Side)))}",
        )


def _is_retried(task: Any, error: Exception) -> bool:
    """Return whether ``autoretry_for`` makes a retry of this exception, which the pool's process does afterwards."""
    if not isinstance(error, tuple(getattr(task, "autoretry_for", ()))) or isinstance(
        error, tuple(getattr(task, "dont_autoretry_for", ()))
    ):
        return False
    most = getattr(task, "override_max_retries", None)
    if most is None:
        most = getattr(task, "retry_kwargs", {}).get("max_retries", task.max_retries)
    return most is None or task.request.retries < most
