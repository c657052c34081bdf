"""The streams in the environ of an application in an executor process.

``wsgi.input`` requests data from the host, which reads the server's ``wsgi.input`` only when the application reads, and
never more than that. Text for ``wsgi.errors`` goes to that of the server. Any thread of the application may use both.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterable, Iterator
from typing import Any, Final

from rcon_plugins.executors.channel import CHUNK, Channel, ChannelClosed, ProtocolViolation
from rcon_wsgi import wire

_LINE_BUFFER: Final = 8 * 1024


class Conversation:
    """The executor's end of the channel for one request, safe for the application's threads.

    A fork of the process, and a thread that goes on after the request, get `ChannelClosed`.
    """

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._lock = threading.Lock()
        self._owner = os.getpid()
        self.over = False
        self.input_error: OSError | None = None

    @property
    def mine(self) -> bool:
        """Whether this process is the executor, not a fork of it that the application made."""
        return os.getpid() == self._owner

    def say(self, *frames: tuple[int, bytes]) -> None:
        """Send frames."""
        self._check_owner()
        with self._lock:
            self._check_open()
            self._channel.send(*frames)

    def say_last(self, *frames: tuple[int, bytes]) -> None:
        """Send the frames that end the request. Nothing can be sent or read afterwards."""
        self._check_owner()
        with self._lock:
            self._check_open()
            self.over = True
            self._channel.send(*frames)

    def ask(self, kind: int, size: int) -> bytes:
        """Return one piece of the body from the host: at most ``size`` and `CHUNK` bytes; empty at its end."""
        self._check_owner()
        with self._lock:
            self._check_open()
            self._channel.send((kind, wire.encode_size(min(size, CHUNK))))
            answer, payload = self._channel.receive()
        if answer == wire.INPUT:
            return payload
        if answer == wire.INPUT_FAILED:
            self.input_error = wire.decode_input_failure(payload)
            raise self.input_error
        raise ProtocolViolation(f"a frame of kind {answer} is no answer to a read")

    def _check_owner(self) -> None:
        # Before the lock, which another thread may have held when this process was forked.
        if os.getpid() != self._owner:
            raise ChannelClosed("a process that the application forked may not answer the request")

    def _check_open(self) -> None:
        if self.over:
            raise ChannelClosed("the request is over")


class Input:
    """``wsgi.input``: the request's body, pulled from the server as it is read."""

    def __init__(self, conversation: Conversation) -> None:
        self._ask = conversation.ask

    def read(self, size: int | None = -1, /) -> bytes:
        """Return at most ``size`` bytes, as the server's own ``read`` would; all without a size."""
        if size is None or size < 0:
            pieces = []
            while piece := self._ask(wire.READ, CHUNK):
                pieces.append(piece)
            return b"".join(pieces)
        return self._pull(wire.READ, size) if size else b""

    def readline(self, size: int | None = -1, /) -> bytes:
        """Return one line with its end, or at most ``size`` bytes of it."""
        if size is None or size < 0:
            return self._pull(wire.READLINE, None)
        return self._pull(wire.READLINE, size) if size else b""

    def readlines(self, hint: int | None = -1, /) -> list[bytes]:
        """Return the remaining lines. With a hint, stop once that many bytes have been read."""
        lines = []
        total = 0
        for line in self:
            lines.append(line)
            total += len(line)
            if hint is not None and 0 < hint <= total:
                break
        return lines

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        if line := self.readline():
            return line
        raise StopIteration

    def _pull(self, kind: int, size: int | None) -> bytes:
        """Request pieces until there are enough bytes, the line ends, or a piece is short."""
        pieces = []
        while size is None or size > 0:
            wanted = CHUNK if size is None else min(size, CHUNK)
            piece = self._ask(kind, wanted)
            pieces.append(piece)
            if size is not None:
                size -= len(piece)
            if len(piece) < wanted or (kind == wire.READLINE and piece.endswith(b"\n")):
                break
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)


class Errors:
    """``wsgi.errors``: text for the server's log, sent line by line."""

    def __init__(self, conversation: Conversation) -> None:
        self._conversation = conversation
        self._pending = ""

    def write(self, text: str, /) -> int:
        """Write text; it is sent at the end of a line, on `flush`, or with the end of the request."""
        if not isinstance(text, str):
            raise TypeError(f"wsgi.errors takes str, not {type(text).__name__}")
        self._pending += text
        if "\n" in text or len(self._pending) > _LINE_BUFFER:
            self.flush()
        return len(text)

    def writelines(self, lines: Iterable[str], /) -> None:
        """Write each of the texts."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Send the text written so far."""
        if not self._pending:
            return
        pending, self._pending = self._pending, ""
        if self._conversation.over or not self._conversation.mine:
            sys.stderr.write(pending)  # a thread or process that outlives the request
            return
        data = pending.encode("utf-8", "backslashreplace")
        for start in range(0, len(data), CHUNK):
            self._conversation.say((wire.ERRORS, data[start : start + CHUNK]))


class FileWrapper:
    """``wsgi.file_wrapper``: a file as an iterable of blocks. It is streamed: the server cannot use ``sendfile``."""

    def __init__(self, filelike: Any, block_size: int = 8192) -> None:
        self._filelike = filelike
        self._block_size = block_size
        if hasattr(filelike, "close"):
            self.close = filelike.close

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        data: bytes = self._filelike.read(self._block_size)
        if data:
            return data
        raise StopIteration
