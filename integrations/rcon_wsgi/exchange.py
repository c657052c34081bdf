"""One request in an executor process, seen from the host: the exchange of frames, the client, and bounds on rates.

A frame costs its sender almost nothing but the host some microseconds. So a tenant limited to a twentieth of a CPU
could keep a whole CPU of the host busy. `FrameRateLimiter` and `ErrorLog` prevent that. They bound rates, not totals,
so that they never stop a response that sends little data for hours.
"""

from __future__ import annotations

import enum
import errno
import os
import select
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, Final, Literal

from rcon_plugins.connections import cut, reset_on_close
from rcon_plugins.errors import ApplicationError
from rcon_plugins.executors.channel import CHUNK, ChannelClosed, Frame, ProtocolViolation
from rcon_plugins.executors.output import escape_unprintable, log_prefix, prefix_lines
from rcon_plugins.outcome import Outcome
from rcon_wsgi import wire
from rcon_wsgi.request import ANSWERED, respond

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse

    from rcon_plugins.confinement.admission import ProcessAdmission

_CLIENT_GONE: Final = "the client closed the connection"
#: Hold back a response of status 500 up to this size, until the outcome shows whether a limit was the cause.
_MAX_HELD: Final = CHUNK

#: Frames with fewer bytes than this are small. Only small frames are counted.
SMALL_FRAME: Final = 4096
#: The number of small frames in one window.
WINDOW_FRAMES: Final = 1000
#: The least time for one window, seconds. If a window took less, the host waits for the rest of this time.
_MIN_WINDOW_SECONDS: Final = 0.04
#: After a window that took less than this, chunks received together are joined for the server.
_FAST_WINDOW_SECONDS: Final = 1.0

#: How much one request may log in a minute: in characters, including the prefix of each line, and in frames.
LOG_CHARACTERS: Final = 256 * 1024
LOG_FRAMES: Final = 1000
#: The longest part of one line that is shown, characters.
LINE_CHARACTERS: Final = 8 * 1024
_MINUTE: Final = 60.0

#: How many frames to read from an executor after its client has left, because one of them may end the work. Without
#: this bound, an executor that never stops sending would be read for ever.
_MAX_READS_WITHOUT_CLIENT: Final = 16


class ResponseCut(ConnectionResetError):
    """Raised in the middle of a response when its work was ended, or its client has gone.

    Servers expect errors of this type from connections. They close the connection, and send nothing that would make the
    response look complete. ``outcome`` has the cause.
    """

    def __init__(self, reason: str, outcome: Outcome | None = None) -> None:
        super().__init__(errno.ECONNRESET, f"the response was cut off: {reason}")
        self.outcome = outcome


class _Failed(Exception):
    """Raised when the application raised an exception. Has that exception and the outcome."""

    def __init__(self, error: Exception, outcome: Outcome) -> None:
        super().__init__(error, outcome)
        self.error = error
        self.outcome = outcome


