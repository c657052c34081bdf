"""A real redis-server on loopback for one test run, without files on disk."""

from __future__ import annotations

import contextlib
import itertools
import shutil
import socket
import subprocess
import time
from pathlib import Path

#: How long it may take to start, or to end, seconds.
PATIENCE = 30.0
#: How many databases it has: each worker under test gets one for itself.
DATABASES = 4096


class RedisServer:
    """One redis-server; `stop`, or the end of a ``with`` block, ends it."""

    def __init__(self, directory: Path) -> None:
        program = shutil.which("redis-server")
        if program is None:
            raise RuntimeError("redis-server not found. As root: apt-get install redis-server")
        self.log_file = directory / "redis.log"
        self._databases = itertools.count()
        for _ in range(10):
            self.port = free_port()
            self._command = (program, directory, self.port, self.log_file)
            if self.begin():
                return
            self.stop()  # another process took the port, or it does not start
        raise AssertionError(f"redis-server did not start:\n{self.log_file.read_text()}")

    def __enter__(self) -> RedisServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def database(self) -> str:
        """Return the URL of an unused database."""
        return f"redis://127.0.0.1:{self.port}/{next(self._databases) % DATABASES}"

    def begin(self) -> bool:
        """Start it, for the first time or again, on the same port; return whether it answers."""
        self.process = start(*self._command)
        return self._answers()

    def stop(self) -> None:
        """End the server."""
        if self.process.poll() is None:
            self.process.terminate()
        try:
            self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise

    def _answers(self) -> bool:
        deadline = time.monotonic() + PATIENCE
        while self.process.poll() is None and time.monotonic() < deadline:
            with contextlib.suppress(OSError):
                # Check that this server answers, not another on its port.
                return b"process_id:%d\r\n" % self.process.pid in self._info()
            time.sleep(0.02)
        return False

    def _info(self) -> bytes:
        """Return what the server says of itself. The client library takes seconds to import in an emulated machine."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE) as connection:
            connection.sendall(b"INFO server\r\nQUIT\r\n")
            with connection.makefile("rb") as answer:
                return answer.read()


def start(program: str, directory: Path, port: int, log: Path) -> subprocess.Popen[bytes]:
    command = [program, "--port", str(port), "--bind", "127.0.0.1", "--databases", str(DATABASES)]
    command += ["--save", "", "--appendonly", "no", "--dir", str(directory), "--logfile", str(log)]
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port
