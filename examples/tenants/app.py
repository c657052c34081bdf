"""One WSGI application, four tenants told apart by the host name. Three of them misbehave.

The application does not know rcon-plugins. Each misbehaviour stops well before it could hurt the machine
(`MOST_MEMORY`, `MOST_CHILDREN`, `BURN`), so that the demonstration can also run it unconfined. Each of these bounds is
far above the limit in `rcon.toml`.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wsgiref.types import StartResponse

#: The most that `memory-hog` allocates, in bytes.
MOST_MEMORY = 320 * 1024 * 1024
#: The most processes that `fork-bomb` starts, and how long each of them lives, in seconds.
MOST_CHILDREN = 64
CHILD_SECONDS = 2.0
#: The CPU time that one request of `cpu-hog` burns, in seconds.
BURN = 0.25

MEBIBYTE = 1024 * 1024


def steady() -> dict[str, Any]:
    """Ordinary work: parse, sort, hash and write some JSON; two or three milliseconds."""
    orders = [{"order": n, "total": (n * 7919) % 1000, "items": list(range(n % 7))} for n in range(400)]
    text = json.dumps(sorted(orders, key=lambda order: int(order["total"])))
    back = json.loads(text)
    return {"orders": len(back), "digest": hashlib.sha256(text.encode()).hexdigest()}


def cpu_hog() -> dict[str, Any]:
    """Burn CPU time."""
    rounds, end = 0, time.thread_time() + BURN
    while time.thread_time() < end:
        for n in range(2000):
            rounds += n & 1
    return {"rounds": rounds, "cpu_seconds": BURN}


def memory_hog() -> dict[str, Any]:
    """Allocate and touch memory up to `MOST_MEMORY`."""
    pieces: list[bytearray] = []
    while len(pieces) * 4 * MEBIBYTE < MOST_MEMORY:
        pieces.append(bytearray(os.urandom(4096)) * 1024)
    time.sleep(0.05)
    return {"mebibytes": len(pieces) * 4}


def fork_bomb() -> dict[str, Any]:
    """Fork up to `MOST_CHILDREN` children; they move to sessions of their own, and every other one forks again."""
    children: list[int] = []
    while len(children) < MOST_CHILDREN:
        pid = os.fork()  # raises at the limit
        if pid == 0:
            _flee(twice=len(children) % 2 == 1)
        children.append(pid)
    for pid in children:
        os.waitpid(pid, 0)
    return {"children": len(children)}


def _flee(*, twice: bool) -> None:
    try:
        os.setsid()
        if twice and os.fork() != 0:
            os._exit(0)
        os.closerange(0, 1024)
        time.sleep(CHILD_SECONDS)
    finally:
        os._exit(0)


TENANTS: dict[str, Callable[[], dict[str, Any]]] = {
    "steady": steady,
    "cpu-hog": cpu_hog,
    "memory-hog": memory_hog,
    "fork-bomb": fork_bomb,
}


def app(environ: dict[str, Any], start_response: StartResponse) -> Iterable[bytes]:
    """The application: ``steady.example`` is the tenant ``steady``, and so on."""
    tenant = environ.get("HTTP_HOST", "").partition(":")[0].removesuffix(".example")
    work = TENANTS.get(tenant)
    if work is None:
        status, answer = "404 Not Found", {"error": f"no tenant {tenant!r}"}
    else:
        status, answer = "200 OK", work()
    body = json.dumps(answer).encode()
    start_response(status, [("Content-Type", "application/json"), ("Content-Length", str(len(body)))])
    return [body]
