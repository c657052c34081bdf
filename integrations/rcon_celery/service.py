"""The executor's side: run the code of one task after the other, each with the same process state."""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # `signal` converts what it returns to enums
import concurrent.futures.thread
import os
import signal
import sys
import threading
import time
import traceback
import types
from collections.abc import Callable, Mapping
from typing import Any, Final

from celery._state import _task_stack
from celery.app.task import Task
from celery.exceptions import Ignore, Reject, Retry, SoftTimeLimitExceeded

from rcon_celery import child_processes, codec, contexts, results, task_annotations, wire
from rcon_celery.decoding_cost import TooCostly
from rcon_celery.handlers import Ended, Handlers
from rcon_celery.results import BackendTraits
from rcon_celery.task_annotations import TaskCode
from rcon_plugins.errors import ResultTooLarge, SoftMemoryLimitExceeded
from rcon_plugins.executors.channel import Channel, ChannelClosed, Frame
from rcon_plugins.executors.executor import SOFT_MEMORY, SOFT_TIME
from rcon_plugins.executors.records import RecordLog

_OWN_FILES: Final = frozenset({__file__, task_annotations.__file__})
_THREAD_POOL: Final = concurrent.futures.thread.__file__
#: Exceptions that end the executor process: the pool's process is gone, or the task has ended the process.
_ENDS_THE_PROCESS: Final = (ChannelClosed, SystemExit, KeyboardInterrupt)

#: How a task ended, the text of the answer, and its payload.
_Answer = tuple[wire.How, str, tuple[wire.Payload, bytes]]


class TaskService:
    """Serves the tasks of an application in executor processes; pass it to `Deployment.start`."""

    def __init__(
        self,
        app: Any,
        codes: Mapping[str, TaskCode],
        hostname: str,
        handlers: Handlers,
        records: RecordLog,
        *,
        greenlets: bool,
    ) -> None:
        """``codes`` are by the name of the task; ``greenlets``: the worker runs gevent's loop.

        ``handlers`` are those of Celery's signals. ``records`` is the log of the worker.
        """
        self._greenlets = greenlets
        self._celery_handlers = handlers
        self._records = records
        #: Sends the signal that a pool's process sends at its end; None if it has no handlers.
        self.end_process = self._end if handlers.end_processes() else None
        # Look them up before the fork: in a new process, making a backend takes longer than the rest of its first task,
        # and the user of a policy may not be able to make it.
        self._backend = results.traits_of(app)
        contexts.carried()  # imports modules of the libraries that are loaded, which takes as long
        self._app = app
        self._codes = codes
        self._hostname = hostname
        #: The name of the task whose code is running.
        self._task: str | None = None
        #: The soft limit that was reached before the code of the task began.
        self._early: Exception | None = None
        self._handlers = {SOFT_TIME: self._soft_time_reached, SOFT_MEMORY: self._soft_memory_reached}
        #: The state in which each task finds the process; None before the first.
        self._state: ProcessState | None = None

    def __call__(self, channel: Channel, frame: Frame) -> None:
        """Run one task, whose head is in ``frame``, and send the answer."""
        if self._state is None:
            self._begin()
            self._state = ProcessState(self._handlers)
        self._state.restore()
        head, data = wire.receive_task(channel, frame)
        self._records.work = head.number.hex()
        content = codec.decode_trusted(head.payload, data)
        task = self._app.tasks[head.name]
        threads_before = set(threading.enumerate())
        try:
            how, text, (payload, answer) = self._run(task, content, head.max_result)
        finally:
            if not head.leave_children:
                child_processes.remove_folders()
        busy = threads_left(threads_before)
        wire.send(channel, wire.ANSWER, wire.AnswerHead(head.number, how, text, payload, busy), answer)

    def install_signal_handlers(self) -> None:
        """Handle the signals of soft limits. Called in each new executor process."""
        for number, handler in self._handlers.items():
            _signal.signal(number, handler)

    def _soft_time_reached(self, *_: object) -> None:
        self._raise_in_task(SoftTimeLimitExceeded())

    def _soft_memory_reached(self, *_: object) -> None:
        message = (
            f"{self._task or 'a task'}: memory_soft reached; return before the memory limit kills the task"
        )
        self._raise_in_task(SoftMemoryLimitExceeded(message, limit="each.memory_soft"))

    def _raise_in_task(self, error: Exception) -> None:
        if self._task is not None:
            raise error
        # Keep it for the code of the task, which has not begun. If it came too late, this process serves no other task.
        self._early = error

    def _begin(self) -> None:
        """Send the signal that a pool's process sends at its start, so that its handlers set up this process, too."""
        if self._greenlets:
            time.sleep(0.001)  # gevent closes files when its loop runs
        child_processes.allow()
        self._celery_handlers.start_process(self._hostname)

    def _end(self) -> None:
        """Send the signal that a pool's process sends at its end. A process that served no task has not begun."""
        if self._state is not None:
            self._celery_handlers.end_process(self._hostname, os.getpid())

    def _backend_of(self, task: Any) -> BackendTraits:
        """Return the traits of the task's result backend."""
        has_own = type(task).backend is not Task.backend or vars(task).get("_backend") is not None
        return BackendTraits.of(task.backend) if has_own or self._backend is None else self._backend

    def _run(self, task: Any, content: Mapping[str, Any], max_result: int) -> _Answer:
        """Run the task, with the handlers beside it; return the fields of its answer."""
        args, kwargs = content["args"], content["kwargs"]
        _task_stack.push(task)
        task.push_request(content["request"], args=args, kwargs=kwargs, called_directly=False)
        request = task.request_stack.top
        request.headers = content["request"].get("headers")  # Celery replaces headers that it does not know
        task_annotations.begin(request)
        vars(task).pop("run", None)  # the wrapper for autoretry_for is used in the pool's process
        try:
            with (
                contexts.entered(content["contexts"]),
                self._celery_handlers.beside(task, args, kwargs) as ended,
            ):
                return self._answer(task, args, kwargs, max_result, ended)
        finally:
            task.pop_request()
            _task_stack.pop()

    def _answer(self, task: Any, args: Any, kwargs: Any, max_result: int, ended: Ended) -> _Answer:
        """Run the body of the task; return an answer that the pool's process takes."""
        try:
            how, text, encoded = self._encoded(task, args, kwargs, max_result, ended)
            refused = codec.why_refused(how, *encoded, max_result)
        except TooCostly as error:
            refused = ("too costly", str(error))
        if refused is None:
            return how, text, encoded
        ended.by(ResultTooLarge(f"{task.name}: its result is {refused[0]}: {refused[1]}"))
        return *refused, codec.encode_no_result(task, self._backend_of(task).serializer)

    def _encoded(self, task: Any, args: Any, kwargs: Any, max_result: int, ended: Ended) -> _Answer:
        """Run the body of the task; return an answer, which may be too large. Raises `TooCostly`."""
        request, backend = task.request_stack.top, self._backend_of(task)
        serializer = backend.serializer
        try:
            result = self._execute(task, args, kwargs)
            ended.with_result(result)
        except _ENDS_THE_PROCESS:
            raise
        except Retry as error:
            ended.by(error)
            return "retry", "", codec.encode_predicate(task, error, request.children, serializer)
        except Reject as error:
            ended.by(error)
            return "reject", "", codec.encode_predicate(task, error, request.children, serializer)
        except Ignore as error:
            ended.by(error)
            return "ignore", "", codec.encode_predicate(task, error, request.children, serializer)
        except BaseException as error:  # noqa: BLE001 - send any exception of the task to the pool's process
            ended.by(error)
            frames = _frames_of_task(error.__traceback__)
            text = wire.shortened("".join(traceback.format_exception(type(error), error, frames)))
            return "error", text, codec.encode_exception(error, request.children, serializer)
        try:
            payload, answer = codec.encode_result(task, result, request.children, serializer)
            is_ignored = codec.is_ignored(task, request, is_disabled=backend.is_disabled)
            if not is_ignored or not codec.why_refused("ok", payload, answer, max_result):
                return "ok", "", (payload, answer)
            encoded = codec.encode_no_result(task, serializer)
        except TooCostly:
            raise
        except Exception as error:  # noqa: BLE001 - serializers raise what they like
            encoded = codec.encode_exception(error, [], serializer)
            if not codec.is_ignored(task, request, is_disabled=backend.is_disabled):
                ended.by(error)
        return "unencodable", wire.shortened(codec.safe_repr(result)), encoded

    def _execute(self, task: Any, args: Any, kwargs: Any) -> Any:
        """Run the code of the task. Only here the signal of a soft limit raises an exception."""
        try:
            self._task = task.name
            if self._early is not None:
                raise self._early
            return self._codes[task.name].execute(task, args, kwargs)
        finally:
            self._task = None


