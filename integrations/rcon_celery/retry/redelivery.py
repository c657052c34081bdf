"""Messages that are sent once more: what their headers tell the next one who gets them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Final

#: How often the task died of memory.
DEATHS: Final = "rcon_deaths"
#: How often the process that ran it ended.
LOST: Final = "rcon_lost"
#: Why it is in a dead-letter queue. A worker that takes it from there tries it anew.
REASON: Final = "rcon_reason"
#: That it was in a dead-letter queue: it does not go there again, or could do so for ever.
_BURIED: Final = "rcon_buried"
#: The number of a message that waits for the end of a run that is under way.
HEIR: Final = "rcon_heir"
#: When the run that it waits for last said that it is under way.
SEEN: Final = "rcon_seen"
#: How often the task was sent once more, by us.
_SENT: Final = "rcon_sent"
#: Of one message, and not of the next.
_NOT_CARRIED: Final = frozenset({HEIR, SEEN, "redelivered"})


def count(task: Any, name: str) -> int:
    """A header that counts something; 0 where it is not there. Whoever sends messages can put anything there."""
    value = getattr(task.request, name, None)
    if not isinstance(value, int) or value < 0 or getattr(task.request, REASON, None) is not None:
        return 0
    return int(value)


def identity(task: Any) -> str:
    """What tells a message from all others, of the same task too; the same each time that it is delivered."""
    request = task.request
    replaced = request.replaced_task_nesting or 0
    return f"{request.id}-{request.retries or 0}-{replaced}-{getattr(request, _SENT, None) or 0}"


def is_redelivered(task: Any) -> bool:
    """Whether the broker says that it delivered the message before."""
    return bool((task.request.delivery_info or {}).get("redelivered"))


def was_buried(task: Any) -> bool:
    """Whether the task was in a dead-letter queue before."""
    return any(getattr(task.request, name, None) is not None for name in (REASON, _BURIED))


def send_again(task: Any, deaths: int, lost: int, reason: str | None = None, **options: Any) -> Any:
    """Send the message of a task that runs once more, with what is known; it is no try of the task's own.

    ``reason``: why it goes to a dead-letter queue, which ``queue`` names then.
    """
    headers: dict[str, Any] = {
        DEATHS: deaths,
        LOST: lost,
        _SENT: (getattr(task.request, _SENT, None) or 0) + 1,
    }
    if reason is not None:
        headers[REASON] = reason
    elif was_buried(task):
        headers[_BURIED] = True
    return _send(task, headers, _NOT_CARRIED | {REASON}, **options)


def send_heir(task: Any, number: str, countdown: float, seen: float | None) -> None:
    """Send the same message once more, as one that waits. ``seen``: when the run last said that it is under way."""
    headers: dict[str, Any] = {HEIR: number}
    if seen is not None:
        headers[SEEN] = seen
    _send(task, headers, _NOT_CARRIED, countdown=countdown)


def _send(task: Any, headers: Mapping[str, Any], without: Collection[str], **options: Any) -> Any:
    request = task.request
    carried = {name: value for name, value in (request.headers or {}).items() if name not in without}
    signature = task.signature_from_request(
        request, retries=request.retries, headers={**carried, **headers}, **options
    )
    signature.apply_async(add_to_parent=False)  # it is the task itself, and no child of it
    return signature
