"""Frames between a host and an executor process."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rcon_plugins.executors.channel import MAX_PAYLOAD, Channel, ChannelClosed, Frame, ProtocolViolation
from tests.children import in_child


@pytest.fixture
def ends() -> Iterator[tuple[Channel, Channel]]:
    one, other = (Channel(end) for end in socket.socketpair())
    yield one, other
    one.close()
    other.close()


@given(st.lists(st.tuples(st.integers(0, 255), st.binary(max_size=3000)), min_size=1, max_size=20))
def test_frames_arrive_as_they_were_sent(frames: list[tuple[int, bytes]]) -> None:
    one, other = (Channel(end) for end in socket.socketpair())
    one.send(*frames)
    assert [other.receive() for _ in frames] == [Frame(*frame) for frame in frames]
    assert not other.buffered
    one.close()
    other.close()


def test_a_large_frame_waits_for_its_reader(ends: tuple[Channel, Channel]) -> None:
    one, other = ends
    sent = threading.Event()

    def send() -> None:
        one.send((20, b"x" * MAX_PAYLOAD), (21, b""))
        sent.set()

    thread = threading.Thread(target=send)
    thread.start()
    assert not sent.wait(0.2)  # the sender is held back
    assert other.receive() == (20, b"x" * MAX_PAYLOAD)
    assert other.receive() == (21, b"")
    thread.join()


def test_the_sender_may_not_send_more_than_a_frame_holds(ends: tuple[Channel, Channel]) -> None:
    with pytest.raises(ValueError, match="at most"):
        ends[0].send((20, b"x" * (MAX_PAYLOAD + 1)))


def test_a_frame_above_the_bound_is_refused_unread() -> None:
    ours, theirs = socket.socketpair()
    theirs.sendall(struct.pack("!BI", 20, MAX_PAYLOAD + 1))
    channel = Channel(ours)
    with pytest.raises(ProtocolViolation):
        channel.receive()
    channel.close()
    theirs.close()


def test_a_frame_cut_short_is_a_closed_channel(ends: tuple[Channel, Channel]) -> None:
    ours, theirs = socket.socketpair()
    theirs.sendall(struct.pack("!BI", 20, 100) + b"only this")
    theirs.close()
    channel = Channel(ours)
    with pytest.raises(ChannelClosed):
        channel.receive()
    channel.close()


def test_what_was_sent_before_the_end_is_still_read(ends: tuple[Channel, Channel]) -> None:
    one, other = ends
    one.send((20, b"last words"))
    one.close()
    assert other.receive() == (20, b"last words")
    with pytest.raises(ChannelClosed):
        other.receive()
    with pytest.raises(ChannelClosed):
        other.send((20, b"too late"))


def test_who_refuses_is_not_sent_to(ends: tuple[Channel, Channel]) -> None:
    one, other = ends
    one.refuse()
    with pytest.raises(ChannelClosed):
        other.send((20, b"x"))


def test_a_fork_may_not_speak(ends: tuple[Channel, Channel]) -> None:
    one, other = ends

    def fork() -> list[str]:
        said = []
        for act in (lambda: one.send((20, b"x")), one.receive):
            with pytest.raises(ChannelClosed) as raised:
                act()
            said.append(str(raised.value))
        return said

    assert all("fork" in said for said in in_child(fork))
    one.send((20, b"its owner may"))
    assert other.receive().payload == b"its owner may"
