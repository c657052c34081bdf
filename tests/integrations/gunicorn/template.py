"""Start gunicorn in forks of a process that has imported the modules of its master (tests/forks.py).

Half of the CPU time of a small server is the start of its interpreter and these imports. The template does them once.
A fork then calls what ``python -m gunicorn`` calls, with the command line, environment and files of that server, and
ends as an interpreter ends. It has imported no application, and nothing that a master imports after its first fork.

Servers with gevent have a template of their own. It has also imported what gevent imports in each worker to replace
the modules of the standard library, half of the CPU time of such a worker. It has replaced nothing.

``python -m tests.integrations.gunicorn.template NUMBER KIND`` is a template. It takes orders on the socket NUMBER.
"""

from __future__ import annotations

import importlib
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from tests.forks import ForkedProcess, Templates, serve

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

_running: list[Templates] = []


@contextmanager
def running() -> Iterator[None]:
    """Let `start` fork templates in this block. Elsewhere it starts an interpreter for each server."""
    _running.append(Templates(__name__))
    try:
        yield
    finally:
        _running.pop().close()


def of_interpreter(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that an interpreter reads when it starts: a template has read them already."""
    return {name: value for name, value in environ.items() if name.startswith("PYTHON")}


def start(
    arguments: Sequence[str], environ: Mapping[str, str], output: int, listener: int | None = None
) -> ForkedProcess | subprocess.Popen[bytes]:
    """Start ``python -m gunicorn`` with these arguments, as a fork of a template if one runs and suits.

    ``output`` becomes its standard output and error. ``listener`` is a socket that it inherits under the same number.
    """
    inherited = [] if listener is None else [listener]
    if _running and of_interpreter(environ) == of_interpreter(os.environ):
        template = _running[-1]["gevent" if "gevent" in arguments else "plain"]
        return template.start(
            arguments, environ, {1: output, 2: output, **{file: file for file in inherited}}
        )
    return subprocess.Popen(
        [sys.executable, "-m", "gunicorn", *arguments],
        env=environ,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=output,
        pass_fds=inherited,
    )


if __name__ == "__main__":
    for module in MODULES[sys.argv[2]]:
        importlib.import_module(module)
    import gunicorn.__main__  # type: ignore[import-untyped]
    from gunicorn.app.wsgiapp import run  # type: ignore[import-untyped]

    found = serve(socket.socket(fileno=int(sys.argv[1])))
    if found is not None:
        sys.argv[:] = [gunicorn.__main__.__file__, *found]
        run(prog="gunicorn")
