"""Other ways to separate requests, for comparison: make a thread or a process for each request and discard it.

Both change to another identity for each request, like the ``thread`` policy of the benchmark. ``new_thread`` does the
same as mod_process_security in Apache. ``new_process`` shows the least cost of a fork for each request.
"""

from __future__ import annotations

import os
import posix
import threading
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import hello

from rcon_plugins.kernel.capability import Capabilities, Identity, drop

if TYPE_CHECKING:
    from wsgiref.types import StartResponse

#: The user that the requests run as: any user except the server's.
NOBODY = Identity(65534, 65534)


def new_thread(environ: dict[str, Any], start_response: StartResponse) -> Iterable[bytes]:
    """Run the application in a new thread that drops privileges, and wait for it."""
    found: list[bytes] = []

    def serve() -> None:
        drop(NOBODY, Capabilities.none())
        found.extend(hello.app(environ, start_response))

    thread = threading.Thread(target=serve)
    thread.start()
    thread.join()
    return found


def new_process(environ: dict[str, Any], start_response: StartResponse) -> Iterable[bytes]:
    """Run the application in a new process that drops privileges, and read the response from a pipe."""
    ours, theirs = os.pipe()
    pid = posix.fork()
    if pid == 0:
        try:
            drop(NOBODY, Capabilities.none())
            _tell(theirs, lambda begin: hello.app(environ, begin))
        finally:
            os._exit(0)
    os.close(theirs)
    with os.fdopen(ours, "rb") as pipe:
        head, _, body = pipe.read().partition(b"\n\n")
    status, *headers = head.split(b"\n")
    posix.waitpid(pid, 0)
    pairs = [tuple(header.decode().split(": ", 1)) for header in headers]
    start_response(status.decode(), pairs)  # type: ignore[arg-type]
    return [body]


def _tell(pipe: int, run: Callable[[StartResponse], Iterable[bytes]]) -> None:
    said: list[bytes] = []

    def begin(status: str, headers: list[tuple[str, str]], *_: object) -> Callable[[bytes], object]:
        said.append(status.encode())
        said.extend(f"{name}: {value}".encode() for name, value in headers)
        return said.append

    body = b"".join(run(begin))
    os.write(pipe, b"\n".join(said) + b"\n\n" + body)
