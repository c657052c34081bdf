"""One call of a task, in the pool's process: its attributes for routes, and its run in an executor."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Literal, Protocol

from celery._state import _task_stack
from celery.canvas import signature
from celery.exceptions import TaskPredicate

from rcon_celery import codec, contexts, handlers, wire
from rcon_celery.results import BackendTraits
from rcon_celery.retry.attempt import after_lost_process
from rcon_plugins.errors import ConfinementError, Killed, LimitExceeded, MemoryLimitExceeded, RconError
from rcon_plugins.executors.channel import ChannelClosed, ProtocolViolation
from rcon_plugins.executors.executor import SOFT_TIME
from rcon_plugins.executors.output import escape_unprintable
from rcon_plugins.settings.units import format_size
from rcon_plugins.work import Work

if TYPE_CHECKING:
    from rcon_celery.task_annotations import TaskCode
    from rcon_plugins.confinement.admission import LocalAdmission, ProcessAdmission
    from rcon_plugins.outcome import Outcome

#: The tasks of Celery itself that call other tasks in their own process.
_CALL_OTHERS: Final = frozenset({"celery.map", "celery.starmap"})
_CELERYS_OWN: Final = "celery.app.builtins"
#: The endings of tasks that raise one of Celery's control exceptions, which are not errors.
_PREDICATES: Final = ("retry", "ignore", "reject")
#: How an answer says that the result was not sent.
_REFUSED: Final = ("too long", "too costly")
#: The most of a reason that an executor process gives, characters; the most digits of a size.
_MAX_REASON, _MAX_DIGITS = 500, 18


def is_celerys_own(cls: Any) -> bool:
    """Return whether a task belongs to Celery itself and only sends or tracks other tasks."""
    return str(cls.__module__) == _CELERYS_OWN and cls.name not in _CALL_OTHERS


def work_of(task: Any, args: Any, kwargs: Any) -> Work:
    """Return a task as a unit of work, with the attributes for routes and for the key of ``per``.

    Raises `ConfinementError` for a map of a map.
    """
    name = task.name
    if name in _CALL_OTHERS:
        name = _mapped_name(task.app, kwargs.get("task", args[0] if args else None))
    attributes = {"task": name}
    queue = _queue_of(task.app, task.request.delivery_info or {})
    if queue:
        attributes["queue"] = queue
    return Work("task", name, attributes)


def _mapped_name(app: Any, inner: object) -> str:
    """Return the name of the task that a map calls for each item, resolved as Celery does.

    Raises the exceptions that Celery would raise, and `ConfinementError`.
    """
    name = str(signature(inner, app=app).type.name)
    if name in _CALL_OTHERS:
        raise ConfinementError(
            f"a map of {name} hides which tasks it calls, and so their policies; map the task itself"
        )
    return name


def _queue_of(app: Any, delivery: Mapping[str, Any]) -> str | None:
    """Return the queue that a message came from, by the exchange and routing key that it was sent with."""
    exchange, key = delivery.get("exchange") or "", delivery.get("routing_key")
    queues: Mapping[str, Any] = app.amqp.queues
    if not exchange and key in queues:
        return str(key)
    for name, queue in queues.items():
        if queue.routing_key == key and (queue.exchange is None or queue.exchange.name == exchange):
            return str(name)
    return str(key) if key else None


class SoftTimeLimit:
    """Passes the signal of Celery's ``soft_time_limit`` on to the executor process that runs the task.

    The pool sends the signal to its own process, where Celery's handler would raise an exception. This class installs
    its handler only once, because that takes longer than passing on a task. Use it in the main thread.
    """

    def __init__(self) -> None:
        self._admission: ProcessAdmission | None = None
        self._previous: Any = None
        self._installed = False

    @contextlib.contextmanager
    def passed_to(self, admission: ProcessAdmission) -> Iterator[None]:
        """Pass the signal to this admission's executor process while the ``with`` block runs."""
        if not self._installed:
            self._previous, self._installed = signal.signal(SOFT_TIME, self._handle), True
        self._admission = admission
        try:
            yield
        finally:
            self._admission = None

    def _handle(self, number: int, frame: Any) -> None:
        admission = self._admission
        if admission is not None:
            admission.notify(SOFT_TIME)
        elif callable(self._previous):
            self._previous(number, frame)


