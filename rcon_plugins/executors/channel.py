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
from typing import NamedTuple

_HEADER = struct.Struct("!BI")

#: The largest payload of one frame, bytes. Longer data is sent in several frames.
MAX_PAYLOAD = 1024 * 1024
#: A good size for the pieces of a streamed body, bytes.
CHUNK = 64 * 1024
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


_NOT_OURS = "this process is a fork of the channel's owner and may not use it"


class Frame(NamedTuple):
    """One message: a kind of one byte, and its payload."""

    kind: int
    payload: bytes


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
        # gevent's socket waits despite the flags; the plain socket inside it does not.
        inner = getattr(self._socket, "_sock", self._socket)
        try:
            inner.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
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

    def receive(self, wait: Callable[[], object] | None = None) -> Frame:
        """Return the next frame. Blocks until it is whole.

        ``wait`` is called before each read of the socket, so that it can wait for other events too. An exception of
        ``wait`` is passed on.

        Raises `ChannelClosed` at the end of the stream, `ProtocolViolation` for a frame above the bound, or for one
        that comes in tiny pieces.
        """
        if os.getpid() != self._owner:
            raise ChannelClosed(_NOT_OURS)
        reads = 0
        while True:
            start = self._position + _HEADER.size
            if len(self._buffer) >= start:
                kind, length = _HEADER.unpack_from(self._buffer, self._position)
                if length > MAX_PAYLOAD:
                    raise ProtocolViolation(f"a frame of {length} bytes; the most is {MAX_PAYLOAD}")
                end = start + length
                if len(self._buffer) >= end:
                    break
                if reads > _FREE_READS + length // _LEAST_READ:
                    raise ProtocolViolation(f"a frame of {length} bytes in more than {reads} pieces")
            if wait is not None:
                wait()
            self._fill()
            reads += 1
        if isinstance(self._buffer, bytes):
            payload = self._buffer[start:end]
        else:
            with memoryview(self._buffer) as view:
                payload = bytes(view[start:end])
        if end == len(self._buffer):
            self._buffer, self._position, self.drained = b"", 0, True
        else:
            self._position, self.drained = end, self._buffer[end] < FIRST_SERVICE_KIND
        return Frame(kind, payload)

    def receive_batch(self, wait: Callable[[], object] | None = None) -> list[Frame]:
        """Return the next frames, last first: at least one, and all further frames of the service received already.

        Stop before a frame of the executor itself, and before a frame above the bound. Otherwise like `receive`.
        """
        frames = [self.receive(wait)]
        buffer, position, size = self._buffer, self._position, len(self._buffer)
        while size - position >= _HEADER.size:
            kind, length = _HEADER.unpack_from(buffer, position)
            start = position + _HEADER.size
            if kind < FIRST_SERVICE_KIND or length > MAX_PAYLOAD or start + length > size:
                break
            position = start + length
            with memoryview(buffer) as view:
                frames.append(Frame(kind, bytes(view[start:position])))
        if position == size:
            self._buffer, self._position, self.drained = b"", 0, True
        else:
            self._position, self.drained = position, buffer[position] < FIRST_SERVICE_KIND
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
        self._socket.settimeout(seconds)
        try:
            return self.receive()
        except ChannelClosed as error:
            if isinstance(error.__cause__, TimeoutError | BlockingIOError):
                raise ChannelTimeout(f"no frame within {seconds:g} s") from error
            raise
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

    def _fill(self) -> None:
        """Read from the socket once, and append to the buffer."""
        try:
            data = self._socket.recv(CHUNK + _HEADER.size)
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
