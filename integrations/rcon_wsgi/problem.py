"""What a client is told when its request was not served: ``application/problem+json`` (RFC 9457).

The sentences are fixed. They name the policy and the limit, as the policy file spells it, and nothing of what
happened inside: no path, no key, no stack trace.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import msgspec

from rcon_plugins.ending import Ending
from rcon_plugins.errors import (
    ConcurrencyLimitExceeded,
    LimitExceeded,
    MemoryLimitExceeded,
    PidsLimitExceeded,
    TimeLimitExceeded,
)
from rcon_plugins.outcome import Outcome

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse

_UNAVAILABLE: Final = "503 Service Unavailable"
_FORBIDDEN: Final = "403 Forbidden"
_GATEWAY_TIMEOUT: Final = "504 Gateway Timeout"


class _Kind(NamedTuple):
    status: str
    title: str
    detail: str


_KINDS: Final[dict[Ending, _Kind]] = {
    "memory": _Kind(
        _UNAVAILABLE, "Memory limit reached", "The request needed more memory than its policy allows."
    ),
    "pids": _Kind(
        _UNAVAILABLE,
        "Process limit reached",
        "The request needed more processes or threads than its policy allows.",
    ),
    "timeout": _Kind(
        _GATEWAY_TIMEOUT, "Time limit reached", "The request took longer than its policy allows."
    ),
    "concurrency": _Kind(
        _UNAVAILABLE,
        "Too many requests at once",
        "As many requests are under way as may be at once. Try again later.",
    ),
    "refused": _Kind(
        _UNAVAILABLE, "Request not confined", "The request was not run, because it could not be confined."
    ),
    "forbidden": _Kind(
        _FORBIDDEN, "Identity not allowed", "The user that the request would run as is not allowed."
    ),
    "aborted": _Kind(_UNAVAILABLE, "Request stopped", "The server stopped the request before it was done."),
}
_KILLED: Final = _Kind(
    _UNAVAILABLE, "Request ended", "The process that served the request ended before it was done."
)

_ENDINGS: Final[dict[type[LimitExceeded], Ending]] = {
    ConcurrencyLimitExceeded: "concurrency",
    MemoryLimitExceeded: "memory",
    PidsLimitExceeded: "pids",
    TimeLimitExceeded: "timeout",
}


def of(error: LimitExceeded) -> tuple[Outcome, int | None]:
    """What `respond` tells of work that was not admitted because of a limit."""
    ending: Ending = next((told for kind, told in _ENDINGS.items() if isinstance(error, kind)), "refused")
    retry_after = error.retry_after if isinstance(error, ConcurrencyLimitExceeded) else None
    return Outcome(ending=ending, policy=error.policy, limit=error.limit), retry_after


def is_problem(outcome: Outcome) -> bool:
    """Whether the outcome is to be told to the client in place of what the application said."""
    return outcome.ending not in ("ok", "error")


def respond(
    environ: dict[str, Any],
    start_response: StartResponse,
    outcome: Outcome,
    retry_after: int | None = None,
    *,
    replacing: bool = False,
) -> list[bytes]:
    """Answer a request with its problem.

    ``replacing`` is for use in an ``except`` block after the application may have called ``start_response``:
    the server then raises the current exception if headers have been sent.
    """
    kind = _KINDS.get(outcome.ending, _KILLED)
    told: dict[str, object] = {
        "type": f"urn:problem-type:rcon:{outcome.ending if outcome.ending in _KINDS else 'killed'}",
        "title": kind.title,
        "status": int(kind.status[:3]),
        "detail": kind.detail,
    }
    if outcome.limit:
        told["limit"] = outcome.limit
    if outcome.policy:
        told["policy"] = outcome.policy
    body = msgspec.json.encode(told)
    headers = [("Content-Type", "application/problem+json"), ("Content-Length", str(len(body)))]
    if outcome.ending == "concurrency":
        headers.append(("Retry-After", str(retry_after or 1)))
    if replacing:
        start_response(kind.status, headers, sys.exc_info())
    else:
        start_response(kind.status, headers)
    return [] if environ.get("REQUEST_METHOD") == "HEAD" else [body]
