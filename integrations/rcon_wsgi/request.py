"""A request as `Work`: what routes match and keys are taken from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final
from urllib.parse import quote

from rcon_plugins.settings.routing import normalise_host
from rcon_plugins.work import Work

Environ = dict[str, Any]


def work_of(environ: Environ) -> Work:
    """The request of this environ. What its attributes tell does not change when the application changes that."""
    method = environ.get("REQUEST_METHOD", "")
    path = _whole_path(environ)
    name = f"{method} {path}"
    if not name.isprintable():
        name = quote(name, safe="/ ", errors="backslashreplace")  # there may be lone surrogates
    host = environ.get("HTTP_HOST") or environ.get("SERVER_NAME") or ""
    return Work("request", name, RequestAttributes(host, path, method, environ))


class RequestAttributes(Mapping[str, str]):
    """What routes and keys may ask of a request; what is empty is missing.

    ``host``, ``path``, ``method``, ``remote_addr`` and ``remote_user``; and, not when iterating, ``header:NAME`` for a
    header (in any case) and ``path:N`` for the N-th segment of the path, from 1.

    ``host`` is the Host header, else the server's name: in small letters, without port and without final dots.
    ``path`` is the whole path, SCRIPT_NAME included, decoded as UTF-8. It is not normalised: what an application
    makes of ``//`` and ``..`` is its own business, so a policy that must hold whatever the path is belongs on
    the host.
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
                # As routes know it: spelled otherwise, a host must not be another key, with limits of its own.
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
        else:
            value = self._environ.get(_VARIABLES.get(name, ""))
        return value if isinstance(value, str) else ""

    def __iter__(self) -> Iterator[str]:
        return (name for name in _NAMES if name in self)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __repr__(self) -> str:
        return f"RequestAttributes({dict(self)!r})"


_VARIABLES: Final = {"remote_addr": "REMOTE_ADDR", "remote_user": "REMOTE_USER"}
_NAMES: Final = ("host", "path", "method", *_VARIABLES)
#: The headers that WSGI, like CGI, names without HTTP_.
_BARE: Final = ("CONTENT_TYPE", "CONTENT_LENGTH")


def _whole_path(environ: Environ) -> str:
    path: str = environ.get("SCRIPT_NAME", "") + environ.get("PATH_INFO", "")
    if path.isascii():
        return path
    try:
        return path.encode("latin-1").decode("utf-8", "replace")
    except UnicodeEncodeError:  # a server that does not keep to PEP 3333, and has decoded it already
        return path
