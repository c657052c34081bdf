"""Large bodies with bounded memory; clients that disconnect; executors that fail."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import socket
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.contract.wsgi.client import TIMEOUT, Served, ask, descendants, serving
from tests.contract.wsgi.long_apps import PIECE, PIECES

BOUND = 24 << 20  # how many bytes a process may grow while 200 MiB pass through it


@pytest.fixture(scope="module")
def serve(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Served]]:
    """Return a function that returns a server with an empty log, started on first use."""
    folder = tmp_path_factory.mktemp("servers")
    started: dict[str, Served] = {}
    with contextlib.ExitStack() as stack:

        def get(name: str) -> Served:
            if name not in started:
                started[name] = stack.enter_context(
                    serving(folder / name, "tests.contract.wsgi.serve", name, "process-long")
                )
            os.truncate(started[name].log, 0)
            return started[name]

        yield get


@pytest.fixture(params=["wsgiref", "gunicorn"])
def served(request: pytest.FixtureRequest, serve: Callable[[str], Served]) -> Served:
    return serve(request.param)


@pytest.fixture
def gunicorn(serve: Callable[[str], Served]) -> Served:
    """gunicorn: of the servers here, only it exposes the client's socket."""
    return serve("gunicorn")


def get(path: str, *, version: str = "1.1", method: str = "GET") -> bytes:
    return f"{method} /{path} HTTP/{version}\r\nHost: a.example\r\nConnection: close\r\n\r\n".encode()


def resident(pid: int) -> int:
    """Return the anonymous memory of a process, in bytes."""
    status = Path(f"/proc/{pid}/status").read_text()
    match = re.search(r"RssAnon:\s+(\d+) kB", status)
    assert match is not None
    return int(match[1]) * 1024


class Growth:
    """The most that the processes of a server have grown since this object was made, in bytes."""

    def __init__(self, served: Served) -> None:
        self._before = {pid: resident(pid) for pid in descendants(served.process.pid)}
        assert len(self._before) >= 2  # a host and an executor
        self.most = 0

    def look(self) -> None:
        for pid, before in self._before.items():
            self.most = max(self.most, resident(pid) - before)


@pytest.mark.parametrize("name", ["much", "much-written"])
def test_a_large_response_is_streamed_with_back_pressure(served: Served, name: str) -> None:
    assert ask(served, get("ok")).endswith(b"ok")
    growth = Growth(served)
    with served.connect() as connection:
        connection.sendall(get(name, version="1.0"))
        time.sleep(1.0)  # long enough to send all of it, if nothing blocks the sender
        growth.look()
        assert "<much is over>" not in served.log.read_text()
        size = 0
        started = False
        looked = 0
        while data := connection.recv(1 << 20):
            if not started:
                assert data.startswith(b"HTTP/1.")
                size -= data.index(b"\r\n\r\n") + 4
                started = True
            size += len(data)
            if size - looked > 20 << 20:
                growth.look()
                looked = size
    assert size == len(PIECE) * PIECES
    assert served.log_has("<much is over>")
    assert growth.most < BOUND


def test_a_large_request_is_streamed_with_back_pressure(served: Served) -> None:
    assert ask(served, get("ok")).endswith(b"ok")
    growth = Growth(served)
    length = len(PIECE) * PIECES
    head = f"POST /take-much HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Length: {length}\r\n\r\n"
    with served.connect() as connection:
        connection.sendall(head.encode())
        for number in range(PIECES):
            connection.sendall(PIECE)
            if number % 300 == 0:
                growth.look()
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    digest = hashlib.sha256()
    for _ in range(PIECES):
        digest.update(PIECE)
    assert digest.hexdigest().encode() in answer
    assert growth.most < BOUND


def test_a_client_that_goes_away_ends_the_stream(served: Served) -> None:
    """The application's iterable is closed, as without confinement."""
    with served.connect() as connection:
        connection.sendall(get("every-second"))
        assert connection.recv(1)
    assert served.log_has("<every second is closed>")
    assert served.log_has("<outcome aborted: ")
    assert ask(served, get("ok")).endswith(b"ok")


