"""A cheap HTTP client: it prepares requests in advance, keeps connections, and reads responses by their length."""

from __future__ import annotations

import selectors
import socket
import time
from dataclasses import dataclass, field

_PATIENCE = 30.0


class Connection:
    """One kept connection that sends the same request again and again."""

    def __init__(self, port: int, host: str = "bench.example", path: str = "/") -> None:
        self._request = f"GET {path} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode()
        self._port = port
        self.socket = self._connect()
        self._size = 0  # of a whole answer; they are all alike
        self._size = len(self._first_answer())

    def ask(self) -> None:
        """Send the request."""
        self.socket.sendall(self._request)

    def answer(self) -> None:
        """Read the whole response. Raises `RuntimeError` unless it is the expected one."""
        data = self.socket.recv(65536)
        while len(data) < self._size:
            more = self.socket.recv(65536)
            if not more:
                break
            data += more
        if len(data) != self._size or not data.startswith(b"HTTP/1.1 200"):
            raise RuntimeError(f"an unexpected answer: {data[:200]!r}")

    def close(self) -> None:
        """Close the connection."""
        self.socket.close()

    def _connect(self) -> socket.socket:
        connection = socket.create_connection(("127.0.0.1", self._port), timeout=_PATIENCE)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return connection

    def _first_answer(self) -> bytes:
        self.ask()
        data = b""
        while b"\r\n\r\n" not in data:
            piece = self.socket.recv(65536)
            if not piece:
                raise RuntimeError(f"the connection was closed after {data!r}")
            data += piece
        head, _, body = data.partition(b"\r\n\r\n")
        if not head.startswith(b"HTTP/1.1 200") or b"connection: close" in head.lower():
            raise RuntimeError(f"an unexpected answer: {data[:400]!r}")
        for line in head.split(b"\r\n"):
            name, _, value = line.partition(b":")
            if name.lower() == b"content-length":
                while len(body) < int(value):
                    body += self.socket.recv(65536)
                return head + b"\r\n\r\n" + body
        raise RuntimeError(f"no content-length in {head!r}")


@dataclass
class Crowd:
    """Several connections to one server, driven by one thread."""

    port: int
    size: int
    _connections: list[Connection] = field(default_factory=list)

    def throughput(self, seconds: float) -> float:
        """Return the requests served per second. Each connection sends the next request after each response."""
        while len(self._connections) < self.size:
            self._connections.append(Connection(self.port))
        try:
            return self._one(seconds) if self.size == 1 else self._many(seconds)
        finally:
            self.close()  # idle connections would be closed by the server meanwhile

    def close(self) -> None:
        """Close all connections."""
        while self._connections:
            self._connections.pop().close()

    def _one(self, seconds: float) -> float:
        connection = self._connections[0]
        count, start = 0, time.perf_counter()
        end = start + seconds
        while True:
            connection.ask()
            connection.answer()
            count += 1
            now = time.perf_counter()
            if now >= end:
                return count / (now - start)

    def _many(self, seconds: float) -> float:
        count, start = 0, time.perf_counter()
        end, busy = start + seconds, len(self._connections)
        with selectors.EpollSelector() as selector:
            for connection in self._connections:
                selector.register(connection.socket, selectors.EVENT_READ, connection)
                connection.ask()
            while True:
                for key, _ in selector.select(_PATIENCE):
                    key.data.answer()
                    count += 1
                    if time.perf_counter() < end:
                        key.data.ask()
                    else:
                        busy -= 1
                if not busy:
                    return count / (time.perf_counter() - start)
