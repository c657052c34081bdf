"""The messages of one task between the host and an executor process.

::

    host                     executor
      TASK head, DATA*   ->
                        <-     ANSWER head, DATA*

A head says how long the body is that the ``DATA`` frames make up, and how it is encoded. A task begins with a number
that nobody can know before, and so does its answer: what an earlier work left behind cannot pass for one. All the
executor says is hostile: a head is decoded into `Answer`, a body with the serializers that the application accepts,
and anything else is a `ProtocolViolation`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, Literal, TypeVar

import msgspec

from rcon_plugins.executors.channel import CHUNK, FIRST_SERVICE_KIND, Channel, Frame, ProtocolViolation

TASK: Final = FIRST_SERVICE_KIND
DATA: Final = TASK + 1
ANSWER: Final = TASK + 2

#: How many bytes the number of a task has.
NUMBER_SIZE: Final = 8
_TEXT_CHARACTERS: Final = 64 * 1024

How = Literal["ok", "error", "retry", "ignore", "reject", "unencodable", "too long"]


class Body(msgspec.Struct, array_like=True, forbid_unknown_fields=True, frozen=True):
    """Something encoded: how, and what."""

    content_type: str
    content_encoding: str
    size: int


class TaskHead(msgspec.Struct, array_like=True, forbid_unknown_fields=True, frozen=True):
    """A task to be run: its name, how its arguments and request are encoded, and how long its answer may be."""

    number: bytes
    name: str
    body: Body
    longest: int


class AnswerHead(msgspec.Struct, array_like=True, forbid_unknown_fields=True, frozen=True):
    """How a task ended. ``text``: a traceback, or why its result could not be encoded, or how long it is.

    ``busy``: threads go on that it has started.
    """

    number: bytes
    how: How
    text: str
    body: Body
    busy: bool = False


_encoder = msgspec.msgpack.Encoder()
_task_decoder = msgspec.msgpack.Decoder(TaskHead)
_answer_decoder = msgspec.msgpack.Decoder(AnswerHead)
_Head = TypeVar("_Head", TaskHead, AnswerHead)


def send(channel: Channel, kind: int, head: TaskHead | AnswerHead, body: bytes) -> None:
    """Send a head and its body, in as many frames as that takes. Raises `ChannelClosed`."""
    first = (kind, _encoder.encode(head))
    if len(body) <= CHUNK:
        channel.send(first, (DATA, body))
        return
    channel.send(first)
    with memoryview(body) as view:
        for start in range(0, len(view), CHUNK):
            channel.send((DATA, bytes(view[start : start + CHUNK])))


def receive_body(channel: Channel, size: int) -> bytes:
    """The body that follows a head. Raises `ChannelClosed`, `ProtocolViolation`."""
    body = bytearray()
    while True:
        frame = channel.receive()
        if frame.kind != DATA or len(body) + len(frame.payload) > size:
            raise ProtocolViolation("a body that is not what its head says")
        body += frame.payload
        if len(body) == size:
            return bytes(body)
        if not frame.payload:
            raise ProtocolViolation("an empty piece of a body")


def decode_task(frame: Frame) -> TaskHead:
    """A task's head. Runs in the executor. Raises `ProtocolViolation`."""
    return _decode(frame, TASK, _task_decoder.decode)


def decode_answer(frame: Frame) -> AnswerHead:
    """An answer's head, as an executor sent it. Raises `ProtocolViolation`."""
    return _decode(frame, ANSWER, _answer_decoder.decode)


def shortened(text: str) -> str:
    """The text as it crosses: no more of it than is sensible, and such that it can be UTF-8."""
    if len(text) > _TEXT_CHARACTERS:
        half = _TEXT_CHARACTERS // 2
        text = f"{text[:half]}\n[...]\n{text[-half:]}"
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _decode(frame: Frame, kind: int, decode: Callable[[bytes], _Head]) -> _Head:
    if frame.kind != kind:
        raise ProtocolViolation(f"a frame of kind {frame.kind} where a head is due")
    try:
        return decode(frame.payload)
    except msgspec.MsgspecError as error:
        raise ProtocolViolation(f"not a head: {error}") from None
