"""The messages of one request between the host and an executor process.

::

    host                             executor
      REQUEST_PART* REQUEST     ->
                                <-     READ n | READLINE n
      INPUT bytes | INPUT_FAILED ->                             (an empty INPUT is the end of the body)
                                <-     ERRORS text              (wsgi.errors, any time)
                                <-     START                    (once, with the first chunk, or with the end)
                                <-     ONLY bytes | DATA bytes  (one per chunk the application made)
                                <-     END                      (the body is over; close() still runs)
                                <-     DONE | ERROR             (the request is over)

``DONE`` without ``END`` means both. A request begins with a random number, and so do the payloads of its ``START``,
``DONE`` and ``ERROR``, so that code left behind by an earlier request cannot forge an answer. The request's body is
pulled: the host reads the server's ``wsgi.input`` when the application reads, and no further. No frame follows a
``READ`` until it is answered. Only the first chunk may be empty.

All frames of the executor are treated as hostile: they are decoded into the types below, and anything else is a
`ProtocolViolation`.

These values of the environ are sent: ``str``, ``bytes``, ``int``, ``float``, ``bool``, ``None``, and tuples, lists and
dicts of these. All other objects (streams, sockets, callables) stay in the host; the executor makes its own
``wsgi.input``, ``wsgi.errors`` and ``wsgi.file_wrapper``. The encoding is `marshal`. It keeps exactly these types
(tuples, integers of any size, the lone surrogates of names that are not UTF-8), and both ends are the same interpreter,
because the executor was forked from the host. Only the trusted side encodes with `marshal`, never the executor.
"""

from __future__ import annotations

import errno
import marshal
import re
import struct
import traceback
from collections.abc import Iterable
from typing import Annotated, Any, Final

import msgspec
from msgspec import Meta

from rcon_plugins.executors.channel import (
    CHUNK,
    FIRST_SERVICE_KIND,
    MAX_PAYLOAD,
    Channel,
    Frame,
    ProtocolViolation,
)

REQUEST: Final = FIRST_SERVICE_KIND
REQUEST_PART: Final = REQUEST + 1
INPUT: Final = REQUEST + 2
INPUT_FAILED: Final = REQUEST + 3

START: Final = FIRST_SERVICE_KIND + 16
DATA: Final = START + 1
#: The one chunk of a result whose ``len()`` is 1; a server may derive Content-Length from it.
ONLY: Final = START + 2
END: Final = START + 3
DONE: Final = START + 4
ERROR: Final = START + 5
ERRORS: Final = START + 6
READ: Final = START + 7
READLINE: Final = START + 8

#: The most headers of a response. A server takes some microseconds for each.
MAX_HEADERS: Final = 1000
#: The length of the number of a request, bytes.
NUMBER_SIZE: Final = 8

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
#: The deepest nesting of containers that are sent.
_MAX_DEPTH: Final = 32

_SIZE = struct.Struct("!I")
_FORBIDDEN = re.compile(r"[\r\n\0]|[^\x00-\xff]")
_MESSAGE_CHARACTERS = 8 * 1024
_TRACEBACK_CHARACTERS = 64 * 1024


#: The statuses of responses that have no body.
_WITHOUT_BODY = frozenset({"204", "304"})
_LENGTH = re.compile(r"[0-9]{1,18}", re.ASCII)


class Start(msgspec.Struct, array_like=True, forbid_unknown_fields=True, frozen=True):
    """Status and headers."""

    status: str
    headers: Annotated[list[tuple[str, str]], Meta(max_length=MAX_HEADERS)]


class Failure(msgspec.Struct, array_like=True, forbid_unknown_fields=True, frozen=True):
    """An exception of the application, as text.

    ``input_failed``: it is the exception that the host sent for a failed read of the request's body.
    """

    type_name: str
    message: str
    traceback_text: str
    input_failed: bool


class InputFailure(msgspec.Struct, array_like=True, forbid_unknown_fields=True, frozen=True):
    """Why the host could not read the request's body."""

    errno: int
    message: str


class _LeftOut(Exception):
    """Raised for a value of the environ that is not sent."""


def encode_request(number: bytes, environ: dict[str, Any]) -> list[tuple[int, bytes]]:
    """Return the frames of a request: one, unless the server allows very large headers."""
    crossing: dict[str, object] = {}
    for key, value in environ.items():
        if type(value) is str:
            crossing[key] = value
        elif key not in _NOT_CROSSING:
            try:
                crossing[str(key)] = _plain(value, 0)
            except _LeftOut:
                continue
    data = number + marshal.dumps(crossing)
    if len(data) <= MAX_PAYLOAD:
        return [(REQUEST, data)]
    pieces = [data[start : start + MAX_PAYLOAD] for start in range(0, len(data), MAX_PAYLOAD)]
    return [(REQUEST_PART, piece) for piece in pieces[:-1]] + [(REQUEST, pieces[-1])]