class ProcessState:
    """The working directory, umask, signal mask, alarm and some signal handlers of this process, to be restored.

    Everything else that a task changes stays, as in a process of Celery's own pool: environment, handlers of other
    signals, imported modules, open files.
    """

    def __init__(self, handlers: Mapping[signal.Signals, Callable[..., object]]) -> None:
        """Note the state as it is now. ``handlers`` are the signal handlers to restore."""
        self._handlers = handlers
        self._directory = _working_directory()
        self._umask = os.umask(0o777)
        os.umask(self._umask)
        self._mask = _signal.pthread_sigmask(_signal.SIG_BLOCK, ())
        self._alarm = signal.getitimer(signal.ITIMER_REAL) != (0.0, 0.0)

    def restore(self) -> None:
        """Restore the state. This takes microseconds. Call it in the main thread."""
        os.umask(self._umask)
        if _working_directory() != self._directory:
            try:
                os.chdir(self._directory or "/")
            except OSError:  # it was removed, or this user may not enter it
                os.chdir("/")
        if not self._alarm:
            signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in self._handlers.items():
            if _signal.getsignal(number) is not handler:
                _signal.signal(number, handler)
        _signal.pthread_sigmask(_signal.SIG_SETMASK, self._mask)


def threads_left(before: set[threading.Thread]) -> bool:
    """Return whether there are new threads that Python would wait for at its exit.

    Daemon threads and idle threads of a `ThreadPoolExecutor` do not count: libraries keep both for the next task.
    """
    if threading.active_count() == 1:
        return False
    new = [thread for thread in set(threading.enumerate()) - before if not thread.daemon]
    if not new:
        return False
    frames = sys._current_frames()  # noqa: SLF001 - documented
    return any(not _waits_in_pool(frames.get(thread.ident or 0)) for thread in new)


def _waits_in_pool(frame: types.FrameType | None) -> bool:
    """Return whether the innermost frame of a thread belongs to the standard library's thread pool."""
    return frame is not None and frame.f_code.co_filename == _THREAD_POOL


def _working_directory() -> str | None:
    """Return the working directory; None if it was removed."""
    try:
        return os.getcwd()  # noqa: PTH109 - before each task, and pathlib is slow
    except OSError:
        return None


def _frames_of_task(trace: types.TracebackType | None) -> types.TracebackType | None:
    """Return a traceback without its first frames, which belong to this package."""
    while trace is not None and trace.tb_next is not None and trace.tb_frame.f_code.co_filename in _OWN_FILES:
        trace = trace.tb_next
    return trace
