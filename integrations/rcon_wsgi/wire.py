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
                                <-     DONE | ERROR             (the work is over)

``DONE`` without ``END`` means both. A request begins with a number that nobody can know before, and so do the payloads
of its ``START``, ``DONE`` and ``ERROR``: what an earlier work left behind cannot pass for an answer. The request's body
is pulled: the host reads the server's ``wsgi.input`` when, and only as far as, the application asks, and no frame
follows a ``READ`` until it is answered. Only the first chunk may be empty.

All the executor says is hostile: it is decoded into the types below, and anything that is not what this protocol has is
a `ProtocolViolation`.
"""

from __future__ import annotations

import errno
import re
import struct
import traceback
from collections.abc import Iterable
from typing import Final

import msgspec

from rcon_plugins.executors.channel import CHUNK, FIRST_SERVICE_KIND, ProtocolViolation

REQUEST: Final = FIRST_SERVICE_KIND
REQUEST_PART: Final = REQUEST + 1
INPUT: Final = REQUEST + 2
INPUT_FAILED: Final = REQUEST + 3

START: Final = FIRST_SERVICE_KIND + 16
DATA: Final = START + 1
#: The one chunk of a result whose ``len()`` is 1; a server may derive Content-Length from that.
ONLY: Final = START + 2
END: Final = START + 3
DONE: Final = START + 4
ERROR: Final = START + 5
ERRORS: Final = START + 6
READ: Final = START + 7
READLINE: Final = START + 8

#: How many bytes the number of a request has.
NUMBER_SIZE: Final = 8

_SIZE = struct.Struct("!I")
_FORBIDDEN = re.compile(r"[\r\n\0]|[^\x00-\xff]")
_MESSAGE_CHARACTERS = 8 * 1024
_TRACEBACK_CHARACTERS = 64 * 1024


class Start(msgspec.Struct, array_like=True, forbid_unknown_fields=True, frozen=True):
    """Status and headers."""

    status: str
    headers: list[tuple[str, str]]


class Failure(msgspec.Struct, array_like=True, forbid_unknown_fields=True, frozen=True):
    """An exception of the application, as text; ``input_failed``: it is the one that the host had sent over."""

    type_name: str
    message: str
    traceback_text: str
    input_failed: bool


class InputFailure(msgspec.Struct, array_like=True, forbid_unknown_fields=True, frozen=True):
    """Why the host could not read the request's body."""

    errno: int
    message: str


def _as_plain_str(value: object) -> str:
    if isinstance(value, str):
        return str.__str__(value)
    raise TypeError(f"{value!r} is not a str")


_encoder = msgspec.msgpack.Encoder(enc_hook=_as_plain_str)
_start_decoder = msgspec.msgpack.Decoder(Start)
_failure_decoder = msgspec.msgpack.Decoder(Failure)
_input_failure_decoder = msgspec.msgpack.Decoder(InputFailure)


def encode_start(status: str, headers: Iterable[tuple[str, str]]) -> bytes:
    """Status and headers as they cross. Raises TypeError or ValueError for what no response may have."""
    pairs = list(headers)
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


def decode_start(payload: bytes) -> Start:
    """Status and headers as an executor sent them. Raises `ProtocolViolation`."""
    try:
        start = _start_decoder.decode(payload)
    except msgspec.MsgspecError as error:
        raise ProtocolViolation(f"not a status and headers: {error}") from None
    text = start.status + "".join([name + value for name, value in start.headers])
    if _FORBIDDEN.search(text) is not None:
        raise ProtocolViolation("a line break, NUL or non-latin character in the status or a header")
    return start


def encode_failure(error: BaseException, *, input_failed: bool) -> bytes:
    """An exception of the application as it crosses."""
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
    """An application's exception as an executor sent it. Raises `ProtocolViolation`."""
    try:
        return _failure_decoder.decode(payload)
    except msgspec.MsgspecError as error:
        raise ProtocolViolation(f"not a failure: {error}") from None


def encode_input_failure(error: Exception) -> bytes:
    """The server's exception while the body was read, as it crosses to the executor."""
    number = error.errno if isinstance(error, OSError) else None
    return _encoder.encode((number or errno.EIO, encodable(str(error)[:_MESSAGE_CHARACTERS])))


def decode_input_failure(payload: bytes) -> OSError:
    """What the application's ``read`` raises. Runs in the executor."""
    failure = _input_failure_decoder.decode(payload)
    return OSError(failure.errno, f"the request's body could not be read: {failure.message}")


def encode_size(size: int) -> bytes:
    """How much the application wants to read at once."""
    return _SIZE.pack(size)


def decode_size(payload: bytes) -> int:
    """How much an executor wants read at once: 1 to `CHUNK`. Raises `ProtocolViolation`."""
    if len(payload) != _SIZE.size:
        raise ProtocolViolation("a size has four bytes")
    (size,) = _SIZE.unpack(payload)
    if not 1 <= size <= CHUNK:
        raise ProtocolViolation(f"a size of {size}; the most read at once is {CHUNK}")
    return int(size)


def encodable(text: str) -> str:
    """The text with lone surrogates written out, so that it can be UTF-8."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
