"""Applications that would have the server work for them, or its threads wait."""

from __future__ import annotations

import gc
import os
import struct
import time
from collections.abc import Callable, Iterable
from typing import Any

from rcon_plugins.executors.channel import Channel
from rcon_wsgi import wire

Environ = dict[str, Any]
_FRAME = struct.Struct("!BI")


def _channel() -> int:
    """The executor's own end, which any code in it can find."""
    return next(found for found in gc.get_objects() if isinstance(found, Channel)).fileno()


def _send(data: bytes) -> None:
    descriptor = _channel()
    while True:
        os.write(descriptor, data)


def _frame(kind: int, payload: bytes) -> bytes:
    return _FRAME.pack(kind, len(payload)) + payload


def errors(environ: Environ, start_response: Any) -> Iterable[bytes]:
    _send(_frame(wire.ERRORS, b"x") * 10_000)
    return []


def empty(environ: Environ, start_response: Any) -> Iterable[bytes]:
    _send(_frame(wire.ERRORS, b"") * 10_000)
    return []


def chunks(environ: Environ, start_response: Any) -> Iterable[bytes]:
    start_response("200 OK", [("Content-Type", "text/plain")])
    yield b"begun"
    _send(_frame(wire.DATA, b"x") * 10_000)


def reads(environ: Environ, start_response: Any) -> Iterable[bytes]:
    """One at a time, of a body that is at its end."""
    while True:
        environ["wsgi.input"].read(1)


def does_not_read(environ: Environ, start_response: Any) -> Iterable[bytes]:
    """Asks for the body again and again, and takes none of it."""
    descriptor = _channel()
    while True:
        os.write(descriptor, _frame(wire.READ, wire.encode_size(65536)))
        time.sleep(0.05)


def upload(environ: Environ, start_response: Any) -> Iterable[bytes]:
    body = environ["wsgi.input"].read()
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [str(len(body)).encode()]


def much(environ: Environ, start_response: Any) -> Iterable[bytes]:
    start_response("200 OK", [("Content-Type", "text/plain")])
    while True:
        yield b"x" * 1_000_000


def ok(environ: Environ, start_response: Any) -> Iterable[bytes]:
    start_response("200 OK", [("Content-Type", "text/plain"), ("Content-Length", "2")])
    return [b"ok"]


APPS: dict[str, Callable[[Environ, Any], Iterable[bytes]]] = {
    app.__name__.replace("_", "-"): app
    for app in (errors, empty, chunks, reads, does_not_read, upload, much, ok)
}


def by_path(environ: Environ, start_response: Any) -> Iterable[bytes]:
    return APPS[environ["PATH_INFO"][1:]](environ, start_response)
