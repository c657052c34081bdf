"""Commands of Celery as forks of one process that has imported Celery: imports are most of the CPU time of a start.

`Launcher` is this process, as a test sees it. A fork runs the program ``celery`` as Python itself would run it: its
script is ``__main__``, and its environment, arguments, directory and files are those of the request. ``-P gevent``
needs an interpreter of its own, because it patches modules before Celery is imported.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[3]
#: The script of Celery's command.
PROGRAM = str(Path(sys.executable).with_name("celery"))
#: What each worker imports, with Redis as its broker.
MODULES = (
    "billiard.popen_fork",
    "billiard.synchronize",
    "celery.app.control",
    "celery.app.events",
    "celery.app.log",
    "celery.apps.worker",
    "celery.backends.redis",
    "celery.bin.celery",
    "celery.concurrency.prefork",
    "celery.concurrency.solo",
    "celery.concurrency.thread",
    "celery.events.receiver",
    "celery.fixups.django",
    "celery.worker.autoscale",
    "celery.worker.components",
    "celery.worker.consumer",
    "celery.worker.consumer.delayed_delivery",
    "celery.worker.strategy",
    "kombu.mixins",
    "kombu.transport.redis",
    "rcon_celery",
)
#: The size of the largest request, bytes: it is one message.
REQUEST = 1 << 17


class Launched:
    """A running command. Has what the tests use of `subprocess.Popen`."""

    def __init__(self, arguments: Sequence[str], pid: int, status: int) -> None:
        """``status`` is a pipe from which its wait status can be read when it has ended."""
        self.args = arguments
        self.pid = pid
        self.returncode: int | None = None
        self._status = status

    def poll(self) -> int | None:
        return self._read(0)

    def wait(self, timeout: float | None = None) -> int:
        code = self._read(timeout)
        if code is None:
            raise subprocess.TimeoutExpired(list(self.args), timeout or 0)
        return code

    def _read(self, timeout: float | None) -> int | None:
        if self.returncode is None and select.select([self._status], [], [], timeout)[0]:
            data = os.read(self._status, 8)
            os.close(self._status)
            assert data, f"the launcher ended before {self.args}"
            self.returncode = os.waitstatus_to_exitcode(int.from_bytes(data, "little"))
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class Launcher:
    """The process that has imported Celery; ended by `close`."""

    def __init__(self) -> None:
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__, str(theirs.fileno())],
                cwd=ROOT,
                env={**os.environ, "PYTHONFAULTHANDLER": "1"},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
            )

    def close(self) -> None:
        """End it. Commands that still run go on."""
        self._control.close()
        self._process.wait()

    def start(
        self, *arguments: str, environ: Mapping[str, str], cwd: Path = ROOT, stdout: int, stderr: int
    ) -> Launched:
        """Start ``celery`` with these arguments; the files are descriptors."""
        reading, writing = os.pipe()
        try:
            request = json.dumps([arguments, dict(environ), str(cwd)]).encode()
            socket.send_fds(self._control, [request], [stdout, stderr, writing])
        finally:
            os.close(writing)
        pid = int.from_bytes(os.read(reading, 4), "little")
        assert pid, "the launcher does not answer"
        return Launched(["celery", *arguments], pid, reading)

    def run(
        self, *arguments: str, environ: Mapping[str, str], timeout: float = 60.0
    ) -> subprocess.CompletedProcess[str]:
        """Run ``celery`` with these arguments to its end; return its output."""
        with contextlib.ExitStack() as stack:
            files = [os.memfd_create(name) for name in ("stdout", "stderr")]
            for file in files:
                stack.callback(os.close, file)
            launched = self.start(*arguments, environ=environ, stdout=files[0], stderr=files[1])
            try:
                code = launched.wait(timeout)
            except subprocess.TimeoutExpired:
                launched.kill()
                launched.wait()
                raise
            outputs = [os.pread(file, os.fstat(file).st_size, 0).decode() for file in files]
        return subprocess.CompletedProcess(launched.args, code, *outputs)


class Request(NamedTuple):
    """What one fork does; its files are descriptors."""

    arguments: list[str]
    environ: dict[str, str]
    directory: str
    files: list[int]


def serve(control: socket.socket) -> Request | None:
    """Fork for each request. Return it in the fork; return None when nobody sends requests any more."""
    ended, wakeup = os.pipe()
    os.set_blocking(wakeup, False)
    signal.set_wakeup_fd(wakeup)
    signal.signal(signal.SIGCHLD, lambda *_: None)  # without a handler nothing is written to the descriptor
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal also sends it to pytest, which ends this process
    statuses: dict[int, int] = {}
    while True:
        ready, _, _ = select.select([control.fileno(), ended], [], [])
        if ended in ready:
            os.read(ended, 4096)
            reap(statuses)
        if control.fileno() not in ready:
            continue
        data, files, _, _ = socket.recv_fds(control, REQUEST, 3)
        if not data:
            return None
        pid = os.fork()
        if pid == 0:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            for file in (control.detach(), ended, wakeup, files.pop(), *statuses.values()):
                os.close(file)
            arguments, environ, directory = json.loads(data)
            return Request(arguments, environ, directory, files)
        for file in files[:2]:
            os.close(file)
        statuses[pid] = files[2]
        os.write(files[2], pid.to_bytes(4, "little"))


def reap(statuses: dict[int, int]) -> None:
    """Write the wait status of each child that has ended to its pipe."""
    with contextlib.suppress(ChildProcessError):  # there is no child
        while (found := os.waitpid(-1, os.WNOHANG))[0]:
            pid, status = found
            pipe = statuses.pop(pid)
            with contextlib.suppress(BrokenPipeError):  # the test does not wait for it
                os.write(pipe, status.to_bytes(8, "little"))
            os.close(pipe)


def become(request: Request) -> None:
    """Go on as the command."""
    for number, file in enumerate(request.files, start=1):
        os.dup2(file, number)
        os.close(file)
    os.chdir(request.directory)
    os.environ.clear()
    os.environ.update(request.environ)
    sys.argv = [PROGRAM, *request.arguments]
    sys.path[0] = str(Path(PROGRAM).parent)
    runpy.run_path(PROGRAM, run_name="__main__")


def main(descriptor: int) -> None:
    for name in MODULES:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # no fork has to look at these objects, which would copy their pages
    if request := serve(socket.socket(fileno=descriptor)):
        become(request)


if __name__ == "__main__":
    main(int(sys.argv[1]))