class Exchange:
    """One request in an executor process. It is also the iterable of the response that the server gets."""

    __slots__ = (
        "_admission",
        "_channel",
        "_client",
        "_ending",
        "_environ",
        "_frames",
        "_has_data",
        "_input_error",
        "_left",
        "_limiter",
        "_log",
        "_pending",
        "_state",
        "_status",
        "number",
    )

    def __init__(
        self, environ: dict[str, Any], admission: ProcessAdmission, client: socket.socket | None
    ) -> None:
        self._environ = environ
        self._admission = admission
        self._channel = admission.channel
        self._client = None if client is None else Client(client, self._channel.fileno())
        self._log: ErrorLog | None = None
        self._limiter = FrameRateLimiter()
        #: The number of the request. The frames of the answer begin with it, so that an answer to an earlier request is
        #: not taken for the answer to this one.
        self.number = os.urandom(wire.NUMBER_SIZE)
        self._frames: list[Frame] = []  # received and not looked at yet, last first
        self._pending: list[bytes] = []  # chunks not given to the server yet, last first
        self._has_data = False
        self._input_error: Exception | None = None
        self._state: Literal["running", "ended", "settled"] = "running"
        self._ending: Literal["ok", "error"] = "ok"
        self._status = ""
        #: The bytes of the body that the server has not got yet; None if the headers do not say how many there are.
        self._left: int | None = None

    def begin(self, start_response: StartResponse) -> Iterable[bytes]:
        """Send the request to the executor process and wait for the first frame of its response."""
        client, wait = self._client, None
        if client is not None:
            self._admission.on_deadline = client.stop_waiting
            wait = client.wait_to_send
        try:
            self._channel.send(*wire.encode_request(self.number, self._environ), wait=wait)
            kind, payload = self._next()
            if kind == wire.START:
                return self._start(start_response, wire.decode_start(self._answer(payload)))
            if kind == wire.ERROR:
                raise self._failed(payload)
            raise ProtocolViolation(f"a response cannot begin with a frame of kind {kind}")
        except _Failed as failed:
            if failed.outcome.ending not in ANSWERED:
                return self._respond(start_response, failed.outcome)
            raise failed.error from None
        except ChannelClosed:
            return self._respond(start_response, self._died())
        except ClientGone:
            raise self._abandoned() from None
        except BaseException as error:
            self._abort(f"{type(error).__name__}: {error}")
            raise

    def _start(self, start_response: StartResponse, start: wire.Start) -> Iterable[bytes]:
        self._status = start.status
        if start.status.startswith("500"):
            self._ending = "error"
            outcome, only = self._hold_back()
            if outcome is not None and outcome.ending not in ANSWERED:
                return self._respond(start_response, outcome)
            self._begin_body(start_response, start)
            return _SizedExchange(self) if only else self
        kind, payload = self._next()
        if kind == wire.ONLY:
            return self._only(start_response, start, payload)
        self._take(kind, payload)
        self._begin_body(start_response, start)
        return self

    def _begin_body(self, start_response: StartResponse, start: wire.Start) -> None:
        """Give the server the headers of a response whose body it then iterates over."""
        self._left = wire.body_length(start, self._environ["REQUEST_METHOD"])
        self._hand_over()
        start_response(start.status, start.headers)

    def _respond(self, start_response: StartResponse, outcome: Outcome) -> list[bytes]:
        return respond(self._environ, start_response, self._admission.work, outcome)

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        try:
            if not self._pending and self._state == "running":
                if self._client is not None:
                    # A client that has the whole response may leave before the application has ended.
                    if self._left is not None and self._left <= 0:
                        self._client.release()
                    self._client.enter(Stage.EXECUTOR)
                self._take(*self._next())
            if self._pending:
                self._hand_over()
                chunk = self._pending.pop()
                if self._left is not None:
                    self._left -= len(chunk)
                return chunk
        except _Failed as failed:
            if failed.outcome.ending not in ANSWERED:
                raise self._cut(failed.outcome) from None
            raise failed.error from None
        except ChannelClosed:
            raise self._cut(self._died()) from None
        except ClientGone:
            raise self._abandoned() from None
        except BaseException as error:
            self._abort(f"{type(error).__name__}: {error}")
            raise
        raise StopIteration

    def close(self) -> None:
        """Settle the work: wait for the application's ``close()``, or abort if the body was not complete."""
        if self._state == "running":
            self._abort(f"the response was closed before its end: {_CLIENT_GONE}")
        elif self._state == "ended":
            try:
                self._take(*self._next())
            except ChannelClosed:
                self._died()  # the client has the whole response; the log shows how the work ended
            except _Failed as failed:
                raise failed.error from None
            except BaseException as error:
                self._abort(f"{type(error).__name__}: {error}")
                raise

    def _hold_back(self) -> tuple[Outcome | None, bool]:
        """Receive a whole response of status 500 before sending it, so that the outcome is known.

        Return the outcome, and whether the application's result had the length 1. The outcome is None if the response
        is too large to hold back: it is then streamed like any other.
        """
        held: list[bytes] = []
        size = 0
        outcome = None
        only = False
        while size <= _MAX_HELD and len(held) < WINDOW_FRAMES and not self._limiter.is_fast:
            kind, payload = self._next()
            if kind in (wire.DATA, wire.ONLY) and self._state == "running":
                held.append(self._chunk(kind, payload))
                size += len(payload)
                only = kind == wire.ONLY
            elif kind == wire.END:
                self._ended()
            elif kind == wire.DONE:
                outcome = self._done(payload)
                break
            else:
                self._take(kind, payload)
        self._pending = held[::-1]
        return outcome, only

    def _take(self, kind: int, payload: bytes) -> None:
        """Handle one frame of a response whose headers are known."""
        if kind in (wire.DATA, wire.ONLY) and self._state == "running":
            self._pending.append(self._chunk(kind, payload))
        elif kind == wire.END and self._state == "running":
            self._ended()
        elif kind == wire.DONE:
            self._done(payload)
        elif kind == wire.ERROR:
            raise self._failed(payload)
        else:
            raise ProtocolViolation(f"a frame of kind {kind} out of order")

    def _only(self, start_response: StartResponse, start: wire.Start, chunk: bytes) -> Iterable[bytes]:
        """Handle a response of one chunk. Nearly always the end of the work arrived with it."""
        self._has_data = True
        if self._frames:
            kind, payload = self._next()
            if kind == wire.DONE:
                outcome = self._done(payload)
                if outcome.ending not in ANSWERED:  # the deadline passed just before the end
                    return self._respond(start_response, outcome)
                start_response(start.status, start.headers)
                return [chunk]
            self._take(kind, payload)
        self._pending.append(chunk)
        self._begin_body(start_response, start)
        return _SizedExchange(self)

    def _chunk(self, kind: int, payload: bytes) -> bytes:
        """Return a chunk of the response. While small frames come fast, join it with the chunks received already."""
        if self._has_data and (kind == wire.ONLY or not payload):
            # An empty chunk makes the server send the headers. After another chunk it only costs time.
            raise ProtocolViolation("an empty chunk, or a second one where one was announced")
        self._has_data = True
        if not self._limiter.is_fast or len(payload) >= SMALL_FRAME:
            return payload
        pieces = [payload]
        size = len(payload)
        while size < CHUNK and self._frames and self._frames[-1].kind in (wire.DATA, wire.ERRORS):
            kind, payload = self._frames.pop()
            if len(payload) < SMALL_FRAME and (pause := self._limiter.count()):
                self._pause(pause)
            if kind == wire.ERRORS:
                self._write_log(payload)
            elif payload:
                pieces.append(payload)
                size += len(payload)
            else:
                raise ProtocolViolation("an empty chunk")
        return b"".join(pieces)

    def _hand_over(self) -> None:
        """Note that the server writes to the client from now on.

        Raise `ChannelClosed` if the deadline has passed, or after an OOM kill: what the rest answers is not taken.
        """
        if self._state != "settled":
            self._channel.check()
        if self._client is not None and not self._client.enter(Stage.RESPONSE):
            raise ChannelClosed("the deadline has come")

    def _next(self) -> tuple[int, bytes]:
        """Return the next frame of the response. Meanwhile serve the application's reads and log its messages."""
        while True:
            if not self._frames:
                wait = None if self._client is None else self._client.wait_to_receive
                self._frames = self._channel.receive_batch(wait)
            kind, payload = self._frames.pop()
            if kind in (wire.READ, wire.READLINE):
                self._read(kind, wire.decode_size(payload))
                continue
            if len(payload) < SMALL_FRAME and (pause := self._limiter.count()):
                self._pause(pause)
            if kind != wire.ERRORS:
                return kind, payload
            self._write_log(payload)

    def _pause(self, seconds: float) -> None:
        """Wait, because small frames come too fast. Raises `ClientGone`."""
        if self._client is None:
            time.sleep(seconds)
        else:
            self._client.pause(seconds)

    def _write_log(self, payload: bytes) -> None:
        if self._log is None:
            admission = self._admission
            self._log = ErrorLog(self._environ["wsgi.errors"], admission.policy.name, admission.key)
        self._log.write(payload)

    def _read(self, kind: int, size: int) -> None:
        """Read from the server's ``wsgi.input``, and send the piece to the executor process."""
        if self._frames or not self._channel.drained:
            # The executor must wait for the answer. If it did not, its reads would cost only the host.
            raise ProtocolViolation("a frame behind a read that was not answered")
        client = self._client
        if client is not None and not client.enter(Stage.BODY):
            raise ChannelClosed("the deadline has come")
        stream = self._environ["wsgi.input"]
        try:
            data = stream.read(size) if kind == wire.READ else stream.readline(size)
        except Exception as error:  # noqa: BLE001 - the server may raise anything; pass it to the application
            self._input_error = error
            answer = (wire.INPUT_FAILED, wire.encode_input_failure(error))
        else:
            answer = (wire.INPUT, data)
        if client is not None:
            client.enter(Stage.EXECUTOR)
        if (not answer[1] or answer[0] == wire.INPUT_FAILED) and (pause := self._limiter.count()):
            self._pause(pause)
        self._channel.send(answer, wait=None if client is None else client.wait_to_send)

    # -- settle the work: each method sets the state first, so that it happens once ------------------

    def _ended(self) -> None:
        self._state = "ended"
        if self._client is not None:
            self._client.release()  # the client has the whole response; only the application's close() is left

    def _done(self, payload: bytes) -> Outcome:
        if self._answer(payload):
            raise ProtocolViolation("an end with a payload")
        self._settle_at_last()
        return self._admission.finish(self._ending, self._status if self._ending == "error" else "")

    def _failed(self, payload: bytes) -> _Failed:
        failure = wire.decode_failure(self._answer(payload))
        self._settle_at_last()
        # The server will log the text line by line, so bound its length.
        prefix = log_prefix(self._admission.policy.name, self._admission.key)
        name = escape_unprintable(failure.type_name[:LINE_CHARACTERS])
        message = escape_unprintable(failure.message[:LINE_CHARACTERS])
        text = prefix_lines(failure.traceback_text[:LOG_CHARACTERS], prefix)
        outcome = self._admission.finish("error", f"{name}: {message}")
        if failure.input_failed and self._input_error is not None:
            return _Failed(self._input_error, outcome)
        return _Failed(ApplicationError(name, message, text), outcome)

    def _settle_at_last(self) -> None:
        """Settle the work at the last frame of a request. Raise `ProtocolViolation` if more frames follow."""
        if self._frames or not self._channel.drained:
            raise ProtocolViolation("a frame after the last")
        self._state = "settled"
        if self._client is not None:
            self._client.release()

    def _died(self) -> Outcome:
        self._settled()
        return self._admission.died()

    def _abort(self, detail: str) -> None:
        if self._state != "settled":
            self._settled()
            self._admission.abort(detail)

    def _settled(self) -> None:
        self._state = "settled"
        if self._client is not None:
            self._client.release()

    def _answer(self, payload: bytes) -> bytes:
        """Return the payload after the number of this request. Raise `ProtocolViolation` for another number."""
        if payload[: wire.NUMBER_SIZE] != self.number:
            raise ProtocolViolation("an answer to another request")
        return payload[wire.NUMBER_SIZE :]

    def _abandoned(self) -> ResponseCut:
        self._abort(_CLIENT_GONE)
        return ResponseCut(_CLIENT_GONE)

    def _cut(self, outcome: Outcome) -> ResponseCut:
        """Return the exception that ends a response that has begun. Reset the connection if its socket is known.

        Without the reset, a client of HTTP/1.0 would take the end of the connection for the end of the response.
        """
        if self._client is not None:
            self._client.reset()
        return ResponseCut(outcome.detail or outcome.ending, outcome)


