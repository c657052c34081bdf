"""The inputs that customers send: pictures, patterns, commands and addresses, and a harmful one of each."""

from __future__ import annotations

import random
import socket
import struct
import threading
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image, ImageDraw

#: The edge of a black picture in pixels: a file of half a megabyte that takes 576 MB of memory to open.
BOMB_EDGE = 24_000


class Job(NamedTuple):
    """A job to send, and its expected result."""

    task: str
    input: str
    arguments: tuple[Any, ...]
    #: "ok", or the name of an exception.
    expected: str


class Inputs:
    """The files of the customers, in a directory, and their servers, on loopback."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.pictures = [draw(directory / f"picture-{number}.png", number) for number in range(8)]
        self.bomb = directory / "bomb.png"
        write_bomb(self.bomb)
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Answering)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        # Accepts no connection, so never answers.
        self._silent = socket.create_server(("127.0.0.1", 0), backlog=64)

    def close(self) -> None:
        """End the servers."""
        self._server.shutdown()
        self._server.server_close()
        self._silent.close()

    def jobs(self, scale: float) -> list[Job]:
        """Return two hundred jobs, or ``scale`` times as many, in the same shuffled order each time."""
        harmless = [
            *(("thumbnail", "a picture", self._thumbnail, 80), ("album", "five pictures", self._album, 20)),
            *(("search", "a pattern", self._search, 20), ("hook", "a command", self._hook, 20)),
            ("fetch", "an address", self._fetch, 20),
        ]
        jobs = [
            Job(task, text, make(number), "ok")
            for task, text, make, count in harmless
            for number in range(max(1, round(count * scale)))
        ]
        harmful = [
            Job("thumbnail", "a decompression bomb", self._bomb(), "MemoryLimitExceeded"),
            Job("search", "an endless pattern", ("(a+)+$", ["a" * 64 + "b"]), "TimeLimitExceeded"),
            Job(
                "hook", "a fork bomb", ("while :; do sleep 600 >/dev/null 2>&1 & done",), "PidsLimitExceeded"
            ),
            Job("fetch", "a silent server", (self._url(self._silent),), "TimeLimitExceeded"),
        ]
        jobs += [job for job in harmful for _ in range(max(1, round(10 * scale)))]
        random.Random(7).shuffle(jobs)
        return jobs

    def _thumbnail(self, number: int) -> tuple[Any, ...]:
        source = self.pictures[number % len(self.pictures)]
        return str(source), str(self.directory / f"thumbnail-{number}.jpg"), 64 + number

    def _album(self, number: int) -> tuple[Any, ...]:
        return [str(path) for path in self.pictures[:5]], str(self.directory / f"album-{number}.pdf")

    def _search(self, number: int) -> tuple[Any, ...]:
        return f".*{number}$", [f"picture {each}" for each in range(100)]

    def _hook(self, number: int) -> tuple[Any, ...]:
        return (f"echo album {number} is ready | tr a-z A-Z",)

    def _fetch(self, number: int) -> tuple[Any, ...]:
        return (f"{self._url(self._server.socket)}/{number}",)

    def _bomb(self) -> tuple[Any, ...]:
        return str(self.bomb), str(self.directory / "never.jpg"), 64

    @staticmethod
    def _url(listener: socket.socket) -> str:
        return f"http://127.0.0.1:{listener.getsockname()[1]}"


class Answering(BaseHTTPRequestHandler):
    """The server of the customers."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"x" * 1000)

    def log_message(self, *_: object) -> None:
        """Log nothing."""


def draw(path: Path, number: int) -> Path:
    """Write a picture of bubbles; return its path."""
    chance = random.Random(number)
    picture = Image.new("RGB", (1200, 800), "navy")
    canvas = ImageDraw.Draw(picture)
    for _ in range(80):
        x, y, r = chance.randrange(1200), chance.randrange(800), chance.randrange(10, 90)
        colour = tuple(chance.randrange(256) for _ in range(3))
        canvas.ellipse((x - r, y - r, x + r, y + r), fill=colour)
    picture.save(path)
    return path


def write_bomb(path: Path) -> None:
    """Write a PNG of one colour, line by line, without the memory that it takes to open it."""
    deflate = zlib.compressobj(1)
    line = bytes(1 + BOMB_EDGE)
    pixels = b"".join(deflate.compress(line) for _ in range(BOMB_EDGE)) + deflate.flush()
    with path.open("wb") as file:
        file.write(b"\x89PNG\r\n\x1a\n")
        header = struct.pack(">IIBBBBB", BOMB_EDGE, BOMB_EDGE, 8, 0, 0, 0, 0)  # eight bits of grey
        for kind, data in ((b"IHDR", header), (b"IDAT", pixels), (b"IEND", b"")):
            file.write(struct.pack(">I", len(data)) + kind + data)
            file.write(struct.pack(">I", zlib.crc32(kind + data)))
