"""The host's side of one task that runs in an executor process."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Protocol

from celery.result import result_from_tuple

from rcon_celery import codec, wire
from rcon_celery.retry.attempt import ServerLost
from rcon_plugins.errors import Killed, LimitExceeded, MemoryLimitExceeded
from rcon_plugins.executors.channel import ChannelClosed, ProtocolViolation
from rcon_plugins.executors.executor import SOFT_TIME

if TYPE_CHECKING:
    from rcon_plugins.confinement.admission import ProcessAdmission
    from rcon_plugins.outcome import Outcome


class Unencoded:
    """Stands for a result that no serializer of the application can carry, where nobody is to get it anyway."""

    def __init__(self, text: str) -> None:
        self._text = text

    def __repr__(self) -> str:
        return self._text


class Host(Protocol):
    """The process that has the task."""

    @property
    def is_lost(self) -> bool:
        """Whether the fork server is gone, which takes the executor processes along."""

    @property
    def is_of_pool(self) -> bool:
        """Whether it is one of the pool's, which tells it of a task's soft time limit."""

    @property
    def notices(self) -> Notices:
        """Passes that on."""

    @property
    def accepted(self) -> set[str]:
        """The content types that the application reads."""


class Notices:
    """Lets the signal of a task's soft time limit go to where its body runs.

    The pool sends it to the process that has the task; its own handler raises there. Set once, for that takes longer
    than to pass a task on; call it in the main thread.
    """

    def __init__(self) -> None:
        self._admission: ProcessAdmission | None = None
        self._former: Any = None
        self._is_set = False

    @contextlib.contextmanager
    def passed_on(self, admission: ProcessAdmission) -> Iterator[None]:
        """Those that come meanwhile are this work's."""
        if not self._is_set:
            self._former, self._is_set = signal.signal(SOFT_TIME, self._hear), True
        self._admission = admission
        try:
            yield
        finally:
            self._admission = None

    def _hear(self, number: int, frame: Any) -> None:
        admission = self._admission
        if admission is not None:
            admission.notify(SOFT_TIME)
        elif callable(self._former):
            self._former(number, frame)


def run(task: Any, admission: ProcessAdmission, args: Any, kwargs: Any, host: Host) -> Any:
    """Have the task's body run at the other end, and return or raise what it did."""
    # Until all is settled: what comes late must not break off the settling.
    with host.notices.passed_on(admission) if host.is_of_pool else contextlib.nullcontext():
        head, answer = _converse(task, admission, args, kwargs, host)
        return _Answer(task, admission, head, answer).conclude()


def _converse(
    task: Any, admission: ProcessAdmission, args: Any, kwargs: Any, host: Host
) -> tuple[wire.AnswerHead, dict[str, Any]]:
    """Send the task, and wait for the answer."""
    number = os.urandom(wire.NUMBER_SIZE)
    try:
        body, payload = codec.encode_task(task, task.request, args, kwargs, host.accepted)
        head = wire.TaskHead(number, task.name, body, int(admission.policy.result_limit))
        wire.send(admission.channel, wire.TASK, head, payload)
        return _receive(admission, number, host.accepted)
    except ChannelClosed:
        outcome = admission.died()
        if task.acks_late and outcome.ending == "killed" and host.is_lost:
            # Not its own fault; and its message was not acknowledged.
            raise ServerLost(outcome.detail) from None
        raise raised(outcome) from None
    except BaseException as error:
        # A pool that ends this process gives it a tenth of a second.
        admission.abandon(codec.sentence(error))
        raise


def _receive(
    admission: ProcessAdmission, number: bytes, accept: set[str]
) -> tuple[wire.AnswerHead, dict[str, Any]]:
    head = wire.decode_answer(admission.channel.receive())
    if head.number != number:
        raise ProtocolViolation("an answer to another task")
    longest = admission.policy.result_limit
    if not 0 < head.body.size <= longest:
        raise ProtocolViolation(f"an answer of {head.body.size} bytes; the most is {longest}")
    payload = wire.receive_body(admission.channel, head.body.size)
    if not admission.channel.drained:
        raise ProtocolViolation("a frame after the last")
    answer = codec.decode(head.body, payload, accept)
    if not isinstance(answer, dict):
        raise ProtocolViolation("an answer that is no mapping")
    return head, answer


class _Answer:
    def __init__(
        self, task: Any, admission: ProcessAdmission, head: wire.AnswerHead, answer: dict[str, Any]
    ) -> None:
        self._task = task
        self._admission = admission
        self._head = head
        self._answer = answer

    def conclude(self) -> Any:
        """Settle the work, and return or raise what the task did."""
        if self._head.busy:
            self._admission.leaves_threads()
        try:
            value, error = self._read()
        except Exception as broken:  # noqa: BLE001 - what an executor says may be anything
            self._admission.abort(f"its answer cannot be read: {codec.sentence(broken)}")
            raise Killed(f"{self._task.name}: its process gave an answer that cannot be read") from None
        if self._head.how == "too long":
            outcome = self._admission.finish("result", self._too_long())
        elif error is None or self._head.how in ("retry", "ignore", "reject"):
            outcome = self._admission.finish("ok")
        else:
            outcome = self._admission.finish("error", codec.sentence(error))
        if outcome.ending not in ("ok", "error"):
            raise raised(outcome) from error
        for child in self._children:
            self._task.add_trail(child)
        if isinstance(error, MemoryError):
            # Celery ends a whole worker for it.
            told = f"{self._task.name}: {codec.sentence(error)}"
            limit = MemoryLimitExceeded(told, policy=outcome.policy, key=outcome.key, usage=outcome.usage)
            raise limit.plain() from error.__cause__
        if error is not None:
            raise error
        return value

    def _read(self) -> tuple[Any, Exception | None]:
        task, how, answer = self._task, self._head.how, self._answer
        self._children = [result_from_tuple(child, app=task.app) for child in answer["children"]]
        if how == "ok":
            return codec.value_of(task.app, answer), None
        if how == "error":
            return None, codec.exception_of(answer["error"], self._head.text)
        if how == "too long":
            int(self._head.text)
            return None, None
        if how == "unencodable":
            if codec.is_ignored(task, task.request):
                return Unencoded(self._head.text), None
            return None, codec.exception_of(answer["error"], self._head.text)
        return None, codec.predicate_of(task, how, answer)

    def _too_long(self) -> str:
        longest = self._admission.policy.result_limit
        return (
            f"{self._task.name}: its answer has {int(self._head.text) / 2**20:.1f} MiB, and the policy takes "
            f'{longest}: return less, say where the rest is kept, or write a larger one (max_result = "64M")'
        )


def raised(outcome: Outcome) -> Exception:
    """The exception that tells how a task ended that did not end by itself."""
    error = outcome.error()
    if error is None:
        error = Killed(outcome.detail or outcome.ending, outcome.signal, outcome.usage)
    return error.plain() if isinstance(error, Killed | LimitExceeded) else error
