"""Start programs as forks of a process that has imported their modules: imports are most of the CPU time of a start.

`Template` is such a process, as a test sees it: ``python -m MODULE NUMBER KIND``. The module imports, then calls
`serve` with the socket of that number. In each fork `serve` returns, and the module goes on as the program.

What this module calls in a template it has imported by name, before gevent patches it.
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from os import fork, waitpid
from pathlib import Path
from select import select
from signal import SIG_IGN, SIGINT, SIGKILL, SIGTERM, default_int_handler, signal

ROOT = Path(__file__).resolve().parent.parent
#: The size of the largest order, bytes: it is one message, with a command line and an environment.
LONGEST = 1 << 17
#: The most descriptors that come with an order.
FILES = 4
#: Descriptors that an order brings are kept above this number until each has the number it is to have.
ASIDE = 200


class ForkedProcess:
    """A program that runs in a fork. It has what the tests use of `subprocess.Popen`."""

    def __init__(self, args: Sequence[str], pid: int, status: int) -> None:
        """``status`` is a pipe from which its wait status can be read when it has ended."""
        self.args = [*args]
        self.pid = pid
        self.returncode: int | None = None
        self._status = status

    def poll(self) -> int | None:
        return self._read(0)

    def wait(self, timeout: float | None = None) -> int:
        code = self._read(timeout)
        if code is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0)
        return code

    def _read(self, timeout: float | None) -> int | None:
        if self.returncode is None and select([self._status], [], [], timeout)[0]:
            data = os.read(self._status, 4)
            os.close(self._status)
            assert data, f"the template ended before {self.args}"
            self.returncode = os.waitstatus_to_exitcode(int.from_bytes(data, "little"))
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(SIGTERM)

    def kill(self) -> None:
        self.send_signal(SIGKILL)


class Template:
    """A process that has imported the modules of a program; ended by `close`."""

    def __init__(self, module: str, kind: str) -> None:
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", module, str(theirs.fileno()), kind],
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
            )

    def start(
        self, arguments: Sequence[str], environ: Mapping[str, str], files: Mapping[int, int]
    ) -> ForkedProcess:
        """Start the program with these arguments. ``files``: our descriptors, by the numbers that they get there."""
        reading, writing = os.pipe()
        try:
            order = json.dumps([[*arguments], dict(environ), [*files]]).encode()
            socket.send_fds(self._control, [order], [writing, *files.values()])
        finally:
            os.close(writing)
        pid = int.from_bytes(os.read(reading, 4), "little")
        assert pid, "the template does not answer"
        return ForkedProcess(arguments, pid, reading)

    def close(self) -> None:
        """End it. Programs that still run go on."""
        self._control.close()
        self._process.wait()


class Templates:
    """The templates of a module, one for each kind of the program, started at its first use; ended by `close`."""

    def __init__(self, module: str) -> None:
        self._module = module
        self._by_kind: dict[str, Template] = {}

    def __getitem__(self, kind: str) -> Template:
        if kind not in self._by_kind:
            self._by_kind[kind] = Template(self._module, kind)
        return self._by_kind[kind]

    def close(self) -> None:
        for template in self._by_kind.values():
            template.close()


def serve(control: socket.socket) -> list[str] | None:
    """Fork for each order. Return its arguments in the fork; return None when nobody sends orders any more.

    A fork has the environment and the files of its order, and else what a new interpreter has.
    """
    signal(SIGINT, SIG_IGN)  # a terminal also sends it to pytest, which ends this process
    gc.collect()
    gc.freeze()  # no fork has to look at these objects, which would copy their pages
    running: dict[int, tuple[int, int]] = {}  # process and pipe for its status, by its pidfd
    while True:
        ready, _, _ = select([control.fileno(), *running], [], [])
        for pidfd in running.keys() & ready:
            tell(pidfd, *running.pop(pidfd))
        if control.fileno() not in ready:
            continue
        data, received, _, _ = socket.recv_fds(control, LONGEST, FILES)
        if not data:
            return None
        pid = fork()
        if pid == 0:
            signal(SIGINT, default_int_handler)
            arguments: list[str]
            arguments, environ, numbers = json.loads(data)
            for descriptor in (
                control.detach(),
                received.pop(0),
                *running,
                *(p for _, p in running.values()),
            ):
                os.close(descriptor)
            take(received, numbers)
            os.environ.clear()
            os.environ.update(environ)
            return arguments
        status, *files = received
        for file in files:
            os.close(file)
        running[os.pidfd_open(pid)] = pid, status
        os.write(status, pid.to_bytes(4, "little"))


def tell(pidfd: int, pid: int, pipe: int) -> None:
    """Write the status of a child that has ended."""
    _, status = waitpid(pid, 0)
    with contextlib.suppress(BrokenPipeError):  # the test does not wait for it
        os.write(pipe, status.to_bytes(4, "little"))
    os.close(pipe)
    os.close(pidfd)


def take(descriptors: Sequence[int], numbers: Sequence[int]) -> None:
    """Give descriptors these numbers, inheritable."""
    aside = [fcntl.fcntl(descriptor, fcntl.F_DUPFD, ASIDE) for descriptor in descriptors]
    for descriptor in descriptors:
        os.close(descriptor)
    for descriptor, number in zip(aside, numbers, strict=True):
        os.dup2(descriptor, number)
        os.close(descriptor)
