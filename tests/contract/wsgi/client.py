"""An HTTP client that returns the raw bytes, and the servers it sends requests to."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tests.contract.wsgi.apps import Case

ROOT = Path(__file__).resolve().parents[3]
TIMEOUT = 60.0  # after so many seconds without an answer, a test counts as hung


class Served(NamedTuple):
    """A server under test."""

    process: subprocess.Popen[str]
    port: int
    log: Path

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=TIMEOUT)

    def log_has(self, text: str, timeout: float = TIMEOUT) -> bool:
        """Return whether the text appears in the server's log in time."""
        end = time.monotonic() + timeout
        while text not in self.log.read_text(errors="replace"):
            if time.monotonic() > end:
                return False
            time.sleep(0.02)
        return True


@contextlib.contextmanager
def serving(
    log: Path,
    *arguments: str,
    port: int | None = None,
    environment: dict[str, str] | None = None,
    pass_fds: tuple[int, ...] = (),
) -> Iterator[Served]:
    """Run ``python -m`` with these arguments. The server prints its port, unless the port is given."""
    whole = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'integrations'}", "PYTHONUNBUFFERED": "1"}
    whole |= {"PYTHONWARNINGS": "error", **(environment or {})}
    with log.open("a") as errors:  # to be appended to even if a test empties it
        process = subprocess.Popen(
            [sys.executable, "-m", *arguments],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=whole,
            cwd=ROOT,
            pass_fds=pass_fds,
        )
    assert process.stdout is not None
    try:
        if port is None:
            line = process.stdout.readline()
            if not line:
                raise RuntimeError(f"{arguments} did not start:\n{log.read_text()}")
            port = int(line)
        yield Served(process, port, log)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()


def descendants(pid: int) -> list[int]:
    """Return a process and all its descendants."""
    found = [pid]
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            found += descendants(int(child))
    return found


def request_of(name: str, case: Case) -> bytes:
    """Return the request of a case, as bytes."""
    lines = [f"{case.method} /{name}{case.path} HTTP/1.1"]
    given = {line.partition(":")[0].lower() for line in case.headers}
    lines += [] if "host" in given else ["Host: a.example"]
    lines += [] if "connection" in given else ["Connection: close"]
    lines += case.headers
    body = case.body
    if case.chunked:
        lines.append("Transfer-Encoding: chunked")
        body = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in split(body, 30_000)) + b"0\r\n\r\n"
    elif case.method == "POST":
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def split(data: bytes, size: int) -> list[bytes]:
    return [data[start : start + size] for start in range(0, len(data), size)]


def ask(served: Served, request: bytes) -> bytes:
    """Return all bytes of the answer, up to the end of the connection, or of the response on a kept connection."""
    with served.connect() as connection:
        connection.sendall(request)
        answer = b""
        while not (b"keep-alive" in request and is_whole(answer)):
            try:
                data = connection.recv(1 << 16)
            except ConnectionResetError:
                return answer + b"<reset>"
            if not data:
                break
            answer += data
        return answer


def is_whole(answer: bytes) -> bool:
    head, end, body = answer.partition(b"\r\n\r\n")
    length = re.search(rb"\r\nContent-Length: (\d+)", head)
    return bool(end) and length is not None and len(body) >= int(length[1])


def comparable(answer: bytes, *, framing: bool) -> bytes:
    """Return the answer without its date, and without the sizes of its chunks if they may differ."""
    head, end, body = answer.partition(b"\r\n\r\n")
    head = re.sub(rb"\r\nDate: [^\r]*", b"", head)
    if head.startswith(b"HTTP/1.1 100"):
        return head + end + comparable(body, framing=framing)
    if not framing and b"Transfer-Encoding: chunked" in head:
        body = dechunked(body)
    return head + end + body


def dechunked(body: bytes) -> bytes:
    """Return the body, with a mark if its end is missing."""
    whole = b""
    while body:
        size, _, body = body.partition(b"\r\n")
        length = int(size, 16)
        if not length:
            return whole
        whole += body[:length]
        body = body[length + 2 :]
    return whole + b"<cut>"
