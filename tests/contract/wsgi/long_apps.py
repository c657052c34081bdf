"""Applications that take long, send much data, or fail."""

from __future__ import annotations

import hashlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

Environ = dict[str, Any]
Application = Callable[[Environ, Any], Iterable[bytes]]

TEXT = [("Content-Type", "text/plain; charset=utf-8")]
PIECE = b"x" * 65536
PIECES = 3200  # of PIECE: 200 MiB
APPS: dict[str, Application] = {}


def app(function: Application) -> Application:
    APPS[function.__name__.replace("_", "-")] = function
    return function


def say(text: str) -> None:
    print(f"<{text}>", file=sys.stderr, flush=True)


@app
def much(environ: Environ, start_response: Any) -> Iterable[bytes]:
    start_response("200 OK", [*TEXT, ("X-Pid", str(os.getpid()))])
    try:
        for _ in range(PIECES):
            yield PIECE
    finally:
        say("much is over")


@app
def much_written(environ: Environ, start_response: Any) -> Iterable[bytes]:
    write = start_response("200 OK", [*TEXT, ("X-Pid", str(os.getpid()))])
    try:
        for _ in range(PIECES):
            write(PIECE)
    finally:
        say("much is over")
    return []


@app
def take_much(environ: Environ, start_response: Any) -> Iterable[bytes]:
    digest = hashlib.sha256()
    left = int(environ["CONTENT_LENGTH"])
    while left:
        data = environ["wsgi.input"].read(min(left, 1 << 20))
        if not data:
            break
        digest.update(data)
        left -= len(data)
    start_response("200 OK", [*TEXT, ("X-Pid", str(os.getpid())), ("X-Left", str(left))])
    return [digest.hexdigest().encode()]


@app
def take_all_at_once(environ: Environ, start_response: Any) -> Iterable[bytes]:
    try:
        body = environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"]))
    except OSError as error:
        say(f"read failed: {type(error).__name__}")
        raise
    say(f"read {len(body)}")
    start_response("200 OK", [*TEXT])
    return [b"taken"]


class EverySecond:
    """Yields a chunk every tenth of a second, until it is closed."""

    def __iter__(self) -> Iterator[bytes]:
        while True:
            yield b"still here\n"
            time.sleep(0.1)

    def close(self) -> None:
        say("every second is closed")


@app
def every_second(environ: Environ, start_response: Any) -> Iterable[bytes]:
    start_response("200 OK", [*TEXT])
    return EverySecond()


@app
def compute(environ: Environ, start_response: Any) -> Iterable[bytes]:
    say(f"computing in {os.getpid()}")
    end = time.monotonic() + 60
    while time.monotonic() < end:
        sum(range(10_000))
    start_response("200 OK", [*TEXT])
    return [b"done"]


@app
def stream_and_compute(environ: Environ, start_response: Any) -> Iterable[bytes]:
    start_response("200 OK", [*TEXT])
    yield b"begun"
    yield from compute(environ, lambda *_: None)


@app
def die_at_once(environ: Environ, start_response: Any) -> Iterable[bytes]:
    os.kill(os.getpid(), signal.SIGKILL)
    return []


@app
def exit_at_once(environ: Environ, start_response: Any) -> Iterable[bytes]:
    sys.exit("the application asked to end")


@app
def die_in_the_stream(environ: Environ, start_response: Any) -> Iterable[bytes]:
    start_response("200 OK", [*TEXT])
    yield b"begun"
    os.kill(os.getpid(), signal.SIGKILL)


@app
def die_in_close(environ: Environ, start_response: Any) -> Iterable[bytes]:
    class Dying(EverySecond):
        def __iter__(self) -> Iterator[bytes]:
            return iter([b"whole"])

        def close(self) -> None:
            os.kill(os.getpid(), signal.SIGKILL)

    start_response("200 OK", [*TEXT, ("Content-Length", "5")])
    return Dying()


@app
def fork_and_return(environ: Environ, start_response: Any) -> Iterable[bytes]:
    """Fork; parent and child both return through the caller's frames, but only the parent may answer."""
    child = os.fork()
    if child:
        os.waitpid(child, 0)
    start_response("200 OK", [*TEXT])
    return EndingOnce(f"{'parent' if child else 'child'}".encode())


class EndingOnce(EverySecond):
    def __init__(self, text: bytes) -> None:
        self._text = text

    def __iter__(self) -> Iterator[bytes]:
        yield self._text

    def close(self) -> None:
        say(f"{self._text.decode()} closed")


@app
def ok(environ: Environ, start_response: Any) -> Iterable[bytes]:
    start_response("200 OK", [*TEXT, ("Content-Length", "2")])
    return [b"ok"]


def by_path(environ: Environ, start_response: Any) -> Iterable[bytes]:
    return APPS[environ["PATH_INFO"][1:]](environ, start_response)
