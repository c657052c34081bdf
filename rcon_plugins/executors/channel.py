"""Framed messages between a host and one of its executor processes, over a socket pair.

A frame is one byte of kind, four bytes of length (network order), and the payload. The service defines what a frame
means; only the kinds below ``FIRST_SERVICE_KIND`` belong to the executor itself.

All data from an executor process is treated as hostile: the size of a frame is bounded, and nothing is unpickled. Each
side needs memory for one frame and the kernel's socket buffer at most. A sender blocks until the other side reads; that
is the back-pressure that streamed bodies need.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

_HEADER = struct.Struct("!BI")
_HEADER_SIZE = _HEADER.size

#: The largest payload of one frame, bytes. Longer data is sent in several frames.
MAX_PAYLOAD = 1024 * 1024
#: A good size for the pieces of a streamed body, bytes.
CHUNK = 64 * 1024
_READ = CHUNK + _HEADER_SIZE
#: A frame that comes in smaller pieces than this on the average is refused, after the first ``_FREE_READS`` reads. A
#: read costs this process more than the other side pays for a byte. The kernel cuts what a sender writes into far
#: larger pieces.
_LEAST_READ, _FREE_READS = 1024, 16
#: Kinds below this one belong to the executor itself; services number their kinds from here.
FIRST_SERVICE_KIND = 16
#: The executor process waits for work. Sent after CONFINED, and last after each unit of work. Payload of the first: the
#: names of its other threads, which the application has started.
READY = 1
#: The new executor process could not be confined, or prepared for work. Sent in place of CONFINED or of the first
#: READY. Payload: the reason, as text.
FAILED = 2
#: The confinement has as many processes as it may. Sent in place of CONFINED. Payload: the reason, as text.
FULL = 3
#: The executor process is confined. Its first frame. Payload: `CONFINED_RECORD`.
CONFINED = 4


#: Plain numbers: combining members of an enum takes longer than the system call.
_AT_ONCE = int(socket.MSG_DONTWAIT)
_LOOK = int(socket.MSG_PEEK | socket.MSG_DONTWAIT)

_NOT_OURS = "this process is a fork of the channel's owner and may not use it"


class Frame(NamedTuple):
    """One message: a kind of one byte, and its payload."""

    kind: int
    payload: bytes


#: Makes a frame of a kind and a payload. The constructor of a `NamedTuple` is a function in Python, and takes thrice
#: as long.
_make_frame: Callable[[tuple[int, bytes]], Frame] = partial(tuple.__new__, Frame)


class ChannelClosed(Exception):
    """Raised when the other side has closed the channel, or when this process may no longer use it."""


class ChannelTimeout(ChannelClosed):
    """Raised when no frame arrived in time."""


class ProtocolViolation(ChannelClosed):
    """Raised when the other side sent a message that the protocol does not allow."""


class Channel:
    """One end of the socket pair. Not thread-safe: one unit of work at a time owns it.

    A fork of the process that made it can neither send nor receive. So a process that confined code forks cannot answer
    in place of its parent.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        #: gevent's socket waits despite MSG_DONTWAIT; the plain socket inside it does not.
        self._plain: socket.socket = getattr(sock, "_sock", sock)
        #: A bytearray while a frame is incomplete, so that one that comes byte by byte is not copied for each.
        self._buffer: bytes | bytearray = b""
        self._position = 0
        self._owner = os.getpid()
        #: Whether all of the service's frames that were read from the socket have been received. The executor's own
        #: frames may follow them.
        self.drained = True
        #: Returns why nothing that the other side sent may be used any more; None as long as it may. See `check`.
        self.why_void: Callable[[], str | None] | None = None

    def fileno(self) -> int:
        """The socket's descriptor, to poll."""
        return self._socket.fileno()

    @property
    def quiet(self) -> bool:
        """Whether the other side is alive and no data from it waits to be received, here or in the socket."""
        if self._buffer:
            return False
        try:
            self._plain.recv(1, _LOOK)
        except BlockingIOError:
            return True
        except OSError:
            return False
        return False

    def send(self, *frames: tuple[int, bytes], wait: Callable[[], object] | None = None) -> None:
        """Send frames, in one system call where they fit. Blocks while the other side does not read.

        With ``wait`` it does not block itself: it calls ``wait`` each time the other side has to read before more can
        be sent. ``wait`` returns when that may have happened. An exception of ``wait`` is passed on; do not use the
        channel after that.

        Raises `ChannelClosed` when the other side is gone.
        """
        if os.getpid() != self._owner:
            raise ChannelClosed(_NOT_OURS)
        parts: list[bytes] = []
        for kind, payload in frames:
            if len(payload) > MAX_PAYLOAD:
                raise ValueError(f"a frame holds at most {MAX_PAYLOAD} bytes, not {len(payload)}")
            parts.append(_HEADER.pack(kind, len(payload)))
            parts.append(payload)
        try:
            if wait is None:
                self._socket.sendall(b"".join(parts))
            else:
                self._send_watching(b"".join(parts), wait)
        except OSError as error:
            raise ChannelClosed(str(error)) from error

    def receive(self, wait: Callable[[], object] | None = None, *, at_once: bool = False) -> Frame:
        """Return the next frame. Blocks until it is whole.

        ``wait`` is called before each read of the socket, so that it can wait for other events too. An exception of
        ``wait`` is passed on. With ``at_once``, raise `ChannelTimeout` instead of blocking.

        Raises `ChannelClosed` at the end of the stream, `ProtocolViolation` for a frame above the bound, or for one
        that comes in tiny pieces.
        """
        if os.getpid() != self._owner:
            raise ChannelClosed(_NOT_OURS)
        reads = 0
        while True:
            buffer, position = self._buffer, self._position
            start = position + _HEADER_SIZE
            if len(buffer) >= start:
                kind, length = _HEADER.unpack_from(buffer, position)
                if length > MAX_PAYLOAD:
                    raise ProtocolViolation(f"a frame of {length} bytes; the most is {MAX_PAYLOAD}")
                end = start + length
                if len(buffer) >= end:
                    break
                if reads > _FREE_READS + length // _LEAST_READ:
                    raise ProtocolViolation(f"a frame of {length} bytes in more than {reads} pieces")
            if wait is not None:
                wait()
            self._fill(at_once)
            reads += 1
        payload = buffer[start:end] if isinstance(buffer, bytes) else _copied(buffer, start, end)
        self._advance(end)
        return _make_frame((kind, payload))

    def receive_batch(self, wait: Callable[[], object] | None = None) -> list[Frame]:
        """Return the next frames, last first: at least one, and all further frames of the service received already.

        Stop before a frame of the executor itself, and before a frame above the bound. Otherwise like `receive`.
        """
        frames = [self.receive(wait)]
        buffer, position, size = self._buffer, self._position, len(self._buffer)
        while size - position >= _HEADER_SIZE:
            kind, length = _HEADER.unpack_from(buffer, position)
            start = position + _HEADER_SIZE
            if kind < FIRST_SERVICE_KIND or length > MAX_PAYLOAD or start + length > size:
                break
            position = start + length
            payload = (
                buffer[start:position] if isinstance(buffer, bytes) else _copied(buffer, start, position)
            )
            frames.append(_make_frame((kind, payload)))
        if len(frames) > 1:
            self._advance(position)
            frames.reverse()
        return frames

    def check(self) -> None:
        """Raise `ChannelClosed` if what was received must not be used: the other side survived an OOM kill."""
        if self.why_void is not None and (why := self.why_void()) is not None:
            raise ChannelClosed(why)

    def receive_within(self, seconds: float) -> Frame:
        """Return the next frame, if it comes in so many seconds. Raises like `receive`, and `ChannelTimeout`.

        With 0, do not wait.
        """
        # Nearly always the frame has arrived. To wait for it costs three more system calls.
        try:
            return self.receive(at_once=True)
        except ChannelTimeout:
            if not seconds:
                raise
        self._socket.settimeout(seconds)
        try:
            return self.receive()
        finally:
            with contextlib.suppress(OSError):  # closed by now
                self._socket.settimeout(None)

    def receive_last(self, seconds: float) -> Frame:
        """Return the next frame like `receive_within`. Raise `ChannelClosed` if the other side is not `quiet` then."""
        frame = self.receive_within(seconds)
        if not self.quiet:
            raise ChannelClosed("the other side has closed the channel, or has sent another frame")
        return frame

    def refuse(self) -> None:
        """Stop reading. From now on, sending fails on the other side as on a closed channel."""
        try:
            self._socket.shutdown(socket.SHUT_RD)
        except OSError:
            return  # the other side is gone already

    def hang_up(self) -> None:
        """Shut the socket down but keep the descriptor. A thread that waits in `receive` reads an end of file.

        Any thread may call it while another one uses the channel; that is not true of `close`.
        """
        with contextlib.suppress(OSError):  # the other side is gone already
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close this end."""
        self._socket.close()

    def _send_watching(self, data: bytes, wait: Callable[[], object]) -> None:
        left = memoryview(data)
        while left:
            try:
                left = left[self._socket.send(left, socket.MSG_DONTWAIT) :]
            except BlockingIOError:
                wait()

    def _advance(self, position: int) -> None:
        """Note that all before ``position`` in the buffer has been received."""
        if position == len(self._buffer):
            self._buffer, self._position, self.drained = b"", 0, True
        else:
            self._position, self.drained = position, self._buffer[position] < FIRST_SERVICE_KIND

    def _fill(self, at_once: bool) -> None:
        """Read from the socket once, and append to the buffer. With ``at_once``, do not wait."""
        try:
            data = self._plain.recv(_READ, _AT_ONCE) if at_once else self._socket.recv(_READ)
        except (BlockingIOError, TimeoutError) as error:
            raise ChannelTimeout("no frame arrived in time") from error
        except OSError as error:
            raise ChannelClosed(str(error)) from error
        if not data:
            raise ChannelClosed("the other side closed the channel")
        if not self._buffer:
            self._buffer, self.drained = data, data[0] < FIRST_SERVICE_KIND
            return
        if isinstance(self._buffer, bytes):
            self._buffer = bytearray(memoryview(self._buffer)[self._position :])
        else:
            del self._buffer[: self._position]
        self._position = 0
        self._buffer += data


def _copied(buffer: bytearray, start: int, end: int) -> bytes:
    with memoryview(buffer) as view:
        return bytes(view[start:end])