class _SizedExchange:
    """The response of an application whose result had the length 1. For servers that use the length."""

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange
        self.close = exchange.close

    def __len__(self) -> int:
        return 1

    def __iter__(self) -> Iterator[bytes]:
        return self._exchange


class ClientGone(Exception):
    """Raised when the client has closed its connection, or its half of it."""


class Stage(enum.Enum):
    """The event that the request's thread may be waiting for."""

    EXECUTOR = enum.auto()
    #: The server reads the request's body from the client.
    BODY = enum.auto()
    #: The server writes a part of the response to the client.
    RESPONSE = enum.auto()
    #: The exchange is over: the server may serve the next request on the connection.
    RELEASED = enum.auto()


class Client:
    """The client's socket. Only the request's thread uses it, except for `stop_waiting`.

    ``wait_to_receive`` and ``wait_to_send`` wait for the executor's channel and raise `ClientGone`. They are None once
    the client is released.
    """

    __slots__ = (
        "_channel",
        "_late",
        "_lock",
        "_reads_without_client",
        "_receiving",
        "_sending",
        "_socket",
        "_stage",
        "wait_to_receive",
        "wait_to_send",
    )

    def __init__(self, sock: socket.socket, channel: int) -> None:
        self._socket = sock
        self._channel = channel
        self._lock = threading.Lock()
        self._stage = Stage.EXECUTOR
        self._late = False
        self._reads_without_client = 0
        self._receiving: select.poll | None = None
        self._sending: select.poll | None = None
        self.wait_to_receive: Callable[[], None] | None = self._wait_to_receive
        self.wait_to_send: Callable[[], None] | None = self._wait_to_send

    def enter(self, stage: Stage) -> bool:
        """Note the stage that the thread waits in next. Return False if it must not wait: the deadline has passed."""
        with self._lock:
            if self._stage is Stage.RELEASED:
                return True
            self._stage = stage
            return not self._late

    def release(self) -> None:
        """Stop watching the client. `stop_waiting` no longer touches its socket."""
        self.wait_to_receive = self.wait_to_send = None
        with self._lock:
            self._stage = Stage.RELEASED

    def stop_waiting(self) -> None:
        """Wake the request's thread if it waits for the client. Called once, at the deadline, by another thread."""
        with self._lock:
            self._late = True
            try:
                if self._stage is Stage.BODY:
                    # Do not use the object's own method: after it a TLS socket would go on without TLS.
                    socket.socket.shutdown(self._socket, socket.SHUT_RD)  # an answer can still be written
                elif self._stage is Stage.RESPONSE:
                    cut(self._socket)
            except OSError:
                pass  # it is closed already

    def reset(self) -> None:
        """Reset the connection, so that no client takes its end for the end of a response."""
        try:
            reset_on_close(self._socket)
            self._socket.close()
        except OSError:
            pass  # it is closed already

    def pause(self, seconds: float) -> None:
        """Wait for so many seconds. Raises `ClientGone`."""
        if self.wait_to_receive is None:
            time.sleep(seconds)
        elif _poll(self._watching(0), seconds * 1000):
            raise ClientGone

    def _wait_to_receive(self) -> None:
        if self._receiving is None:
            self._receiving = self._watching(select.POLLIN)
        self._wait(self._receiving)

    def _wait_to_send(self) -> None:
        if self._sending is None:
            self._sending = self._watching(select.POLLOUT)
        self._wait(self._sending)

    def _wait(self, poll: select.poll) -> None:
        ready = _poll(poll)
        if ready != [self._channel]:
            self._reads_without_client += 1
            if self._channel not in ready or self._reads_without_client > _MAX_READS_WITHOUT_CLIENT:
                raise ClientGone

    def _watching(self, events: int) -> select.poll:
        """Return a poll object for the client's disconnect and for these events of the channel."""
        client = self._socket.fileno()
        if client < 0:
            raise ClientGone
        poll = select.poll()
        if events:
            poll.register(self._channel, events)
        poll.register(client, select.POLLRDHUP)
        return poll


