"""The host's side of one request that runs in an executor process."""

from __future__ import annotations

import errno
import select
import socket
import struct
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, Final, Literal

from rcon_plugins.errors import ApplicationError
from rcon_plugins.executors.channel import CHUNK, ChannelClosed, ProtocolViolation
from rcon_plugins.outcome import Outcome
from rcon_wsgi import environ as crossing
from rcon_wsgi import problem, wire

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse

    from rcon_plugins.admission import ProcessAdmission

_CLIENT_GONE: Final = "the client went away"
#: A response of status 500 is held back up to this size, to learn whether a limit was the cause.
_HELD: Final = CHUNK
_RESET_ON_CLOSE: Final = struct.pack("ii", 1, 0)


class ResponseCut(ConnectionResetError):
    """Raised out of a response that had begun when its work was ended, or whose client has gone.

    The kind of error that servers expect of connections: they close it, and do not send what would make
    the response look complete. ``outcome`` tells why.
    """

    def __init__(self, reason: str, outcome: Outcome | None = None) -> None:
        super().__init__(errno.ECONNRESET, f"the response was cut: {reason}")
        self.outcome = outcome


class _ClientGone(Exception):
    pass


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
        "_input_error",
        "_pending",
        "_poll",
        "_state",
        "_status",
    )

    def __init__(
        self, environ: dict[str, Any], admission: ProcessAdmission, client: socket.socket | None
    ) -> None:
        self._environ = environ
        self._admission = admission
        self._channel = admission.channel
        self._client = client
        self._poll: select.poll | None = None
        self._pending: list[bytes] = []  # received and not yet given to the server, last first
        self._input_error: Exception | None = None
        self._state: Literal["running", "ended", "settled"] = "running"
        self._ending: Literal["ok", "error"] = "ok"
        self._status = ""

    def begin(self, start_response: StartResponse) -> Iterable[bytes]:
        """Send the request over and wait for the first of its response."""
        try:
            self._channel.send(*crossing.frames(crossing.encode(self._environ)))
            kind, payload = self._next()
            if kind == wire.START:
                return self._start(start_response, wire.decode_start(payload))
            if kind == wire.ERROR:
                raise self._failed(payload)
            raise ProtocolViolation(f"a response cannot begin with a frame of kind {kind}")
        except _Failed as failed:
            if problem.is_problem(failed.outcome):
                return problem.respond(self._environ, start_response, failed.outcome)
            raise failed.error from None
        except ChannelClosed:
            return problem.respond(self._environ, start_response, self._died())
        except _ClientGone:
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
            start_response(start.status, start.headers)
            return _SizedExchange(self) if only else self
        kind, payload = self._next()
        if kind == wire.ONLY:
            return self._only(start_response, start, payload)
        self._take(kind, payload)
        start_response(start.status, start.headers)
        return self

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        if self._pending:
            return self._pending.pop()
        if self._state == "running":
            try:
                self._take(*self._next())
            except _Failed as failed:
                if problem.is_problem(failed.outcome):
                    raise self._cut(failed.outcome) from None
                raise failed.error from None
            except ChannelClosed:
                raise self._cut(self._died()) from None
            except _ClientGone:
                raise self._abandoned() from None
            except BaseException as error:
                self._abort(f"{type(error).__name__}: {error}")
                raise
            if self._pending:
                return self._pending.pop()
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
        while size <= _HELD:
            kind, payload = self._next()
            if kind in (wire.DATA, wire.ONLY) and self._state == "running":
                held.append(payload)
                size += len(payload)
                only = kind == wire.ONLY
            elif kind == wire.END:
                self._ended()
            elif kind == wire.DONE:
                outcome = self._done()
                break
            else:
                self._take(kind, payload)
        self._pending = held[::-1]
        return outcome, only

    def _take(self, kind: int, payload: bytes) -> None:
        """Take one frame of a response whose headers are known."""
        if kind in (wire.DATA, wire.ONLY) and self._state == "running":
            self._pending.append(payload)
        elif kind == wire.END and self._state == "running":
            self._ended()
        elif kind == wire.DONE:
            self._done()
        elif kind == wire.ERROR:
            raise self._failed(payload)
        else:
            raise ProtocolViolation(f"a frame of kind {kind} out of order")

    def _only(self, start_response: StartResponse, start: wire.Start, chunk: bytes) -> Iterable[bytes]:
        """A response of one chunk; in most, the end of the work came along with it."""
        if self._channel.buffered:
            kind, payload = self._next()
            if kind == wire.DONE:
                outcome = self._done()
                if problem.is_problem(outcome):  # a deadline that came just before the end
                    return problem.respond(self._environ, start_response, outcome)
                start_response(start.status, start.headers)
                return [chunk]
            self._take(kind, payload)
        self._pending.append(chunk)
        start_response(start.status, start.headers)
        return _SizedExchange(self)

    def _next(self) -> tuple[int, bytes]:
        """The next frame of the response; what the application reads and logs meanwhile is done here."""
        while True:
            if self._client is not None and not self._channel.buffered:
                self._wait(self._client)
            kind, payload = self._channel.receive()
            if kind in (wire.READ, wire.READLINE):
                self._read(kind, wire.decode_size(payload))
            elif kind == wire.ERRORS:
                errors = self._environ["wsgi.errors"]
                errors.write(payload.decode("utf-8", "replace"))
                errors.flush()
            else:
                return kind, payload

    def _wait(self, client: socket.socket) -> None:
        """Wait until the executor says something, or raise `_ClientGone`."""
        if self._poll is None:
            if client.fileno() < 0:
                raise _ClientGone
            self._poll = select.poll()
            self._poll.register(self._channel.fileno(), select.POLLIN)
            self._poll.register(client.fileno(), select.POLLRDHUP)
        own = self._channel.fileno()
        events = self._poll.poll()
        if all(descriptor != own for descriptor, _ in events):
            raise _ClientGone

    def _read(self, kind: int, size: int) -> None:
        stream = self._environ["wsgi.input"]
        try:
            data = stream.read(size) if kind == wire.READ else stream.readline(size)
        except Exception as error:  # noqa: BLE001 - the server's own; the application has to hear of it
            self._input_error = error
            self._channel.send((wire.INPUT_FAILED, wire.encode_input_failure(error)))
        else:
            self._channel.send((wire.INPUT, data))

    # How the work is settled: each sets the state first, so that it happens once.

    def _ended(self) -> None:
        self._state = "ended"
        self._client = None  # it has, or will have, all there is; the rest is the application's close()

    def _done(self) -> Outcome:
        if self._channel.buffered:
            raise ProtocolViolation("a frame after the last")
        self._state = "settled"
        return self._admission.finish(self._ending, self._status if self._ending == "error" else "")

    def _failed(self, payload: bytes) -> _Failed:
        failure = wire.decode_failure(payload)
        self._state = "settled"
        outcome = self._admission.finish("error", f"{failure.type_name}: {failure.message}")
        if failure.input_failed and self._input_error is not None:
            return _Failed(self._input_error, outcome)
        error = ApplicationError(failure.type_name, failure.message, failure.traceback_text)
        return _Failed(error, outcome)

    def _died(self) -> Outcome:
        self._state = "settled"
        return self._admission.died()

    def _abort(self, detail: str) -> None:
        if self._state != "settled":
            self._state = "settled"
            self._admission.abort(detail)

    def _abandoned(self) -> ResponseCut:
        self._abort(_CLIENT_GONE)
        return ResponseCut(_CLIENT_GONE)

    def _cut(self, outcome: Outcome) -> ResponseCut:
        """The exception that ends a response which had begun; resets the connection where it is known.

        Without that, a client of HTTP/1.0 would take the end of the connection for the end of the response.
        """
        if self._client is not None:
            try:
                self._client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
                self._client.close()
            except OSError:
                pass  # it is gone already
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
