"""The host's side of one request that runs in an executor process."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, Final, Literal

from rcon_plugins.errors import ApplicationError
from rcon_plugins.executors.channel import CHUNK, ChannelClosed, Frame, ProtocolViolation
from rcon_plugins.outcome import Outcome
from rcon_wsgi import environ as crossing
from rcon_wsgi import problem, wire
from rcon_wsgi.client import Client, ClientGone, Stage
from rcon_wsgi.measure import (
    LINE,
    LOG_CHARACTERS,
    LOT,
    SMALL,
    ErrorLog,
    FrameRateLimiter,
    owned,
    owner,
    visible,
)

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse

    from rcon_plugins.confinement.admission import ProcessAdmission

_CLIENT_GONE: Final = "the client went away"
#: A response of status 500 is held back up to this size, to learn whether a limit was the cause.
_HELD: Final = CHUNK


class ResponseCut(ConnectionResetError):
    """Raised out of a response that had begun when its work was ended, or whose client has gone.

    The kind of error that servers expect of connections: they close it, and do not send what would make
    the response look complete. ``outcome`` tells why.
    """

    def __init__(self, reason: str, outcome: Outcome | None = None) -> None:
        super().__init__(errno.ECONNRESET, f"the response was cut: {reason}")
        self.outcome = outcome


class _Failed(Exception):
    def __init__(self, error: Exception, outcome: Outcome) -> None:
        super().__init__(error, outcome)
        self.error = error
        self.outcome = outcome


class Exchange:
    """One request in an executor process; also the iterable that the server gets for its response."""

    __slots__ = (
        "_admission",
        "_channel",
        "_client",
        "_ending",
        "_environ",
        "_frames",
        "_has_data",
        "_input_error",
        "_log",
        "_pace",
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
        self._client = Client(client, self._channel.fileno())
        self._log: ErrorLog | None = None
        self._pace = FrameRateLimiter()
        #: What the frames of this request's answer begin with: one to an earlier request is none to this.
        self.number = os.urandom(wire.NUMBER_SIZE)
        self._frames: list[Frame] = []  # received and not yet looked at, last first
        self._pending: list[bytes] = []  # received and not yet given to the server, last first
        self._has_data = False
        self._input_error: Exception | None = None
        self._state: Literal["running", "ended", "settled"] = "running"
        self._ending: Literal["ok", "error"] = "ok"
        self._status = ""

    def begin(self, start_response: StartResponse) -> Iterable[bytes]:
        """Send the request over and wait for the first of its response."""
        if self._client.known:
            self._admission.on_deadline = self._client.deadline
        try:
            request = crossing.frames(self.number + crossing.encode(self._environ))
            self._channel.send(*request, wait=self._client.wait_to_send)
            kind, payload = self._next()
            if kind == wire.START:
                return self._start(start_response, wire.decode_start(self._answer(payload)))
            if kind == wire.ERROR:
                raise self._failed(payload)
            raise ProtocolViolation(f"a response cannot begin with a frame of kind {kind}")
        except _Failed as failed:
            if problem.is_problem(failed.outcome):
                return problem.respond(self._environ, start_response, failed.outcome)
            raise failed.error from None
        except ChannelClosed:
            return problem.respond(self._environ, start_response, self._died())
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
            if outcome is not None and problem.is_problem(outcome):
                return problem.respond(self._environ, start_response, outcome)
            self._hand_over()
            start_response(start.status, start.headers)
            return _SizedExchange(self) if only else self
        kind, payload = self._next()
        if kind == wire.ONLY:
            return self._only(start_response, start, payload)
        self._take(kind, payload)
        self._hand_over()
        start_response(start.status, start.headers)
        return self

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        try:
            if not self._pending and self._state == "running":
                self._client.enter(Stage.EXECUTOR)
                self._take(*self._next())
            if self._pending:
                self._hand_over()
                return self._pending.pop()
        except _Failed as failed:
            if problem.is_problem(failed.outcome):
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
        """Settle the work: wait for the application's ``close()``, or stop it if its body was not over."""
        if self._state == "running":
            self._abort(f"the response was closed before its end: {_CLIENT_GONE}")
        elif self._state == "ended":
            try:
                self._take(*self._next())
            except ChannelClosed:
                self._died()  # the client has the whole response; what befell the work since is in the log
            except _Failed as failed:
                raise failed.error from None
            except BaseException as error:
                self._abort(f"{type(error).__name__}: {error}")
                raise

    def _hold_back(self) -> tuple[Outcome | None, bool]:
        """Receive a whole response that says the application failed, to learn from the work's outcome why.

        The outcome is None where the response is too large for that; it is then streamed like any other. The
        other is whether the length of its result was 1.
        """
        held: list[bytes] = []
        size = 0
        outcome = None
        only = False
        while size <= _HELD and len(held) < LOT and not self._pace.hurried:
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
        """Take one frame of a response whose headers are known."""
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
        """A response of one chunk; in most, the end of the work came along with it."""
        self._has_data = True
        if self._frames:
            kind, payload = self._next()
            if kind == wire.DONE:
                outcome = self._done(payload)
                if problem.is_problem(outcome):  # a deadline that came just before the end
                    return problem.respond(self._environ, start_response, outcome)
                start_response(start.status, start.headers)
                return [chunk]
            self._take(kind, payload)
        self._pending.append(chunk)
        self._hand_over()
        start_response(start.status, start.headers)
        return _SizedExchange(self)

    def _chunk(self, kind: int, payload: bytes) -> bytes:
        """A chunk of the response; with those behind it that are here already, if they come in a hurry."""
        if self._has_data and (kind == wire.ONLY or not payload):
            # An empty chunk sends the headers off; behind another it would be work for nothing.
            raise ProtocolViolation("an empty chunk, or one that was to be the only one")
        self._has_data = True
        if not self._pace.hurried or len(payload) >= SMALL:
            return payload
        pieces = [payload]
        size = len(payload)
        while size < CHUNK and self._frames and self._frames[-1].kind in (wire.DATA, wire.ERRORS):
            kind, payload = self._receive()
            if kind == wire.ERRORS:
                self._write_log(payload)
            elif payload:
                pieces.append(payload)
                size += len(payload)
            else:
                raise ProtocolViolation("an empty chunk")
        return b"".join(pieces)

    def _hand_over(self) -> None:
        """From here on the server writes to the client; not if the deadline has come."""
        if not self._client.enter(Stage.RESPONSE):
            raise ChannelClosed("the deadline has come")

    def _next(self) -> tuple[int, bytes]:
        """The next frame of the response; what the application reads and logs meanwhile is done here."""
        while True:
            kind, payload = self._receive()
            if kind in (wire.READ, wire.READLINE):
                self._read(kind, wire.decode_size(payload))
            elif kind == wire.ERRORS:
                self._write_log(payload)
            else:
                return kind, payload

    def _receive(self) -> Frame:
        if not self._frames:
            self._frames = self._channel.receive_batch(self._client.wait_to_receive)
        frame = self._frames.pop()
        if len(frame.payload) < SMALL and frame.kind not in (wire.READ, wire.READLINE):
            self._count()
        return frame

    def _count(self) -> None:
        pause = self._pace.count()
        if pause:
            self._client.pause(pause)

    def _write_log(self, payload: bytes) -> None:
        if self._log is None:
            admission = self._admission
            self._log = ErrorLog(self._environ["wsgi.errors"], admission.policy.name, admission.key)
        self._log.write(payload)

    def _read(self, kind: int, size: int) -> None:
        if self._frames or not self._channel.drained:
            # Who asks waits for the answer. Answers that nobody waits for would be the host's work alone.
            raise ProtocolViolation("a frame behind a read that was not answered")
        if not self._client.enter(Stage.BODY):
            raise ChannelClosed("the deadline has come")
        stream = self._environ["wsgi.input"]
        try:
            data = stream.read(size) if kind == wire.READ else stream.readline(size)
        except Exception as error:  # noqa: BLE001 - the server's own; the application has to hear of it
            self._input_error = error
            answer = (wire.INPUT_FAILED, wire.encode_input_failure(error))
        else:
            answer = (wire.INPUT, data)
        self._client.enter(Stage.EXECUTOR)
        if not answer[1] or answer[0] == wire.INPUT_FAILED:
            self._count()
        self._channel.send(answer, wait=self._client.wait_to_send)

    # How the work is settled: each sets the state first, so that it happens once.

    def _ended(self) -> None:
        self._state = "ended"
        self._client.release()  # it has, or will have, all there is; the rest is the application's close()

    def _done(self, payload: bytes) -> Outcome:
        if self._answer(payload):
            raise ProtocolViolation("an end with more to it")
        if self._frames or not self._channel.drained:
            raise ProtocolViolation("a frame after the last")
        self._settled()
        return self._admission.finish(self._ending, self._status if self._ending == "error" else "")

    def _failed(self, payload: bytes) -> _Failed:
        failure = wire.decode_failure(self._answer(payload))
        if self._frames or not self._channel.drained:
            raise ProtocolViolation("a frame after the last")
        self._settled()
        # The server will log it, line by line, and no more of it than is sensible.
        prefix = owner(self._admission.policy.name, self._admission.key)
        name, message = visible(failure.type_name[:LINE]), visible(failure.message[:LINE])
        text = owned(failure.traceback_text[:LOG_CHARACTERS], prefix)
        outcome = self._admission.finish("error", f"{name}: {message}")
        if failure.input_failed and self._input_error is not None:
            return _Failed(self._input_error, outcome)
        error = ApplicationError(name, message, text)
        return _Failed(error, outcome)

    def _died(self) -> Outcome:
        self._settled()
        return self._admission.died()

    def _abort(self, detail: str) -> None:
        if self._state != "settled":
            self._settled()
            self._admission.abort(detail)

    def _settled(self) -> None:
        self._state = "settled"
        self._client.release()

    def _answer(self, payload: bytes) -> bytes:
        """What a frame of this request's answer says. Raises `ProtocolViolation` for that of another request."""
        if payload[: wire.NUMBER_SIZE] != self.number:
            raise ProtocolViolation("an answer to another request")
        return payload[wire.NUMBER_SIZE :]

    def _abandoned(self) -> ResponseCut:
        self._abort(_CLIENT_GONE)
        return ResponseCut(_CLIENT_GONE)

    def _cut(self, outcome: Outcome) -> ResponseCut:
        """The exception that ends a response which had begun; resets the connection where it is known.

        Without that, a client of HTTP/1.0 would take the end of the connection for the end of the response.
        """
        self._client.reset()
        return ResponseCut(outcome.detail or outcome.ending, outcome)


class _SizedExchange:
    """The response of an application whose result had the length 1, kept for servers that look at it."""

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange
        self.close = exchange.close

    def __len__(self) -> int:
        return 1

    def __iter__(self) -> Iterator[bytes]:
        return self._exchange
