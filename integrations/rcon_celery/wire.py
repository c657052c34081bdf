"""The messages of one task between the pool's process and an executor process.

::

    pool's process           executor process
      TASK head, DATA*   ->
                        <-     ANSWER head, DATA*

A head has the size and the encoding of the payload, which the ``DATA`` frames carry. A task and its answer begin with
the same random number, so a message that an earlier task left behind is not taken for the answer. The pool's process
does not trust an executor process: it decodes a head into `AnswerHead`, and a payload with the serializers that the
application accepts, if that is cheap (`rcon_celery.decoding_cost`). Anything else is a `ProtocolViolation`.
"""

from __future__ import annotations

from typing import Final, Literal, TypeVar

import msgspec

from rcon_plugins.executors.channel import CHUNK, FIRST_SERVICE_KIND, Channel, Frame, ProtocolViolation

TASK: Final = FIRST_SERVICE_KIND
DATA: Final = TASK + 1
ANSWER: Final = TASK + 2

#: The size of a task's random number, bytes.
NUMBER_SIZE: Final = 8
_TEXT_CHARACTERS: Final = 64 * 1024

#: The longest answer that is not a result, bytes. Celery writes it as text several times.
MAX_ERROR: Final = 1024 * 1024
#: The most lines of the texts of an exception. A traceback handles each line by itself, several times.
MAX_ERROR_LINES: Final = 10_000

How = Literal["ok", "error", "retry", "ignore", "reject", "unencodable", "too long", "too costly"]


class Payload(msgspec.Struct, array_like=True, forbid_unknown_fields=True, frozen=True):
    """How a payload is encoded, and its size in bytes."""

    content_type: str
    content_encoding: str
    size: int


class TaskHead(msgspec.Struct, array_like=True, forbid_unknown_fields=True, frozen=True):
    """A task to run.

    ``payload`` holds its arguments and request; ``max_result`` is the largest answer, in bytes. ``leave_children``:
    processes that the task started may go on after it.
    """

    number: bytes
    name: str
    payload: Payload
    max_result: int
    leave_children: bool = False


class AnswerHead(msgspec.Struct, array_like=True, forbid_unknown_fields=True, frozen=True):
    """How a task ended.

    ``text`` is a traceback, the repr of a result that no serializer can encode, the size of the answer, or why decoding
    it would cost too much. ``busy`` is whether threads that the task started still run.
    """

    number: bytes
    how: How
    text: str
    payload: Payload
    busy: bool = False


_encoder = msgspec.msgpack.Encoder()
_task_decoder = msgspec.msgpack.Decoder(TaskHead)
_answer_decoder = msgspec.msgpack.Decoder(AnswerHead)
_Head = TypeVar("_Head", TaskHead, AnswerHead)


def send(channel: Channel, kind: int, head: TaskHead | AnswerHead, data: bytes) -> None:
    """Send a head and its payload, in as many frames as that takes. Raises `ChannelClosed`."""
    first = (kind, _encoder.encode(head))
    if len(data) <= CHUNK:
        channel.send(first, (DATA, data))
        return
    channel.send(first)
    with memoryview(data) as view:
        for start in range(0, len(view), CHUNK):
            channel.send((DATA, bytes(view[start : start + CHUNK])))


def receive_task(channel: Channel, frame: Frame) -> tuple[TaskHead, bytes]:
    """Receive a task, whose head is in ``frame``. Raises `ChannelClosed`, `ProtocolViolation`."""
    head = _decode(frame, TASK, _task_decoder)
    return head, bytes(_receive_data(channel, head.payload.size))


def receive_answer(channel: Channel, number: bytes, max_result: int) -> tuple[AnswerHead, bytearray]:
    """Receive the answer to the task with this number. Raises `ChannelClosed`, `ProtocolViolation`."""
    head = _decode(channel.receive(), ANSWER, _answer_decoder)
    if head.number != number:
        raise ProtocolViolation("the executor process answered another task")
    size = head.payload.size
    if not 0 < size <= max_result:
        raise ProtocolViolation(f"an answer of {size} bytes, where max_result is {max_result} bytes")
    if size > MAX_ERROR and head.how != "ok":
        raise ProtocolViolation(
            f"an answer of {size} bytes that is not a result, where the most is {MAX_ERROR}"
        )
    data = _receive_data(channel, size)
    if not channel.drained:
        raise ProtocolViolation("a frame after the end of the answer")
    return head, data


def shortened(text: str) -> str:
    """Return the text in a form that UTF-8 can encode. Cut out the middle of a long text."""
    if len(text) > _TEXT_CHARACTERS:
        half = _TEXT_CHARACTERS // 2
        text = f"{text[:half]}\n[...]\n{text[-half:]}"
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _receive_data(channel: Channel, size: int) -> bytearray:
    """Receive a payload, in the frames that `send` makes. Many small ones would cost us more than their sender."""
    data = bytearray()
    left = size
    while True:
        frame = channel.receive()
        if frame.kind != DATA or len(frame.payload) != min(left, CHUNK):
            raise ProtocolViolation(
                f"a frame of kind {frame.kind}, {len(frame.payload)} bytes, where {left} bytes of data are to come"
            )
        data += frame.payload
        left -= len(frame.payload)
        if not left:
            return data


def _decode(frame: Frame, kind: int, decoder: msgspec.msgpack.Decoder[_Head]) -> _Head:
    if frame.kind != kind:
        raise ProtocolViolation(f"a frame of kind {frame.kind} instead of a head, kind {kind}")
    try:
        return decoder.decode(frame.payload)
    except msgspec.MsgspecError as error:
        raise ProtocolViolation(f"the head of a message cannot be decoded: {error}") from None