class Host(Protocol):
    """The process that received the task."""

    #: The content types that the application reads, and the encoding of each.
    accepted: Mapping[str, str]
    #: Whether the fork server ended, and with it all executor processes.
    is_lost: bool
    #: None if the pool does not send the signal of a soft time limit.
    soft_time_limit: SoftTimeLimit | None


class UnencodableResult:
    """Stands for an ignored result that no serializer of the application can encode. Its repr is that of the result."""

    def __init__(self, text: str) -> None:
        self._text = text

    def __repr__(self) -> str:
        return self._text


def run_in_process(task: Any, admission: ProcessAdmission, args: Any, kwargs: Any, host: Host) -> Any:
    """Run the task in an executor process; return its result or raise its exception."""
    relay = host.soft_time_limit
    # The block includes `_settle`, so that a late signal does not interrupt that.
    with relay.passed_to(admission) if relay is not None else contextlib.nullcontext():
        head, answer = _exchange(task, admission, args, kwargs, host)
        return _settle(task, admission, head, answer)


def _exchange(
    task: Any, admission: ProcessAdmission, args: Any, kwargs: Any, host: Host
) -> tuple[wire.AnswerHead, dict[str, Any]]:
    """Send the task to the executor process and receive the answer."""
    number, channel, max_result = (
        os.urandom(wire.NUMBER_SIZE),
        admission.channel,
        admission.policy.result_limit,
    )
    try:
        payload, data = codec.encode_task(task, task.request, args, kwargs, host.accepted, contexts.carried())
        handlers.begin(task.request)
        admission.label_records(number, {"task_id": str(task.request.id), "task_name": task.name})
        leave_children = admission.policy.leave_children
        wire.send(
            channel, wire.TASK, wire.TaskHead(number, task.name, payload, max_result, leave_children), data
        )
        head, answered = wire.receive_answer(channel, number, max_result)
        answer = codec.decode(head.payload, answered, host.accepted)
        if not isinstance(answer, dict):
            raise ProtocolViolation("an answer that is not a mapping")
        handlers.finish(task.request)  # an executor process answers when they have run
    except ProtocolViolation as violation:
        raise _malformed(task, admission, violation) from None
    except ChannelClosed:
        outcome = admission.died()
        error = _exception_of(outcome)
        if isinstance(error, Killed) and outcome.ending != "aborted":  # which Celery itself asked for
            error = after_lost_process(task, error, with_fork_server=host.is_lost)
        raise error from None
    except BaseException as error:
        # Do not wait: a pool that ends this process gives it a tenth of a second.
        admission.abandon(codec.sentence(error))
        raise
    return head, answer


def _settle(task: Any, admission: ProcessAdmission, head: wire.AnswerHead, answer: dict[str, Any]) -> Any:
    """Finish the admission; return the task's result or raise its exception."""
    if head.busy:
        admission.leaves_threads()
    try:
        children = codec.decode_children(task.app, answer)
        value, error = _read(task, head, answer)
        refused = _refused(task, head, admission)
    except Exception as problem:  # noqa: BLE001 - an executor process may send anything
        raise _malformed(task, admission, problem) from None
    if refused is not None:
        outcome = admission.finish("result", refused)
    elif error is None or head.how in _PREDICATES:
        outcome = admission.finish("ok")
    else:
        outcome = admission.finish("error", escape_unprintable(codec.sentence(error)))
    if outcome.ending not in ("ok", "error"):
        raise _exception_of(outcome) from error
    for child in children:
        task.add_trail(child)
    if isinstance(error, MemoryError):
        # Celery ends the whole worker for a MemoryError.
        message = f"{task.name}: {codec.sentence(error)}"
        exceeded = MemoryLimitExceeded(message, policy=outcome.policy, key=outcome.key, usage=outcome.usage)
        raise exceeded.plain() from error.__cause__
    if error is not None:
        raise error
    return value


