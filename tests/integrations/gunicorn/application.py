"""What the tests ask a confined gunicorn to run."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs

if TYPE_CHECKING:
    from wsgiref.types import StartResponse

CONFINED = re.compile(r"/rcon-\d+-\d+/(work|host)/\w")


def who(_: dict[str, list[str]]) -> dict[str, Any]:
    """Which process this is, and where the kernel has put it."""
    return {
        "pid": os.getpid(),
        "uid": os.getuid(),
        "gid": os.getgid(),
        "confined": bool(CONFINED.search(Path("/proc/thread-self/cgroup").read_text())),
        "version": os.environ.get("TEST_VERSION"),
    }


def state(query: dict[str, list[str]]) -> dict[str, Any]:
    """Who runs this, and what it may do, in the kernel's own words; after so many seconds of sleep or of work."""
    time.sleep(float(query.get("sleep", ["0"])[0]))
    end = time.thread_time() + float(query.get("spin", ["0"])[0])
    while time.thread_time() < end:
        pass
    lines = dict(line.split(":", 1) for line in Path("/proc/thread-self/status").read_text().splitlines())
    return {
        "uids": [int(uid) for uid in lines["Uid"].split()],
        "gids": [int(gid) for gid in lines["Gid"].split()],
        "groups": [int(group) for group in lines["Groups"].split()],
        "no_new_privs": lines["NoNewPrivs"].strip() == "1",
        **{name: int(lines[name], 16) for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")},
    }


def allocate(query: dict[str, list[str]]) -> dict[str, Any]:
    """Touch so many MiB."""
    pieces = [os.urandom(4096) * 256 for _ in range(int(query["mib"][0]))]
    return {"mib": len(pieces)}


def sleep(query: dict[str, list[str]]) -> dict[str, Any]:
    """Sleep for so many seconds."""
    time.sleep(float(query["seconds"][0]))
    return who({})


def bomb(_: dict[str, list[str]]) -> dict[str, Any]:
    """Fork up to 64 sleepers, in sessions of their own, every other one forked twice; they end by themselves."""
    for number in range(64):
        try:
            child = os.fork()
        except OSError:
            time.sleep(0.3)  # for the test to see how many there are
            raise
        if child == 0:
            try:
                os.setsid()
                if number % 2 and os.fork() != 0:
                    os._exit(0)
                os.closerange(0, 1024)
                time.sleep(20)
            finally:
                os._exit(0)
    return {"forks": 64}


def fail(_: dict[str, list[str]]) -> dict[str, Any]:
    """Raise."""
    raise RuntimeError("the application's own error")


def files(_: dict[str, list[str]]) -> dict[str, Any]:
    """What each descriptor of this process is."""
    found = {}
    for descriptor in list(Path("/proc/self/fd").iterdir()):
        with contextlib.suppress(FileNotFoundError):  # that of the listing
            found[descriptor.name] = str(descriptor.readlink())
    return found


def log(query: dict[str, list[str]]) -> dict[str, Any]:
    """Say something in each of gunicorn's logs."""
    for name in ("gunicorn.error", "gunicorn.access"):
        logging.getLogger(name).info("%s in %s", query["say"][0], name)
    return who({})


def leave(query: dict[str, list[str]]) -> dict[str, Any]:
    """Leave processes behind that sleep."""
    for _ in range(int(query["processes"][0])):
        if os.fork() == 0:
            os.setsid()
            os.closerange(0, 1024)
            time.sleep(20)
            os._exit(0)
    return who({})


def lose(_: dict[str, list[str]]) -> dict[str, Any]:
    """Answer after a child of this process took more memory than there is."""
    child = os.fork()
    if child == 0:
        allocate({"mib": ["200"]})
        os._exit(0)
    return {"status": os.waitpid(child, 0)[1]}


def end(query: dict[str, list[str]]) -> dict[str, Any]:
    """End this process: by a signal, or by itself with a status."""
    if "signal" in query:
        os.kill(os.getpid(), int(query["signal"][0]))
    os._exit(int(query["status"][0]))


def started() -> None:
    """Fail in each new executor process, once the file is there that the environment names."""
    if Path(os.environ.get("TEST_BROKEN", "/nonexistent")).exists():
        raise RuntimeError("no database")


WORKS: dict[str, Callable[[dict[str, list[str]]], dict[str, Any]]] = {
    "who": who,
    "state": state,
    "allocate": allocate,
    "sleep": sleep,
    "bomb": bomb,
    "fail": fail,
    "files": files,
    "log": log,
    "lose": lose,
    "leave": leave,
    "end": end,
}


def stream(_: dict[str, list[str]]) -> Iterator[bytes]:
    """A piece, and then more memory than there is."""
    yield b"begun"
    time.sleep(0.1)
    allocate({"mib": ["200"]})
    yield b"ended"


def states(query: dict[str, list[str]]) -> Iterator[bytes]:
    """The state at each of so many pieces, a line each."""
    for _ in range(int(query["pieces"][0])):
        yield json.dumps(state({})).encode() + b"\n"


def lost(_: dict[str, list[str]]) -> Iterator[bytes]:
    """Pieces after a child took more memory than there is."""
    lose({})
    for _piece in range(100):
        yield b"survived"
        time.sleep(0.01)


STREAMS = {"stream": stream, "states": states, "lost": lost}


def app(environ: dict[str, Any], start_response: StartResponse) -> Iterable[bytes]:
    """``/<policy>/<work>?…`` runs a work; what policy that is under is for the settings to say."""
    name = environ["PATH_INFO"].rpartition("/")[2]
    query = parse_qs(environ["QUERY_STRING"])
    if name in STREAMS:
        start_response("200 OK", [("Content-Type", "text/plain")])
        return STREAMS[name](query)
    if name == "page":  # a framework makes a page of an exception
        try:
            bomb({})
        except OSError:
            start_response("500 Internal Server Error", [("Content-Type", "text/plain")])
            return [b"something went wrong"]
    if name == "posted":
        while environ["wsgi.input"].read(65536):
            pass
        name = "state"
    body = json.dumps(WORKS[name](query)).encode()
    start_response("200 OK", [("Content-Type", "application/json"), ("Content-Length", str(len(body)))])
    return [body]
