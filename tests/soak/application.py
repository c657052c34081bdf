"""The WSGI application of the soak: each path is an act, and each answer says how it was confined.

The tasks of the soak do the same acts.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

_STATUS = ("Uid", "NoNewPrivs", "CapPrm", "Seccomp")


def report(nonce: str) -> bytes:
    """Return how the calling thread is confined, as the kernel says, with the nonce of the request."""
    lines = Path("/proc/thread-self/status").read_text().splitlines()
    status = {name: value.split() for name, _, value in (line.partition(":") for line in lines)}
    cgroups = [line.split(":", 2)[1:] for line in Path("/proc/thread-self/cgroup").read_text().splitlines()]
    found = {"nonce": nonce, "cgroups": cgroups, **{name: status.get(name) for name in _STATUS}}
    return json.dumps(found).encode()


def _spin(seconds: float) -> None:
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass


def _fork(*, leave: bool) -> None:
    """Start a child and wait for it; with ``leave`` it leaves a sleeping child of its own behind."""
    child = os.fork()
    if child == 0:
        if leave:
            os.setsid()
            if os.fork() == 0:
                time.sleep(300)
        os._exit(0)
    os.waitpid(child, 0)


def act(name: str) -> None:
    """Do what a name says."""
    if name == "burn":
        _spin(0.005)
    elif name in ("child", "leave"):
        _fork(leave=name == "leave")
    elif name == "say":
        sys.stderr.write("a line of the application\n" * 10)
    elif name == "hog":
        len([bytearray(os.urandom(4096) * 256) for _ in range(100)])
    elif name == "late":
        time.sleep(30)
    elif name == "die":
        os._exit(3)


def app(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
    """Do what the last part of the path says, and answer with `report`."""
    name = environ["PATH_INFO"].rpartition("/")[2]
    nonce = parse_qs(environ.get("QUERY_STRING", "")).get("nonce", [""])[0]
    if name == "read":
        digest = hashlib.sha256()
        while piece := environ["wsgi.input"].read(16384):
            digest.update(piece)
        nonce = digest.hexdigest()
    act(name)
    body = report(nonce)
    start_response("200 OK", [("Content-Type", "application/json"), ("Content-Length", str(len(body)))])
    return [body[:10], body[10:]] if name == "stream" else [body]
