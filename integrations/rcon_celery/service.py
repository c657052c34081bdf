"""The executor's side: runs the body of one task after the other."""

from __future__ import annotations

import signal
import time
import traceback
import types
from collections.abc import Mapping
from typing import Any, Final

from celery import signals
from celery._state import _task_stack
from celery.app.task import Task
from celery.exceptions import Ignore, Reject, Retry, SoftTimeLimitExceeded

from rcon_celery import codec, place, results, task_annotations, threads, wire
from rcon_celery.process_state import ProcessState
from rcon_celery.task_annotations import Body, perform
from rcon_plugins.errors import SoftMemoryLimitExceeded
from rcon_plugins.executors.channel import Channel, ChannelClosed, Frame
from rcon_plugins.executors.executor import SOFT_MEMORY, SOFT_TIME

_OURS: Final = frozenset({__file__, task_annotations.__file__})
#: These end the executor process: its host is gone, or the task asked the process to end.
_ENDS_THE_PROCESS: Final = (ChannelClosed, SystemExit, KeyboardInterrupt)


class TaskService:
    """Serves the tasks of an application in executor processes; give it to `Manager.start`."""

    def __init__(self, app: Any, bodies: Mapping[str, Body], hostname: str, *, greenlets: bool) -> None:
        """``greenlets``: the worker has a loop of gevent's."""
        self._greenlets = greenlets
        # Known here, for it takes a new process longer to make a backend than all else of its first task.
        self._serializer = results.serializer_of(app)
        self._app = app
        self._bodies = bodies
        self._hostname = hostname
        #: The task whose body runs now.
        self._task: str | None = None
        #: What it is to be told when it begins.
        self._early: Exception | None = None
        self._handlers = {SOFT_TIME: self._notice_time, SOFT_MEMORY: self._notice_memory}
        #: What each task finds; None before the first.
        self._ground: ProcessState | None = None

    def __call__(self, channel: Channel, frame: Frame) -> None:
        """Run one task; ``frame`` is its first. Returns when its answer is sent."""
        if self._ground is None:
            self._begin()
            self._ground = ProcessState(self._handlers)
        self._ground.restore()
        head = wire.decode_task(frame)
        payload = wire.receive_body(channel, head.body.size)
        order = codec.decode(head.body, payload, {head.body.content_type})
        task = self._app.tasks[head.name]
        before = threads.alive()
        how, text, (body, answer) = self._perform(task, order, head.longest)
        if len(answer) > head.longest:
            nothing = codec.encode_nothing(task, self._serializer_of(task))
            how, text, (body, answer) = "too long", str(len(answer)), nothing
        busy = threads.go_on(before)
        wire.send(channel, wire.ANSWER, wire.AnswerHead(head.number, how, text, body, busy), answer)

    def expect_notices(self) -> None:
        """In a new executor process: what the signals mean that its host sends it."""
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _notice_time(self, *_: object) -> None:
        self._notice(SoftTimeLimitExceeded())

    def _notice_memory(self, *_: object) -> None:
        told = f"{self._task or 'a task'}: its memory is nearly used up"
        self._notice(SoftMemoryLimitExceeded(told, limit="each.memory_soft"))

    def _notice(self, what: Exception) -> None:
        if self._task is not None:
            raise what
        # Before its body begins, for which it is kept; or after its end: a process that was told serves no other.
        self._early = what

    def _begin(self) -> None:
        """What a pool's process does when it starts: connections that are made then belong to one process."""
        place.become_executor()
        if self._greenlets:
            time.sleep(0.001)  # gevent closes files when its loop gets its turn
        signals.worker_process_init.send(sender=self._hostname)

    def _serializer_of(self, task: Any) -> str:
        """That of its result backend."""
        has_own = type(task).backend is not Task.backend or vars(task).get("_backend") is not None
        return str(task.backend.serializer) if has_own or self._serializer is None else self._serializer

    def _perform(
        self, task: Any, order: Mapping[str, Any], longest: int
    ) -> tuple[wire.How, str, tuple[wire.Body, bytes]]:
        args, kwargs = order["args"], order["kwargs"]
        _task_stack.push(task)
        task.push_request(order["request"], args=args, kwargs=kwargs, called_directly=False)
        request = task.request_stack.top
        request.headers = order["request"].get("headers")  # not what Celery makes of what it does not know
        task_annotations.begin(request)
        serializer = self._serializer_of(task)
        vars(task).pop("run", None)  # what autoretry_for puts around it does its part in the host
        try:
            try:
                try:
                    self._task = task.name
                    if self._early is not None:
                        raise self._early
                    result = perform(task, self._bodies[task.name], args, kwargs)
                finally:
                    self._task = None
            except _ENDS_THE_PROCESS:
                raise
            except Retry as error:
                return "retry", "", codec.encode_predicate(task, error, request.children, serializer)
            except Reject as error:
                return "reject", "", codec.encode_predicate(task, error, request.children, serializer)
            except Ignore as error:
                return "ignore", "", codec.encode_predicate(task, error, request.children, serializer)
            except BaseException as error:  # noqa: BLE001 - whatever the task raised belongs to its host
                text = "".join(
                    traceback.format_exception(type(error), error, _of_the_task(error.__traceback__))
                )
                return (
                    "error",
                    wire.shortened(text),
                    codec.encode_exception(error, request.children, serializer),
                )
            try:
                body, answer = codec.encode_result(task, result, request.children, serializer)
                if len(answer) <= longest or not codec.is_ignored(task, request):
                    return "ok", "", (body, answer)
                return (
                    "unencodable",
                    wire.shortened(codec.safe_repr(result)),
                    codec.encode_nothing(task, serializer),
                )
            except Exception as error:  # noqa: BLE001 - serializers raise what they like
                return (
                    "unencodable",
                    wire.shortened(codec.safe_repr(result)),
                    codec.encode_exception(error, [], serializer),
                )
        finally:
            task.pop_request()
            _task_stack.pop()


def _of_the_task(trace: types.TracebackType | None) -> types.TracebackType | None:
    """A traceback without the frames that are ours, which come first."""
    while trace is not None and trace.tb_next is not None and trace.tb_frame.f_code.co_filename in _OURS:
        trace = trace.tb_next
    return trace
