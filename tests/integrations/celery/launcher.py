"""Commands of Celery as forks of one process that has imported Celery: imports are most of the CPU time of a start.

`Launcher` is this process, as a test sees it. A fork runs the program ``celery`` as Python itself would run it: its
script is ``__main__``, and its environment, arguments and files are those of the request. Workers with
gevent are forks of a second process, where gevent has patched modules before the import, as `celery` does.

What this module itself calls in these processes it has imported by name, before gevent patches it.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from os import fork, waitpid
from pathlib import Path
from select import select
from signal import signal as set_handler
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
        if self.returncode is None and select([self._status], [], [], timeout)[0]:
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
    """The processes that have imported Celery, each started at its first use; ended by `close`."""

    def __init__(self) -> None:
        self._processes: dict[bool, tuple[subprocess.Popen[bytes], socket.socket]] = {}

    def close(self) -> None:
        """End them. Commands that still run go on."""
        for process, control in self._processes.values():
            control.close()
            process.wait()

    def _control(self, gevent: bool) -> socket.socket:
        """Return the socket for the requests of one process."""
        if gevent not in self._processes:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            with theirs:
                process = subprocess.Popen(
                    [sys.executable, "-m", __name__, str(theirs.fileno()), *(["gevent"] if gevent else [])],
                    cwd=ROOT,
                    env={**os.environ, "PYTHONFAULTHANDLER": "1"},
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    pass_fds=[theirs.fileno()],
                )
            self._processes[gevent] = process, ours
        return self._processes[gevent][1]

    def start(
        self,
        *arguments: str,
        environ: Mapping[str, str],
        stdout: int,
        stderr: int,
        gevent: bool = False,
    ) -> Launched:
        """Start ``celery`` with these arguments; the files are descriptors. ``gevent``: its pool is that of gevent."""
        reading, writing = os.pipe()
        try:
            request = json.dumps([arguments, dict(environ)]).encode()
            socket.send_fds(self._control(gevent), [request], [stdout, stderr, writing])
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
    files: list[int]


def serve(control: socket.socket) -> Request | None:
    """Fork for each request. Return it in the fork; return None when nobody sends requests any more."""
    ended, wakeup = os.pipe()
    os.set_blocking(wakeup, False)
    signal.set_wakeup_fd(wakeup)
    set_handler(signal.SIGCHLD, lambda *_: None)  # without a handler nothing is written to the descriptor
    set_handler(signal.SIGINT, signal.SIG_IGN)  # a terminal also sends it to pytest, which ends this process
    statuses: dict[int, int] = {}
    while True:
        ready, _, _ = select([control.fileno(), ended], [], [])
        if ended in ready:
            os.read(ended, 4096)
            reap(statuses)
        if control.fileno() not in ready:
            continue
        data, files, _, _ = socket.recv_fds(control, REQUEST, 3)
        if not data:
            return None
        pid = fork()
        if pid == 0:
            signal.set_wakeup_fd(-1)
            set_handler(signal.SIGCHLD, signal.SIG_DFL)
            set_handler(signal.SIGINT, signal.default_int_handler)
            for file in (control.detach(), ended, wakeup, files.pop(), *statuses.values()):
                os.close(file)
            arguments, environ = json.loads(data)
            return Request(arguments, environ, files)
        for file in files[:2]:
            os.close(file)
        statuses[pid] = files[2]
        os.write(files[2], pid.to_bytes(4, "little"))


def reap(statuses: dict[int, int]) -> None:
    """Write the wait status of each child that has ended to its pipe."""
    with contextlib.suppress(ChildProcessError):  # there is no child
        while (found := waitpid(-1, os.WNOHANG))[0]:
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
    os.environ.clear()
    os.environ.update(request.environ)
    sys.argv = [PROGRAM, *request.arguments]
    sys.path[0] = str(Path(PROGRAM).parent)
    runpy.run_path(PROGRAM, run_name="__main__")


def main(descriptor: int, *patched: str) -> None:
    control = socket.socket(fileno=descriptor)
    if patched:
        importlib.import_module("gevent.monkey").patch_all()
        importlib.import_module("celery.concurrency.gevent")
    for name in MODULES:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # no fork has to look at these objects, which would copy their pages
    if request := serve(control):
        if patched:
            importlib.import_module("gevent").reinit()
        become(request)


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
