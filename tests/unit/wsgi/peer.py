"""A host whose executor is the test: what it says is scripted, and how the work was settled is kept."""

from __future__ import annotations

import io
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

from rcon_plugins.ending import Ending
from rcon_plugins.executors.channel import Channel
from rcon_plugins.outcome import Outcome
from rcon_wsgi import wire, work_of
from rcon_wsgi.exchange import Exchange

Environ = dict[str, Any]
#: The number of each request here.
NUMBER = b"12345678"


class Admission:
    """An admission that records how it is settled. `outcomes` replaces the outcome of an ending."""

    policy = SimpleNamespace(name="tenant")
    key: str | None = None

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self.work = work_of({})
        self.settled: list[tuple[str, str]] = []
        self.outcomes: dict[Ending, Outcome] = {}
        self.on_deadline: Callable[[], object] | None = None

    def finish(self, ending: Ending = "ok", detail: str = "") -> Outcome:
        self.settled.append((ending, detail))
        return self.outcomes.get(ending, Outcome(ending=ending, detail=detail))

    def died(self) -> Outcome:
        self.settled.append(("died", ""))
        return self.outcomes.get("killed", Outcome(ending="killed", policy="tenant"))

    def abort(self, detail: str) -> Outcome:
        self.settled.append(("aborted", detail))
        return Outcome(ending="aborted", detail=detail)


class Server:
    """What a server sees of one request."""

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange
        self.started: list[tuple[str, list[tuple[str, str]]]] = []

    def start_response(self, status: str, headers: list[tuple[str, str]], exc_info: Any = None, /) -> Any:
        self.started.append((status, headers))

    def begin(self) -> Any:
        return self._exchange.begin(self.start_response)

    def run(self) -> bytes:
        """Serve the whole request, as servers do."""
        result = self.begin()
        try:
            return b"".join(result)
        finally:
            if hasattr(result, "close"):
                result.close()

    @property
    def status(self) -> str:
        assert len(self.started) == 1
        return self.started[0][0]


class Meeting:
    """A host and its executor for one request."""

    def __init__(
        self, sock: socket.socket, peer: socket.socket, environ: Environ, client: socket.socket | None
    ) -> None:
        self.peer = peer
        self.executor = Channel(peer)
        self.admission = Admission(Channel(sock))
        self.errors: io.StringIO = environ["wsgi.errors"]
        admission: Any = self.admission
        exchange = Exchange(environ, admission, client)
        exchange.number = NUMBER
        self.server = Server(exchange)

    def says(self, *frames: tuple[int, bytes], end: bool = True) -> None:
        """Send frames as the executor; with ``end`` close its side then."""
        self.executor.send(*frames)
        if end:
            self.peer.shutdown(socket.SHUT_WR)


def environ_of(**more: Any) -> Environ:
    return {
        "REQUEST_METHOD": "GET",
        "SCRIPT_NAME": "",
        "PATH_INFO": "/",
        "SERVER_NAME": "localhost",
        "wsgi.input": io.BytesIO(b"the body"),
        "wsgi.errors": io.StringIO(),
        **more,
    }


@contextmanager
def meeting(client: socket.socket | None = None, environ: dict[str, Any] | None = None) -> Iterator[Meeting]:
    sock, peer = socket.socketpair()
    with sock, peer:
        yield Meeting(sock, peer, environ_of(**(environ or {})), client)


START = (wire.START, NUMBER + wire.encode_start("200 OK", [("Content-Type", "text/plain")]))
START_500 = (wire.START, NUMBER + wire.encode_start("500 Oh No", [("Content-Type", "text/plain")]))
FAILED = (wire.ERROR, NUMBER + wire.encode_failure(ValueError("a mistake"), input_failed=False))
DONE = (wire.DONE, NUMBER)
END = (wire.END, b"")


def data(payload: bytes) -> tuple[int, bytes]:
    return wire.DATA, payload


def only(payload: bytes) -> tuple[int, bytes]:
    return wire.ONLY, payload
