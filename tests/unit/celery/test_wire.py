"""The frames of an answer: exactly those that this package sends."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import msgspec
import pytest

from rcon_celery import wire
from rcon_plugins.executors.channel import CHUNK, Channel, ProtocolViolation

NUMBER = b"12345678"


@pytest.fixture
def channels() -> Iterator[tuple[Channel, Channel]]:
    ours, theirs = socket.socketpair()
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2**22)
    theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2**22)
    with ours, theirs:
        yield Channel(ours), Channel(theirs)


def head(size: int, how: wire.How = "ok") -> bytes:
    payload = wire.Payload("application/json", "utf-8", size)
    return msgspec.msgpack.encode(wire.AnswerHead(NUMBER, how, "", payload))


@pytest.mark.parametrize("size", [1, 100, CHUNK, CHUNK + 1, 2 * CHUNK, 2 * CHUNK + 5])
def test_an_answer_arrives(channels: tuple[Channel, Channel], size: int) -> None:
    host, executor = channels
    data = bytes(size)
    payload = wire.Payload("application/json", "utf-8", size)
    wire.send(executor, wire.ANSWER, wire.AnswerHead(NUMBER, "ok", "", payload), data)
    assert wire.receive_answer(host, NUMBER, 2**20)[1] == data


@pytest.mark.parametrize(
    "sizes", [[1] * 10, [0, 10], [CHUNK - 1, 11], [10, CHUNK], [CHUNK + 10]], ids=lambda sizes: str(sizes[:3])
)
def test_an_answer_in_other_frames_is_refused(channels: tuple[Channel, Channel], sizes: list[int]) -> None:
    host, executor = channels
    executor.send((wire.ANSWER, head(sum(sizes))), *[(wire.DATA, bytes(size)) for size in sizes])
    with pytest.raises(ProtocolViolation, match="bytes of data are to come"):
        wire.receive_answer(host, NUMBER, 2**20)


@pytest.mark.parametrize(
    "how", ["error", "retry", "ignore", "reject", "unencodable", "too long", "too costly"]
)
def test_what_is_not_a_result_is_short(channels: tuple[Channel, Channel], how: wire.How) -> None:
    host, executor = channels
    executor.send((wire.ANSWER, head(wire.MAX_ERROR + 1, how)))
    with pytest.raises(ProtocolViolation, match="that is not a result"):
        wire.receive_answer(host, NUMBER, 2**24)