def _malformed(task: Any, admission: ProcessAdmission, error: Exception) -> Killed:
    """Kill a process that sent what no executor process sends. Return the exception of its task."""
    reason = escape_unprintable(codec.sentence(error)[:_MAX_REASON])
    admission.abort(f"answer that cannot be decoded: {reason}")
    return Killed(
        f"{task.name}: its process sent an answer that cannot be decoded, and was killed; "
        "look for code that writes to file descriptors which it did not open"
    )


def _read(task: Any, head: wire.AnswerHead, answer: dict[str, Any]) -> tuple[Any, Exception | None]:
    """Return the result and the exception of an answer."""
    if head.how == "ok":
        return codec.decode_value(task.app, answer), None
    if head.how in _REFUSED:
        return None, None
    if head.how == "unencodable":
        is_disabled = BackendTraits.of(task.backend).is_disabled
        if codec.is_ignored(task, task.request, is_disabled=is_disabled):
            return UnencodableResult(head.text), None
    if head.how in ("error", "unencodable"):
        return None, codec.decode_exception(answer["error"], head.text)
    return None, codec.decode_predicate(task, head.how, answer)


def _refused(task: Any, head: wire.AnswerHead, admission: ProcessAdmission) -> str | None:
    """Return the message for a result that was not sent, because it is too large or costs too much to decode."""
    if head.how == "too costly":
        return (
            f"{task.name}: its result costs too much to decode: {' '.join(head.text[:_MAX_REASON].split())}; "
            "return less or fewer values, or return where the result is stored"
        )
    if head.how != "too long":
        return None
    size = int(head.text[:_MAX_DIGITS])
    return (
        f"{task.name}: its result has {size / 2**20:.1f} MiB, above max_result = "
        f"{format_size(admission.policy.result_limit)}: "
        'return less, return where the result is stored, or raise the limit (max_result = "64M")'
    )


def run_in_thread(
    task: Any,
    code: TaskCode,
    admission: LocalAdmission,
    args: Any,
    kwargs: Any,
    beside: handlers.Handlers,
) -> Any:
    """Run the task in a thread of this process, for a policy with the isolation ``inline`` or ``thread``."""
    try:
        result = admission.call(_execute_with, task.request, task, code, args, kwargs, beside)
    except BaseException as error:
        if not admission.ran and isinstance(error, RconError):
            admission.refuse(str(error))
            raise
        ending: Literal["ok", "error"] = "ok" if isinstance(error, TaskPredicate) else "error"
        outcome = admission.finish(ending, codec.sentence(error))
        if outcome.ran_into_limit and isinstance(error, Exception):
            raise _exception_of(outcome) from error
        raise
    admission.finish("ok")
    return result


def _execute_with(
    request: Any, task: Any, code: TaskCode, args: Any, kwargs: Any, beside: handlers.Handlers
) -> Any:
    """Run the code of a task in this thread, with its request. Celery keeps a stack of requests for each thread."""
    body = partial(code.execute, task, args, kwargs)
    if task.request_stack.top is request:
        return beside.call(task, args, kwargs, body, outside_too=True)
    _task_stack.push(task)
    task.request_stack.push(request)
    try:
        return beside.call(task, args, kwargs, body, outside_too=False)
    finally:
        task.request_stack.pop()
        _task_stack.pop()


def _exception_of(outcome: Outcome) -> Exception:
    """Return the exception of a task that a limit or a signal ended."""
    error = outcome.error()
    if error is None:
        error = Killed(outcome.detail or outcome.ending, outcome.signal, outcome.usage)
    return error.plain() if isinstance(error, Killed | LimitExceeded) else error
