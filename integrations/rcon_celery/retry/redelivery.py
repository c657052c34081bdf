"""Send messages again, with headers that carry a task's deaths from one delivery to the next."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Final, NamedTuple

#: Header: how often the task died at its memory limit.
DEATHS: Final = "rcon_deaths"
#: Header: how often the process that ran the task ended.
LOST: Final = "rcon_lost"
#: Header: why the message is in a dead-letter queue. A worker that takes it from there counts deaths from 0.
REASON: Final = "rcon_reason"
#: Header: the message was in a dead-letter queue before. It never goes there a second time.
_WAS_DEAD_LETTER: Final = "rcon_was_dead_letter"
#: Header: the number of a duplicate that waits for the end of a run.
DUPLICATE: Final = "rcon_duplicate"
#: Header of a duplicate: the last heartbeat of the run that it waits for.
LAST_HEARTBEAT: Final = "rcon_last_heartbeat"
#: Header: how often this package sent the message again.
_RESENT: Final = "rcon_resent"
#: No message is delivered more often. A larger count is not one of this package.
_MAX_COUNT: Final = 1_000_000
#: Headers of one message that are not copied to the next.
_NOT_COPIED: Final = frozenset({DUPLICATE, LAST_HEARTBEAT, "redelivered"})


class History(NamedTuple):
    """The history of a task according to its message. ``redelivered`` is the broker's flag."""

    deaths: int
    lost: int
    redelivered: bool


def history_of(task: Any) -> History:
    """Return the history of the message that the worker runs now.

    The sender of a message can put anything into the headers, so what is no count is read as 0.
    """
    headers = vars(task.request)
    redelivered = bool((task.request.delivery_info or {}).get("redelivered"))
    if headers.get(REASON) is not None:
        return History(0, 0, redelivered)
    return History(_count(headers.get(DEATHS)), _count(headers.get(LOST)), redelivered)


def _count(value: object) -> int:
    """Return a header as a count; 0 if it cannot be one."""
    return value if type(value) is int and 0 <= value <= _MAX_COUNT else 0


def message_id(task: Any) -> str:
    """Return an id of the message: the same for each delivery, a new one for each retry of the task."""
    request = task.request
    replaced = request.replaced_task_nesting or 0
    return f"{request.id}-{request.retries or 0}-{replaced}-{getattr(request, _RESENT, None) or 0}"


def was_dead_letter(task: Any) -> bool:
    """Return whether the task was in a dead-letter queue before."""
    return any(getattr(task.request, name, None) is not None for name in (REASON, _WAS_DEAD_LETTER))


def resend(task: Any, deaths: int, lost: int, reason: str | None = None, **options: Any) -> Any:
    """Send the message of the running task again, with its deaths. This does not count as a retry by the task.

    For a dead-letter queue, ``queue`` is that queue, and ``reason`` why the message goes there. Return the signature
    sent.
    """
    headers: dict[str, Any] = {
        DEATHS: deaths,
        LOST: lost,
        _RESENT: _count(getattr(task.request, _RESENT, None)) + 1,
    }
    if reason is not None:
        headers[REASON] = reason
    elif was_dead_letter(task):
        headers[_WAS_DEAD_LETTER] = True
    return _send(task, headers, _NOT_COPIED | {REASON}, **options)


def retry(task: Any, countdown: float) -> None:
    """Send the message of the running task again as its next retry, as Celery does after it lost a process."""
    request = task.request
    signature = task.signature_from_request(request, countdown=countdown, retries=request.retries + 1)
    signature.apply_async(add_to_parent=False)  # it is the same task, not a child of it


def send_duplicate(task: Any, number: str, countdown: float, last_heartbeat: float | None) -> None:
    """Send the same message again, to be delivered after ``countdown`` seconds."""
    headers: dict[str, Any] = {DUPLICATE: number}
    if last_heartbeat is not None:
        headers[LAST_HEARTBEAT] = last_heartbeat
    _send(task, headers, _NOT_COPIED, countdown=countdown)


def _send(task: Any, headers: Mapping[str, Any], without: Collection[str], **options: Any) -> Any:
    request = task.request
    copied = {name: value for name, value in (request.headers or {}).items() if name not in without}
    signature = task.signature_from_request(
        request, retries=request.retries, headers={**copied, **headers}, **options
    )
    signature.apply_async(add_to_parent=False)  # it is the same task, not a child of it
    return signature
