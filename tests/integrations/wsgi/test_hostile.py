"""A tenant that would have the server's threads work for it, or wait for it, under the kernel's own limits."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.contract.wsgi.client import Served, ask, serving
from tests.processes import cpu_seconds

SETTINGS = """
[policy.slow]
per = "host"
isolation = "process"
cpu = "5%"

[policy.short]
isolation = "process"
concurrency = 1
each = { timeout = "1s" }

[[route]]
host = "short.example"
policy = "short"

[[route]]
policy = "slow"
"""


@contextlib.contextmanager
def hostile(folder: Path) -> Iterator[Served]:
    """A worker with two threads."""
    settings = folder / "rcon.toml"
    settings.write_text(SETTINGS)
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        serving(
            folder / "log",
            "gunicorn",
            *("--bind", f"fd://{listener.fileno()}", "-k", "gthread", "--threads", "2"),
            *("--no-control-socket", "--config", "python:rcon_gunicorn.conf"),
            "tests.integrations.wsgi.hostile:by_path",
            port=listener.getsockname()[1],
            environment={"RCON_SETTINGS": str(settings), "PYTHONWARNINGS": "default"},
            pass_fds=(listener.fileno(),),
        ) as served,
    ):
        yield served


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The server of all tests that do not measure. Each test has hosts of its own."""
    with hostile(tmp_path_factory.mktemp("hostile")) as running:
        assert b"ok" in ask(running, request("ok", "first.example"))
        yield running


def request(path: str, host: str, *lines: str, method: str = "GET", version: str = "1.1") -> bytes:
    head = [f"{method} /{path} HTTP/{version}", f"Host: {host}", *lines]
    if not any(line.startswith("Connection") for line in lines):
        head.append("Connection: close")
    return "\r\n".join([*head, "", ""]).encode()


def worker(served: Served) -> int:
    children = Path(f"/proc/{served.process.pid}/task/{served.process.pid}/children").read_text()
    (pid,) = map(int, children.split())
    return pid


def problem(answer: bytes) -> dict[str, Any]:
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"application/problem+json" in head
    told: dict[str, Any] = json.loads(body)
    return told


@pytest.mark.measures
def test_a_tenant_costs_the_server_little_more_cpu_than_its_own_quota(tmp_path: Path) -> None:
    """It may use 5 % of a CPU. Texts and chunks of one byte once had the worker burn most of one.

    A server for each kind of flood, all measured in one window.
    """
    paths = ("errors", "chunks", "reads")
    for path in paths:
        (tmp_path / path).mkdir()
    with contextlib.ExitStack() as stack:
        servers = {path: stack.enter_context(hostile(tmp_path / path)) for path in paths}
        connections = []
        for path, served in servers.items():
            assert b"ok" in ask(served, request("ok", "first.example"))
            connections.append(stack.enter_context(served.connect()))
            connections[-1].sendall(request(path, "flood.example"))
            connections[-1].setblocking(False)
        workers = {path: worker(served) for path, served in servers.items()}
        time.sleep(0.5)
        before, since = {path: cpu_seconds(pid) for path, pid in workers.items()}, time.monotonic()
        while time.monotonic() < since + 3:
            for connection in connections:
                with contextlib.suppress(BlockingIOError):
                    connection.recv(1 << 20)
            time.sleep(0.01)
        taken = time.monotonic() - since
        shares = {path: (cpu_seconds(pid) - before[path]) / taken for path, pid in workers.items()}
        assert max(shares.values()) < 0.2, shares
        for served in servers.values():
            assert served.log.stat().st_size < 400_000
            assert b"ok" in ask(served, request("ok", "other.example"))


def test_a_flood_of_empty_frames_kills_the_executor(served: Served) -> None:
    assert problem(ask(served, request("empty", "flood.example")))["status"] == 503
    assert b"ok" in ask(served, request("ok", "flood.example"))


@pytest.mark.parametrize("path", ["errors", "chunks", "does-not-read"])
def test_a_client_that_leaves_frees_its_thread_whatever_the_executor_does(served: Served, path: str) -> None:
    # Where the body is not read, its sender's leaving would be stuck behind it.
    body = b"x" * 1_000_000 if path == "does-not-read" else b""
    for number in range(4):  # twice as many as there are threads
        with served.connect() as connection:
            connection.sendall(
                request(path, f"{path}{number}.example", f"Content-Length: {len(body)}", method="POST")
            )
            connection.sendall(body)
            time.sleep(0.5)
    before = time.monotonic()
    assert b"ok" in ask(served, request("ok", f"{path}.example"))
    assert time.monotonic() - before < 3


@pytest.mark.parametrize("lines", [["Content-Length: 1000"], ["Transfer-Encoding: chunked"]])
def test_a_body_that_does_not_come_is_a_504_at_the_deadline(served: Served, lines: list[str]) -> None:
    """And not when the client or the server loses patience."""
    before = time.monotonic()
    answer = ask(served, request("upload", "short.example", *lines, "Connection: keep-alive", method="POST"))
    assert time.monotonic() - before < 3
    assert answer.startswith(b"HTTP/1.1 504 ")
    assert problem(answer)["limit"] == "each.timeout"
    assert b"ok" in ask(served, request("ok", "short.example"))


def is_cut(connection: socket.socket, version: str) -> bool:
    """Whether the client can tell that the response is not whole."""
    last = b""
    try:
        while data := connection.recv(1 << 20):
            last = data
    except ConnectionResetError:
        return True
    return version == "1.1" and not last.endswith(b"0\r\n\r\n")  # it has no length but its chunks


@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_a_client_that_does_not_read_is_cut_off_at_the_deadline(served: Served, version: str) -> None:
    timeouts = served.log.read_text().count("rcon: timeout ")
    with served.connect() as first, served.connect() as second:
        for connection in (first, second):
            connection.sendall(request("much", "short.example", version=version))
            time.sleep(1.5)
        before = time.monotonic()
        assert b"ok" in ask(served, request("ok", "short.example"))  # its slot and a thread are free
        assert time.monotonic() - before < 2
        assert is_cut(first, version)
        assert is_cut(second, version)
    assert served.log.read_text().count("rcon: timeout ") == timeouts + 2


def test_a_deadline_leaves_the_next_request_of_a_connection_alone(served: Served) -> None:
    """One that is kept alive past the deadline of its first request."""
    with served.connect() as connection:
        for _ in range(3):
            connection.sendall(request("ok", "short.example", "Connection: keep-alive"))
            answer = b""
            while not answer.endswith(b"\r\n\r\nok"):  # the head and the body may come apart
                data = connection.recv(65536)
                assert data, answer
                answer += data
            time.sleep(1.2)