@pytest.mark.parametrize(("name", "begun"), [("compute", b""), ("stream-and-compute", b"begun")])
def test_a_client_that_goes_away_ends_the_work_that_writes_nothing(
    gunicorn: Served, name: str, begun: bytes
) -> None:
    with gunicorn.connect() as connection:
        connection.sendall(get(name))
        received = b""
        while begun not in received:  # the application writes this before it only computes
            received += connection.recv(100)
        assert gunicorn.log_has("<computing in ")
        pid = int(gunicorn.log.read_text().partition("<computing in ")[2].partition(">")[0])
        assert Path(f"/proc/{pid}").exists()
    assert gunicorn.log_has("<outcome aborted: the client closed the connection>")
    assert not Path(f"/proc/{pid}").exists()
    assert ask(gunicorn, get("ok")).endswith(b"ok")
    assert "Traceback" not in gunicorn.log.read_text()


def test_a_client_that_goes_away_during_its_upload(gunicorn: Served) -> None:
    with gunicorn.connect() as connection:
        connection.sendall(
            b"POST /take-all-at-once HTTP/1.1\r\nHost: a\r\nContent-Length: 1000000\r\n\r\npart"
        )
        time.sleep(0.2)
        # The connection is reset, not closed: reading fails instead of returning the end.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    assert gunicorn.log_has("<read failed: ConnectionResetError>")
    assert gunicorn.log_has("<outcome ")
    assert ask(gunicorn, get("ok")).endswith(b"ok")


@pytest.mark.parametrize("name", ["die-at-once", "exit-at-once"])
def test_an_executor_that_ends_is_a_503(served: Served, name: str) -> None:
    answer = ask(served, get(name))
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b" 503 Service Unavailable\r\n" in head
    assert b"Content-Type: application/problem+json" in head
    problem = json.loads(body)
    assert re.fullmatch("[0-9a-f]{32}", problem.pop("instance"))
    assert problem == {
        "type": "urn:problem-type:rcon:killed",
        "title": "Request ended",
        "status": 503,
        "detail": "The process that served the request ended before it was done.",
        "policy": "double",
    }
    assert ask(served, get("ok")).endswith(b"ok")


def test_a_problem_has_no_body_for_head(served: Served) -> None:
    answer = ask(served, get("die-at-once", method="HEAD"))
    assert b" 503 Service Unavailable\r\n" in answer
    assert answer.endswith(b"\r\n\r\n")


def test_an_executor_that_ends_in_the_stream_cuts_it(served: Served) -> None:
    answer = ask(served, get("die-in-the-stream"))
    assert b" 200 OK\r\n" in answer
    assert b"begun" in answer
    assert b"problem" not in answer
    assert not answer.endswith(b"0\r\n\r\n")
    assert ask(served, get("ok")).endswith(b"ok")
    assert "Traceback" not in served.log.read_text()  # quiet, since the manager has logged the reason


def test_a_response_without_length_is_cut_so_that_it_shows(gunicorn: Served) -> None:
    """A client of HTTP/1.0 takes the end of the connection for the end of the response, unless it is a reset."""
    answer = ask(gunicorn, get("die-in-the-stream", version="1.0"))
    assert answer.endswith(b"<reset>")
    assert ask(gunicorn, get("ok")).endswith(b"ok")


def test_an_executor_that_ends_after_the_body_harms_nothing(served: Served) -> None:
    assert ask(served, get("die-in-close")).endswith(b"whole")
    assert served.log_has("<outcome killed: ")
    assert ask(served, get("ok")).endswith(b"ok")


def test_only_the_executor_answers_not_a_fork_of_it(served: Served) -> None:
    answer = ask(served, get("fork-and-return"))
    assert b"parent" in answer
    assert b"child" not in answer
    assert served.log_has("<parent closed>")
    assert "<child closed>" not in served.log.read_text()
    assert ask(served, get("ok")).endswith(b"ok")


def test_clients_that_come_and_go_leave_nothing(gunicorn: Served) -> None:
    for _ in range(20):
        with contextlib.suppress(OSError), gunicorn.connect() as connection:
            connection.sendall(get("every-second"))
    end = time.monotonic() + TIMEOUT
    while gunicorn.log.read_text().count("<outcome aborted: ") < 20:
        assert time.monotonic() < end
        time.sleep(0.05)
    assert ask(gunicorn, get("ok")).endswith(b"ok")
