"""The environ on its way to an executor process.

What crosses: ``str``, ``bytes``, ``int``, ``float``, ``bool``, ``None``, and tuples, lists and dicts of these.
What belongs to this process alone (streams, sockets, callables, any other object) is left out; the executor
makes its own ``wsgi.input``, ``wsgi.errors`` and ``wsgi.file_wrapper``.

The encoding is `marshal`: it keeps exactly these types (tuples, integers of any size, the lone surrogates of
names that are not UTF-8), and both ends are one interpreter, since the executor was forked from the host. It
goes from the trusted side to the other only. What comes back never does (see `rcon_wsgi.wire`).
"""

from __future__ import annotations

import marshal
from typing import Any, Final

from rcon_plugins.executors.channel import MAX_PAYLOAD, Channel, Frame, ProtocolViolation
from rcon_wsgi.wire import NUMBER_SIZE, REQUEST, REQUEST_PART

_NOT_CROSSING: Final = frozenset(
    {
        "wsgi.input",
        "wsgi.errors",
        "wsgi.file_wrapper",
        "wsgi.version",
        "wsgi.multithread",
        "wsgi.multiprocess",
    }
)
_PLAIN: Final = frozenset({str, bytes, int, float, bool, type(None)})
_DEPTH: Final = 32


class _LeftOut(Exception):
    pass


def encode(environ: dict[str, Any]) -> bytes:
    """What of the environ crosses, as bytes."""
    crossing: dict[str, object] = {}
    for key, value in environ.items():
        if type(value) is str:
            crossing[key] = value
        elif key not in _NOT_CROSSING:
            try:
                crossing[str(key)] = _plain(value, 0)
            except _LeftOut:
                continue
    return marshal.dumps(crossing)


def frames(data: bytes) -> list[tuple[int, bytes]]:
    """The number of a request and its encoded environ as frames; one, unless the server allows very large headers."""
    if len(data) <= MAX_PAYLOAD:
        return [(REQUEST, data)]
    pieces = [data[start : start + MAX_PAYLOAD] for start in range(0, len(data), MAX_PAYLOAD)]
    return [(REQUEST_PART, piece) for piece in pieces[:-1]] + [(REQUEST, pieces[-1])]


def receive(channel: Channel, frame: Frame) -> tuple[bytes, dict[str, Any]]:
    """The number and the environ that start a request; ``frame`` is its first frame. Runs in the executor."""
    kind, data = frame
    if kind == REQUEST_PART:
        parts = [data]
        while kind == REQUEST_PART:
            kind, data = channel.receive()
            parts.append(data)
        data = b"".join(parts)
    if kind != REQUEST:
        raise ProtocolViolation(f"a request starts with an environ, not with a frame of kind {kind}")
    # From our own host, which we were forked from.
    environ: dict[str, Any] = marshal.loads(memoryview(data)[NUMBER_SIZE:])  # noqa: S302
    return data[:NUMBER_SIZE], environ


def _plain(value: object, depth: int) -> object:
    """The value made of plain types only; subclasses of them become what they are."""
    if type(value) in _PLAIN:
        return value
    if depth == _DEPTH:
        raise _LeftOut
    if isinstance(value, tuple):
        return tuple([_plain(item, depth + 1) for item in value])
    if isinstance(value, list):
        return [_plain(item, depth + 1) for item in value]
    if isinstance(value, dict):
        return {_plain(key, depth + 1): _plain(item, depth + 1) for key, item in value.items()}
    if isinstance(value, bytes):
        return bytes(value)
    for plain in (str, int, float):
        if isinstance(value, plain):
            return plain(value)
    raise _LeftOut
