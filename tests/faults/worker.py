"""A process that runs cases, one after another: ``python -m tests.faults.worker``, a line of JSON for each.

Each case runs in a fork. This process is the collector that `touch` talks to, adopts what the case leaves behind, and
looks for it: processes, and cgroups below the base of this worker.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import json
import os
import select
import shutil
import signal
import socket
import sys
import time
import traceback
from pathlib import Path
from typing import Any, NoReturn

from tests.faults import sites

if __name__ == "__main__":
    sites.install()

from rcon_plugins.confinement import budget
from tests import leftovers
from tests.faults.scenarios import FUNCTIONS, Case
from tests.faults.touch import Point, Setup, ask

#: How long a case may take, seconds, beside the time for which calls fail.
LONGEST = 60.0
#: How long a call that fails more than once fails, seconds.
PERSISTING = 3.0


class Collector:
    """Counts the calls of the armed touch point, and says which of them fail."""

    def __init__(self, case: dict[str, Any]) -> None:
        self._phase = ""
        self._armed = (case.get("phase"), f"{case.get('site')}\t{case.get('role')}\t{case.get('purpose')}")
        self._number = errno.EIO if case.get("errno") is None else int(case["errno"])
        self._persisting = bool(case.get("persisting"))
        self._until: float | None = None
        self._recording = bool(case.get("recording"))
        #: The touch points by (phase, call, role, purpose), with how often they were met.
        self.seen: dict[str, int] = {}
        self.fired = 0
        #: How many forks went on in the code of their parent.
        self.clones = 0

    def answer(self, text: str) -> int:
        """Return the errno of a call; 0 if it does not fail."""
        kind, _, rest = text.partition("\t")
        if kind == "phase":
            self._phase = rest
            return 0
        if kind == "clone":
            self.clones += 1
            return 0
        if kind == "failing":
            return int(self._until is not None and time.monotonic() < self._until)
        if self._recording:
            key = f"{self._phase}\t{text}"
            self.seen[key] = self.seen.get(key, 0) + 1
            return 0
        now = time.monotonic()
        if self._until is None:
            if (self._phase, text) != self._armed:
                return 0
            self._until = now + PERSISTING if self._persisting else now
        elif now >= self._until:
            return 0
        self.fired += 1
        return self._number


def use_own_ledger() -> Path:
    """Let the servers of this worker share no memory budget with others on this machine. Return the folder."""
    folder = Path(f"/run/rcon-faults-{os.getpid()}")
    budget._folder = lambda: str(folder)
    return folder


def run(case: dict[str, Any]) -> dict[str, Any]:
    """Run one case, and return what was found."""
    collector = Collector(case)
    base = f"/rcon-faults-{os.getpid()}"
    address = b"\0rcon-faults-%d" % os.getpid()
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(address)
    listener.listen(64)
    reading, writing = os.pipe()
    began = time.monotonic()
    pid = os.fork()
    if pid == 0:
        listener.close()
        os.close(reading)
        _run_case(case, base, address, writing)
    os.close(writing)
    message, hung = _follow(pid, reading, listener, collector, began + LONGEST)
    os.close(reading)
    result: dict[str, Any] = {"faults": ["the server died"], "answers": {}, "refusals": [], "said": False}
    if message:
        result = json.loads(message)
    if collector.clones:
        result["faults"].append("a fork goes on as the server")
    if hung:
        result["faults"].append(f"a hang: {hung}")
    result["seconds"] = time.monotonic() - began
    result["left"] = _left(base, listener, collector)
    listener.close()
    if result["left"]["cgroups"]:
        _next_start(base)
        result["left"]["after"] = _cgroups(base)
        _remove(base)
    result["fired"] = collector.fired
    result["seen"] = collector.seen
    return result


def _run_case(case: dict[str, Any], base: str, address: bytes, writing: int) -> None:
    status = 1
    try:
        Setup.address, Setup.host = address, os.getpid()
        Setup.recording = bool(case.get("recording"))
        if not Setup.recording and case.get("site"):
            Setup.point = Point(case["site"], case["role"], case["purpose"])
        null = os.open(os.devnull, os.O_RDWR)
        log = os.open(case["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND) if case.get("log") else null
        os.dup2(null, 0)
        os.dup2(log, 1)
        os.dup2(log, 2)
        one = Case(base, case["phase"] if case.get("brief") else "")
        try:
            FUNCTIONS[case["scenario"]](one)
        except BaseException:
            one.faults.append(traceback.format_exc()[-800:])
        if os.getpid() != Setup.host:
            _say_clone()
        Setup.address = b""
        data = {
            "answers": one.answers, "refusals": one.refusals, "faults": one.faults, "said": one.said,
        }  # fmt: skip
        with os.fdopen(writing, "wb") as pipe:
            pipe.write(json.dumps(data).encode())
        status = 0
    finally:
        os._exit(status)


def _say_clone() -> NoReturn:
    """Tell that this fork of the server returned into the code of its parent, and end it."""
    ask("clone")
    os._exit(1)


def _follow(
    pid: int, reading: int, listener: socket.socket, collector: Collector, deadline: float
) -> tuple[bytes, str]:
    """Answer until the case has ended; return its message, and where it hangs if it does."""
    message = b""
    pidfd = os.pidfd_open(pid)
    watched: list[Any] = [reading, listener, pidfd]
    hung = ""
    try:
        while True:
            ready, _, _ = select.select(watched, [], [], 1.0)
            if listener in ready:
                _answer_one(listener, collector)
            if reading in ready:
                message += (data := os.read(reading, 1 << 20))
                if not data:
                    ready.append(pidfd)
            if pidfd in ready and listener not in ready:
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(pid, 0)
                while data := _rest(reading):
                    message += data
                return message, hung
            if time.monotonic() > deadline and not hung:
                hung = _where(pid)
                os.kill(pid, signal.SIGKILL)
    finally:
        os.close(pidfd)


def _rest(reading: int) -> bytes:
    return os.read(reading, 1 << 20) if select.select([reading], [], [], 0)[0] else b""


def _answer_one(listener: socket.socket, collector: Collector) -> None:
    with contextlib.suppress(OSError):
        connection, _ = listener.accept()
        with connection:
            connection.settimeout(2)
            text = connection.recv(65536).decode(errors="replace")
            if text:
                connection.send(b"%d" % collector.answer(text))


def _where(pid: int) -> str:
    """Return what a process waits for."""
    found = []
    with contextlib.suppress(OSError):
        for task in list(Path(f"/proc/{pid}/task").iterdir()):
            found.append((task / "wchan").read_text() or "?")
    return ", ".join(found)


def _left(base: str, listener: socket.socket, collector: Collector) -> dict[str, Any]:
    """Return what the case left, once it has had time to end; kill the processes."""
    deadline = time.monotonic() + 8
    while time.monotonic() < deadline:
        if select.select([listener], [], [], 0.01)[0]:  # the fork server removes what the host left
            _answer_one(listener, collector)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        if not leftovers.descendants(os.getpid()):
            break
    processes = leftovers.descendants(os.getpid())
    if processes:
        leftovers.kill_descendants()
    return {"processes": list(processes.values()), "cgroups": _cgroups(base)}


def _cgroups(base: str) -> list[str]:
    """Return the cgroups below the base."""
    return sorted(str(one) for top in _tops(base) for one in top.iterdir() if one.is_dir())


def _tops(base: str) -> list[Path]:
    lines = Path("/proc/self/mounts").read_text().splitlines()
    tops = [Path(line.split()[1] + base) for line in lines if line.split()[2].startswith("cgroup")]
    return [top for top in tops if top.is_dir()]


def _next_start(base: str) -> None:
    """Start and end a server in the base, which is to remove what dead servers left there."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            Setup.point, Setup.address, Setup.recording = None, b"", False
            from rcon_plugins.kernel.cgroup import Hierarchy
            from rcon_plugins.tree.instance import Instance

            Instance.create(Hierarchy.discover(), base=base).close()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    os.waitpid(pid, 0)


def _remove(base: str) -> None:
    for top in _tops(base):
        for directory, _, _ in os.walk(top, topdown=False):
            with contextlib.suppress(OSError):
                Path(directory).rmdir()


def main() -> None:
    """Serve the runner until the end of its input."""
    leftovers.become_subreaper()
    base, ledger = f"/rcon-faults-{os.getpid()}", use_own_ledger()
    gc.freeze()  # a collection in a case would write to all objects that are here, and so copy their pages
    try:
        for line in sys.stdin:
            print(json.dumps(run(json.loads(line))), flush=True)
    finally:
        _remove(base)
        shutil.rmtree(ledger, ignore_errors=True)


if __name__ == "__main__":
    main()
