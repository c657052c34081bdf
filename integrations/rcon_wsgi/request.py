"""A request as `Work`, which routes match, and the answer to a request that was not served.

The answer is ``application/problem+json`` (RFC 9457) with fixed sentences. It names the policy and the limit, as the
policy file spells it, and no internals: no path, no key, no stack trace. Its ``instance`` is the id of the request,
which the log line of the same request has too.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Final, NamedTuple
from urllib.parse import quote

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
from rcon_plugins.settings.routing import normalise_host
from rcon_plugins.work import Work

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse

Environ = dict[str, Any]

#: Makes a `Work` of its fields. The constructor of a `NamedTuple` is a function in Python, and takes thrice as long.
_make_work: Callable[[tuple[str, str, Mapping[str, str]]], Work] = partial(tuple.__new__, Work)


def work_of(environ: Environ) -> Work:
    """Return the request of this environ. Its attributes do not change when the application changes the environ."""
    method = environ.get("REQUEST_METHOD", "")
    path: str = environ.get("SCRIPT_NAME", "") + environ.get("PATH_INFO", "")
    if not path.isascii():
        path = _decoded(path)
    name = f"{method} {path}"
    if not name.isprintable():
        name = quote(name, safe="/ ", errors="backslashreplace")  # it may have lone surrogates
    host = environ.get("HTTP_HOST") or environ.get("SERVER_NAME") or ""
    return _make_work(("request", name, RequestAttributes(host, path, method, environ)))


class RequestAttributes(Mapping[str, str]):
    """The attributes of a request for routes and keys. An empty attribute counts as missing.

    ``host``, ``path``, ``method``, ``remote_addr`` and ``remote_user``; and, not when iterating, ``header:NAME`` for a
    header (in any case), ``path:N`` for the N-th segment of the path, from 1, and ``request_id``, which is no key: that
    of the header X-Request-ID, else the trace id of the header traceparent, else a new one, made when it is first read.

    ``host`` is the Host header, else the server's name: in lower case, without port and without final dots. ``path`` is
    the whole path, SCRIPT_NAME included, decoded as UTF-8. It is not normalised, as each application interprets ``//``
    and ``..`` in its own way. So route by host if a policy must hold for any path.
    """

    __slots__ = ("_environ", "_host", "_method", "_path", "_written_host")

    def __init__(self, written_host: str, path: str, method: str, environ: Environ) -> None:
        self._written_host = written_host
        self._host: str | None = None
        self._path = path
        self._method = method
        self._environ = environ.copy()  # the application may change its own

    def __getitem__(self, name: str) -> str:
        if name == "host":
            if self._host is None:
                # Normalise it like a route: another spelling of a host must not be another key with limits of its own.
                self._host = normalise_host(self._written_host)
            value = self._host
        elif name == "path":
            value = self._path
        elif name == "method":
            value = self._method
        else:
            value = self._rarer(name)
        if value:
            return value
        raise KeyError(name)

    def _rarer(self, name: str) -> str:
        kind, _, which = name.partition(":")
        if kind == "header" and which:
            variable = which.upper().replace("-", "_")
            value = self._environ.get(variable if variable in _BARE else f"HTTP_{variable}")
        elif kind == "path" and which.isdecimal() and which != "0":
            segments = self._path.split("/", int(which) + 1)  # the first is what is before the first slash
            value = segments[int(which)] if int(which) < len(segments) else ""
        elif name == "request_id":
            # Two threads may ask for it: at the deadline, the one that serves and the one that concludes the request.
            value = self._environ.get(_ID) or self._environ.setdefault(_ID, _request_id(self._environ))
        else:
            value = self._environ.get(_VARIABLES.get(name, ""))
        return value if isinstance(value, str) else ""

    def __iter__(self) -> Iterator[str]:
        return (name for name in _NAMES if name in self)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __repr__(self) -> str:
        return f"RequestAttributes({dict(self)!r})"


def _request_id(environ: Environ) -> str:
    """Return the id that the client or a proxy gave a request, if it is one; else a new one.

    Anybody can send these headers, and the id goes to logs. So an id of another form is not used.
    """
    given = environ.get("HTTP_X_REQUEST_ID")
    if isinstance(given, str) and _REQUEST_ID.fullmatch(given):
        return given
    trace = environ.get("HTTP_TRACEPARENT")
    found = _TRACEPARENT.fullmatch(trace) if isinstance(trace, str) else None
    return found["id"] if found is not None else os.urandom(16).hex()


#: Where the id of a request is kept. No header has such a name.
_ID: Final = "rcon.request_id"
#: Ids that are a URI reference as they stand (RFC 3986), and one word in a log.
_REQUEST_ID: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._~=+@-]{0,127}")
#: W3C Trace Context, version 00; an id of zeros is invalid.
_TRACEPARENT: Final = re.compile(r"00-(?P<id>(?!0{32})[0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")

_VARIABLES: Final = {"remote_addr": "REMOTE_ADDR", "remote_user": "REMOTE_USER"}
_NAMES: Final = ("host", "path", "method", *_VARIABLES)
#: The headers that WSGI, like CGI, names without HTTP_.
_BARE: Final = ("CONTENT_TYPE", "CONTENT_LENGTH")


def _decoded(path: str) -> str:
    try:
        return path.encode("latin-1").decode("utf-8", "replace")
    except UnicodeEncodeError:  # the server has decoded it already, against PEP 3333
        return path


#: The endings for which the client gets the application's response; for others it gets a problem.
ANSWERED: Final = frozenset({"ok", "error"})

#: The phrases of the answers below, and of the usual ones for a host or path that a server does not have. Not
#: `http.HTTPStatus`: after USR2 the folder of gunicorn, which has a package `http`, is first on the path.
_PHRASES: Final = {
    400: "Bad Request", 403: "Forbidden", 404: "Not Found", 410: "Gone", 421: "Misdirected Request",
    503: "Service Unavailable", 504: "Gateway Timeout",
}  # fmt: skip


class _Problem(NamedTuple):
    status: int
    title: str
    detail: str


_PROBLEMS: Final[dict[Ending, _Problem]] = {
    "memory": _Problem(503, "Memory limit reached", "The request needed more memory than its policy allows."),
    "pids": _Problem(
        503,
        "Process limit reached",
        "The request needed more processes or threads than its policy allows.",
    ),
    "timeout": _Problem(504, "Time limit reached", "The request took longer than its policy allows."),
    "concurrency": _Problem(
        503,
        "Too many requests at once",
        "The server already handles the maximum number of these requests. Try again later.",
    ),
    "refused": _Problem(
        503,
        "Request not confined",
        "The server refused the request because it could not confine it.",
    ),
    "forbidden": _Problem(
        403,
        "Identity not allowed",
        "The policy does not allow the user that the request would run as.",
    ),
    "unroutable": _Problem(
        421, "No policy for this request", "The server has no policy for this host and path."
    ),
    "aborted": _Problem(503, "Request stopped", "The server stopped the request before it was done."),
}
_KILLED: Final = _Problem(
    503, "Request ended", "The process that served the request ended before it was done."
)

_ENDINGS: Final[dict[type[LimitExceeded], Ending]] = {
    ConcurrencyLimitExceeded: "concurrency",
    MemoryLimitExceeded: "memory",
    PidsLimitExceeded: "pids",
    TimeLimitExceeded: "timeout",
}


def respond_refused(
    environ: dict[str, Any], start_response: StartResponse, work: Work, error: LimitExceeded
) -> list[bytes]:
    """Answer a request that was not admitted because of a limit."""
    ending: Ending = next((found for kind, found in _ENDINGS.items() if isinstance(error, kind)), "refused")
    outcome = Outcome(ending=ending, policy=error.policy, limit=error.limit)
    retry_after = error.retry_after if isinstance(error, ConcurrencyLimitExceeded) else None
    return respond(environ, start_response, work, outcome, retry_after)


def respond(
    environ: dict[str, Any],
    start_response: StartResponse,
    work: Work,
    outcome: Outcome,
    retry_after: int | None = None,
    *,
    replacing: bool = False,
    status: int | None = None,
) -> list[bytes]:
    """Answer a request, ``work``, with a problem document for its outcome.

    ``retry_after`` is in seconds. ``status`` replaces the status of the outcome. Use ``replacing`` in an ``except``
    block, after the application may have called ``start_response``: the server then raises the current exception if
    headers have been sent.
    """
    problem = _PROBLEMS.get(outcome.ending, _KILLED)
    status = status or problem.status
    line = f"{status} {_PHRASES.get(status, 'Refused')}"
    document: dict[str, object] = {
        "type": f"urn:problem-type:rcon:{outcome.ending if outcome.ending in _PROBLEMS else 'killed'}",
        "title": problem.title,
        "status": status,
        "detail": problem.detail,
        "instance": work.attributes["request_id"],
    }
    if outcome.limit:
        document["limit"] = outcome.limit
    if outcome.policy:
        document["policy"] = outcome.policy
    body = msgspec.json.encode(document)
    headers = [("Content-Type", "application/problem+json"), ("Content-Length", str(len(body)))]
    if outcome.ending == "concurrency":
        headers.append(("Retry-After", str(retry_after or 1)))
    if replacing:
        start_response(line, headers, sys.exc_info())
    else:
        start_response(line, headers)
    return [] if environ.get("REQUEST_METHOD") == "HEAD" else [body]