def _poll(waiting: select.poll, milliseconds: float | None = None) -> list[int]:
    """Return the descriptors with events. Raises `ChannelClosed` if the kernel has no memory for poll(2).

    The client could not be watched any more, and the request cannot go on without that.
    """
    try:
        return [descriptor for descriptor, _ in waiting.poll(milliseconds)]
    except OSError as error:
        raise ChannelClosed(f"the client cannot be watched: {error}") from error


class FrameRateLimiter:
    """Counts small frames. ``is_fast``: they come so fast that chunks are joined."""

    __slots__ = ("_left", "_since", "is_fast")

    def __init__(self) -> None:
        self._left = WINDOW_FRAMES
        self._since = time.monotonic()
        self.is_fast = False

    def count(self) -> float:
        """Count one frame. Return how long to wait before the next frame, seconds."""
        self._left -= 1
        if self._left:
            return 0.0
        now = time.monotonic()
        took = now - self._since
        pause = max(0.0, _MIN_WINDOW_SECONDS - took)
        self._left = WINDOW_FRAMES
        self._since = now + pause
        self.is_fast = took < _FAST_WINDOW_SECONDS
        return pause


class ErrorLog:
    """Writes the log text of one executor to the server's ``wsgi.errors``, within bounds.

    Each line begins with the policy and the key, so that it cannot be mistaken for a line of the server or of rcon.
    It has only printable characters. Lines that the log cannot take are lost, because logging must not fail a request.
    """

    __slots__ = ("_characters", "_frames", "_prefix", "_since", "_stream")

    def __init__(self, stream: Any, policy: str, key: str | None) -> None:
        self._stream = stream
        self._prefix = log_prefix(policy, key)
        self._characters = self._frames = 0
        self._since = -_MINUTE

    def write(self, payload: bytes) -> None:
        """Log a text. Raises `ProtocolViolation` for an empty one."""
        if not payload:
            raise ProtocolViolation("an empty text for the log")
        now = time.monotonic()
        if now - self._since >= _MINUTE:
            self._since, self._frames, self._characters = now, LOG_FRAMES, LOG_CHARACTERS
        if not self._frames:
            return
        self._frames -= 1
        # Decode no more than could be logged.
        text = payload[: self._characters].decode("utf-8", "replace")
        lines = []
        for line in text.splitlines():
            shown = f"{self._prefix}{escape_unprintable(line)}\n"
            self._characters -= len(shown)
            if self._characters < 0:
                self._frames = 0
                break
            lines.append(shown)
        if not self._frames:
            lines.append(
                f"{self._prefix}(rcon: this request logs too much; the rest of this minute is omitted)\n"
            )
        try:
            self._stream.write("".join(lines))
            self._stream.flush()
        except Exception:  # noqa: BLE001, S110 - a full disk or a closed file must not fail the request
            pass