def receive_request(channel: Channel, frame: Frame) -> tuple[bytes, dict[str, Any]]:
    """Return the number and the environ of a request; ``frame`` is its first frame. Runs in the executor."""
    kind, data = frame
    if kind == REQUEST_PART:
        parts = [data]
        while kind == REQUEST_PART:
            kind, data = channel.receive()
            parts.append(data)
        data = b"".join(parts)
    if kind != REQUEST:
        raise ProtocolViolation(f"a request starts with an environ, not with a frame of kind {kind}")
    # From our own host, which this process was forked from.
    environ: dict[str, Any] = marshal.loads(memoryview(data)[NUMBER_SIZE:])  # noqa: S302
    return data[:NUMBER_SIZE], environ


def _plain(value: object, depth: int) -> object:
    """Return the value with plain types only: instances of subclasses become instances of the plain type."""
    if type(value) in _PLAIN:
        return value
    if depth == _MAX_DEPTH:
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


def _as_plain_str(value: object) -> str:
    if isinstance(value, str):
        return str.__str__(value)
    raise TypeError(f"{value!r} is not a str")


_encoder = msgspec.msgpack.Encoder(enc_hook=_as_plain_str)
_start_decoder = msgspec.msgpack.Decoder(Start)
_failure_decoder = msgspec.msgpack.Decoder(Failure)
_input_failure_decoder = msgspec.msgpack.Decoder(InputFailure)


def encode_start(status: str, headers: Iterable[tuple[str, str]]) -> bytes:
    """Return status and headers, encoded. Raise TypeError or ValueError if a response may not have them."""
    pairs = list(headers)
    if len(pairs) > MAX_HEADERS:
        raise ValueError(f"a response has at most {MAX_HEADERS} headers, not {len(pairs)}")
    texts = [status]
    for name, value in pairs:
        texts.append(name)
        texts.append(value)
    for text in texts:
        if not isinstance(text, str):
            raise TypeError(f"status, header names and header values are str, not {text!r}")
    if _FORBIDDEN.search("".join(texts)) is not None:
        raise ValueError("status and headers are single lines of latin-1 characters")
    return _encoder.encode((status, pairs))


def body_length(start: Start, method: str) -> int | None:
    """Return how many bytes the body of a response has for its client; None if the headers do not say.

    Source: RFC 9112, section 6.3.
    """
    if method == "HEAD" or start.status[:3] in _WITHOUT_BODY:
        return 0
    for name, value in start.headers:
        if name.lower() == "content-length" and _LENGTH.fullmatch(value.strip()):
            return int(value)
    return None


def decode_start(payload: bytes) -> Start:
    """Return the status and headers that an executor sent. Raises `ProtocolViolation`."""
    try:
        start = _start_decoder.decode(payload)
    except msgspec.MsgspecError as error:
        raise ProtocolViolation(f"not a status and headers: {error}") from None
    text = start.status + "".join(map("".join, start.headers))
    if _FORBIDDEN.search(text) is not None:
        raise ProtocolViolation("a line break, NUL or non-latin character in the status or a header")
    return start


def encode_failure(error: BaseException, *, input_failed: bool) -> bytes:
    """Return an exception of the application, encoded."""
    kind = type(error)
    try:
        message = str(error)
    except Exception as second:  # noqa: BLE001 - the application's own __str__ may raise anything
        message = f"<its message cannot be shown: {type(second).__name__}>"
    text = "".join(traceback.format_exception(error))
    if len(text) > _TRACEBACK_CHARACTERS:
        half = _TRACEBACK_CHARACTERS // 2
        text = f"{text[:half]}\n[...]\n{text[-half:]}"
    name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
    return _encoder.encode(
        (encodable(name), encodable(message[:_MESSAGE_CHARACTERS]), encodable(text), input_failed)
    )


def decode_failure(payload: bytes) -> Failure:
    """Return the exception of an application that an executor sent. Raises `ProtocolViolation`."""
    try:
        return _failure_decoder.decode(payload)
    except msgspec.MsgspecError as error:
        raise ProtocolViolation(f"not a failure: {error}") from None


def encode_input_failure(error: Exception) -> bytes:
    """Return the exception that the server raised while reading the body, encoded."""
    number = error.errno if isinstance(error, OSError) else None
    return _encoder.encode((number or errno.EIO, encodable(str(error)[:_MESSAGE_CHARACTERS])))


def decode_input_failure(payload: bytes) -> OSError:
    """Return the exception for the application's ``read``. Runs in the executor."""
    failure = _input_failure_decoder.decode(payload)
    return OSError(failure.errno, f"the request's body could not be read: {failure.message}")


def encode_size(size: int) -> bytes:
    """Return a number of bytes to read, encoded."""
    return _SIZE.pack(size)


def decode_size(payload: bytes) -> int:
    """Return how many bytes to read: 1 to `CHUNK`. Raises `ProtocolViolation`."""
    if len(payload) != _SIZE.size:
        raise ProtocolViolation("a size has four bytes")
    (size,) = _SIZE.unpack(payload)
    if not 1 <= size <= CHUNK:
        raise ProtocolViolation(f"a size of {size}; the most read at once is {CHUNK}")
    return int(size)


def encodable(text: str) -> str:
    """Return the text with lone surrogates escaped, so that UTF-8 can encode it."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
