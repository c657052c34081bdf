"""A request as `Work`: what routes match and keys are taken from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final
from urllib.parse import quote

from rcon_plugins.routing import normalise_host
from rcon_plugins.work import Work

Environ = dict[str, Any]


def work_of(environ: Environ) -> Work:
    """The request of this environ. Its attributes are worked out when they are asked for."""
    name = f"{environ.get('REQUEST_METHOD', '')} {_path(environ)}"
    if not name.isprintable():
        name = quote(name, safe="/ ")
    return Work("request", name, RequestAttributes(environ))


class RequestAttributes(Mapping[str, str]):
    """``host``, ``path`` and ``method`` of a request.

    ``host`` is the Host header, else the server's name: in small letters, without port and without final dots.
    ``path`` is the whole path, SCRIPT_NAME included, decoded as UTF-8. It is not normalised: what an application
    makes of ``//`` and ``..`` is its own business, so a policy that must hold whatever the path is belongs on
    the host.
    """

    __slots__ = ("_environ",)

    def __init__(self, environ: Environ) -> None:
        self._environ = environ

    def __getitem__(self, name: str) -> str:
        value = _READERS[name](self._environ)
        if value is None:
            raise KeyError(name)
        return value

    def __iter__(self) -> Iterator[str]:
        return (name for name, read in _READERS.items() if read(self._environ) is not None)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __repr__(self) -> str:
        return f"RequestAttributes({dict(self)!r})"


def _host(environ: Environ) -> str | None:
    host = environ.get("HTTP_HOST") or environ.get("SERVER_NAME") or ""
    # As routes know it: spelled otherwise, a host must not be another key, with limits of its own.
    return normalise_host(host) or None


def _path(environ: Environ) -> str:
    path: str = environ.get("SCRIPT_NAME", "") + environ.get("PATH_INFO", "")
    if path.isascii():
        return path
    try:
        return path.encode("latin-1").decode("utf-8", "replace")
    except UnicodeEncodeError:  # a server that does not keep to PEP 3333, and has decoded it already
        return path


def _method(environ: Environ) -> str | None:
    return environ.get("REQUEST_METHOD") or None


_READERS: Final[Mapping[str, Callable[[Environ], str | None]]] = {
    "host": _host,
    "path": _path,
    "method": _method,
}
