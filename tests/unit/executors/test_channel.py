"""Frames between a host and an executor process."""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rcon_plugins.executors.channel import (
    FIRST_SERVICE_KIND,
    MAX_PAYLOAD,
    Channel,
    ChannelClosed,
    ChannelTimeout,
    Frame,
    ProtocolViolation,
)
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
    assert other.quiet
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


def test_frames_sent_before_the_channel_closed_are_read(ends: tuple[Channel, Channel]) -> None:
    one, other = ends
    one.send((20, b"last words"))
    one.close()
    assert other.receive() == (20, b"last words")
    with pytest.raises(ChannelClosed):
        other.receive()
    with pytest.raises(ChannelClosed):
        other.send((20, b"too late"))


def test_sending_fails_after_the_other_side_refused(ends: tuple[Channel, Channel]) -> None:
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


def test_quiet_means_that_nothing_waits_here_or_in_the_socket(ends: tuple[Channel, Channel]) -> None:
    one, other = ends
    assert other.quiet
    one.send((20, b"left over"))
    assert not other.quiet
    other.receive()
    assert other.quiet
    one.send((20, b"a"), (20, b"b"))
    other.receive()
    assert not other.quiet
    assert not other.drained
    other.receive()
    one.close()
    assert not other.quiet  # nobody is there


def test_frames_of_the_executor_itself_leave_the_channel_drained(ends: tuple[Channel, Channel]) -> None:
    one, other = ends
    one.send((FIRST_SERVICE_KIND, b"the last"), (1, b"its own"))
    assert other.receive().payload == b"the last"
    assert other.drained
    assert not other.quiet
    assert other.receive_within(0) == (1, b"its own")
    with pytest.raises(ChannelTimeout):
        other.receive_within(0)
    one.send((1, b"its own"), (FIRST_SERVICE_KIND, b"one more"))
    other.receive()
    assert not other.drained


def test_quiet_sees_half_a_frame() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(b"\x14")
        assert not Channel(ours).quiet


def test_a_batch_holds_the_whole_frames_that_are_here_last_first(ends: tuple[Channel, Channel]) -> None:
    one, other = ends
    one.send((20, b"a"), (21, b"bc"), (22, b""))
    assert other.receive_batch() == [(22, b""), (21, b"bc"), (20, b"a")]
    assert other.drained
    assert other.quiet


def test_a_batch_stops_before_a_frame_of_the_executor(ends: tuple[Channel, Channel]) -> None:
    one, other = ends
    one.send((20, b"a"), (1, b"ready"), (21, b"b"))
    assert other.receive_batch() == [(20, b"a")]
    assert other.drained
    assert other.receive_batch() == [(21, b"b"), (1, b"ready")]


def test_a_batch_leaves_an_incomplete_frame_and_one_above_the_bound() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        channel = Channel(ours)
        theirs.sendall(struct.pack("!BI", 20, 1) + b"a" + struct.pack("!BI", 21, 3) + b"b")
        assert channel.receive_batch() == [(20, b"a")]
        assert not channel.drained
        theirs.sendall(b"cd" + struct.pack("!BI", 22, MAX_PAYLOAD + 1))
        assert channel.receive_batch() == [(21, b"bcd")]
        with pytest.raises(ProtocolViolation):
            channel.receive_batch()


def test_the_last_frame_is_one_that_nothing_follows(ends: tuple[Channel, Channel]) -> None:
    one, other = ends
    with pytest.raises(ChannelTimeout):
        other.receive_last(0)
    one.send((1, b"ready"))
    assert other.receive_last(0) == (1, b"ready")
    one.send((1, b"ready"), (20, b"more"))
    with pytest.raises(ChannelClosed):
        other.receive_last(0)


class Trickle:
    """A socket that receives these pieces."""

    def __init__(self, *pieces: bytes) -> None:
        self.left = list(reversed(pieces))

    def recv(self, size: int) -> bytes:
        return self.left.pop()


def test_a_frame_in_small_pieces_costs_its_receiver_no_more_than_its_size() -> None:
    """Each piece must not copy all that came before it: that would be half a gigabyte here."""
    channel = Channel(Trickle(struct.pack("!BI", 20, 2**20), *[b"x" * 1024] * 1024))  # type: ignore[arg-type]
    before = time.process_time()
    payload = channel.receive().payload
    assert time.process_time() - before < 0.1
    assert (len(payload), type(payload)) == (2**20, bytes)


@pytest.mark.parametrize("size", [100, 60_000, 2**20])
def test_a_frame_byte_by_byte_is_refused(size: int) -> None:
    """To read each byte costs more than to send it: a megabyte would take seconds."""
    source = Trickle(struct.pack("!BI", 20, size), *[b"x"] * size)
    with pytest.raises(ProtocolViolation, match="in more than"):
        Channel(source).receive()  # type: ignore[arg-type]
    assert size - len(source.left) <= 20 + size // 1024


def test_frames_behind_an_incomplete_one_are_whole_too() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        channel = Channel(ours)
        whole = b"".join(struct.pack("!BI", kind, 3) + b"abc" for kind in (20, 21, 22))
        theirs.sendall(whole[:12])
        assert channel.receive() == (20, b"abc")
        left = [whole[12:13], whole[13:18], whole[18:]]
        frames = [channel.receive(lambda: theirs.sendall(left.pop(0))) for _ in range(2)]
        assert frames == [(21, b"abc"), (22, b"abc")]
        assert channel.drained


class Enough(Exception):
    pass


def test_a_sender_may_watch_something_else_meanwhile(ends: tuple[Channel, Channel]) -> None:
    one, _ = ends
    waits = 0

    def wait() -> None:
        nonlocal waits
        waits += 1
        if waits == 3:
            raise Enough

    with pytest.raises(Enough):
        one.send((20, b"x" * MAX_PAYLOAD), wait=wait)


def test_a_sender_that_watches_sends_all(ends: tuple[Channel, Channel]) -> None:
    one, other = ends
    received: list[Frame] = []
    thread = threading.Thread(target=lambda: received.extend(other.receive() for _ in range(2)))
    thread.start()
    payload = bytes(range(256)) * 4096
    one.send((20, payload), (21, b"end"), wait=lambda: time.sleep(0.001))
    thread.join()
    assert received == [(20, payload), (21, b"end")]


def test_a_receiver_may_watch_something_else_also_in_the_middle_of_a_frame() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(struct.pack("!BI", 20, 100) + b"only this")
        waits = 0

        def wait() -> None:
            nonlocal waits
            waits += 1
            if waits == 2:
                raise Enough

        with pytest.raises(Enough):
            Channel(ours).receive(wait)
