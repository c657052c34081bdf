"""Start gunicorn in forks of a process that has imported the modules of gunicorn's master.

Half of the CPU time of a small server is the start of its interpreter and these imports. The template does them once.
A fork then calls what ``python -m gunicorn`` calls, with the command line, environment and files of that server, and
ends as an interpreter ends. It has imported no application, and nothing that a master imports after its first fork.

Servers with gevent have a template of their own. It has also imported what gevent imports in each worker to replace
the modules of the standard library, half of the CPU time of such a worker. It has replaced nothing.

``python -m tests.integrations.gunicorn.template NUMBER KIND`` is a template. It takes orders on the socket NUMBER.
"""

from __future__ import annotations

import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

_ALL = (
    "gunicorn.app.wsgiapp",
    "gunicorn.glogging",
    "gunicorn.workers.sync",
    "rcon_gunicorn",
    "rcon_plugins.builtin.plugins",
)
_OF_GEVENT = (
    "local",
    "events",
    "select",
    "selectors",
    "signal",
    "ssl",
    "subprocess",
    "thread",
    "threading",
    "time",
)
#: The modules that a master has imported when it forks its first worker (with those that they import), by kind.
MODULES = {
    "plain": _ALL,
    "gevent": (*_ALL, "gunicorn.workers.ggevent", *(f"gevent.{name}" for name in _OF_GEVENT)),
}
#: The longest order: a command line and an environment.
LONGEST = 1 << 17


class ForkedProcess:
    """A server that the template has forked; what `subprocess.Popen` is for a server with its own interpreter."""

    def __init__(self, pid: int, args: list[str], ended: int) -> None:
        """``ended`` is the pipe to which the template writes the exit status."""
        self.pid = pid
        self.args = args
        self.returncode: int | None = None
        self._ended = ended

    def poll(self) -> int | None:
        with suppress(subprocess.TimeoutExpired):
            return self.wait(0)
        return None

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            if not select.select([self._ended], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(self.args, timeout or 0)
            self.returncode = int(os.read(self._ended, 16))
            os.close(self._ended)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)


class Template:
    """A running template; ended by `close`."""

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self._control, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._interpreter = of_interpreter(os.environ)
        with other:
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__, str(other.fileno()), kind],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[other.fileno()],
            )

    def suits(self, arguments: Sequence[str], environ: Mapping[str, str]) -> bool:
        """Return whether this is the template for such a server, and its interpreter is set up like the template."""
        kind = "gevent" if "gevent" in arguments else "plain"
        return kind == self._kind and of_interpreter(environ) == self._interpreter

    def start(
        self, arguments: Sequence[str], environ: Mapping[str, str], output: int, listener: int | None
    ) -> ForkedProcess:
        ended, write = os.pipe()
        order = {"arguments": [*arguments], "environ": dict(environ), "listener": listener}
        files = [write, output, *([] if listener is None else [listener])]
        socket.send_fds(self._control, [json.dumps(order).encode()], files)
        os.close(write)
        pid = self._control.recv(16)
        assert pid, "the template has ended"
        return ForkedProcess(int(pid), [*arguments], ended)

    def close(self) -> None:
        self._control.shutdown(socket.SHUT_RDWR)
        self._control.close()
        self._process.wait()


def of_interpreter(environ: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environ.items() if name.startswith("PYTHON")}


_running: list[Template] = []


@contextmanager
def running() -> Iterator[None]:
    """Let `start` fork templates in this block. Elsewhere it starts an interpreter for each server."""
    _running.extend(map(Template, MODULES))
    try:
        yield
    finally:
        while _running:
            _running.pop().close()


def start(
    arguments: Sequence[str], environ: Mapping[str, str], output: int, listener: int | None = None
) -> ForkedProcess | subprocess.Popen[bytes]:
    """Start ``python -m gunicorn`` with these arguments, as a fork of the template if one runs and suits.

    ``output`` becomes its standard output and error. ``listener`` is a socket that it inherits under the same number.
    """
    for template in _running:
        if template.suits(arguments, environ):
            return template.start(arguments, environ, output, listener)
    return subprocess.Popen(
        [sys.executable, "-m", "gunicorn", *arguments],
        env=environ,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=output,
        pass_fds=[] if listener is None else [listener],
    )


def take_orders(control: socket.socket) -> list[str] | None:
    """Fork a server for each order. Return its arguments in the fork, and None when the orders have ended."""
    status_pipes: dict[int, tuple[int, int]] = {}  # pid and pipe, by the pidfd of the server
    poll = select.poll()
    poll.register(control, select.POLLIN)
    while True:
        for descriptor, _ in poll.poll():
            if descriptor in status_pipes:
                poll.unregister(descriptor)
                pid, pipe = status_pipes.pop(descriptor)
                status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                with suppress(BrokenPipeError):
                    os.write(pipe, str(status).encode())
                os.close(pipe)
                os.close(descriptor)
                continue
            message, files, _, _ = socket.recv_fds(control, LONGEST, 3)
            if not message:
                return None
            order = json.loads(message)
            pid = os.fork()
            if pid == 0:
                control.detach()
                become_server(order, files)
                arguments: list[str] = order["arguments"]
                return arguments
            control.send(str(pid).encode())
            for file in files[1:]:
                os.close(file)
            pidfd = os.pidfd_open(pid)
            status_pipes[pidfd] = pid, files[0]
            poll.register(pidfd, select.POLLIN)


def become_server(order: dict[str, Any], files: list[int]) -> None:
    """Give this new process what `subprocess` and the interpreter would give it."""
    _, output, *listener = files
    os.dup2(output, 1)
    os.dup2(output, 2)
    kept = 2
    if listener:
        kept = order["listener"]
        os.dup2(listener[0], kept)
        os.set_inheritable(kept, True)  # dup2(2) leaves a descriptor unchanged that has this number already
        os.closerange(3, kept)
    os.closerange(kept + 1, os.sysconf("SC_OPEN_MAX"))
    os.environ.clear()
    os.environ.update(order["environ"])


if __name__ == "__main__":
    for module in MODULES[sys.argv[2]]:
        importlib.import_module(module)
    import gunicorn.__main__  # type: ignore[import-untyped]
    from gunicorn.app.wsgiapp import run  # type: ignore[import-untyped]

    found = take_orders(socket.socket(fileno=int(sys.argv[1])))
    if found is not None:
        sys.argv[:] = [gunicorn.__main__.__file__, *found]
        run(prog="gunicorn")
