"""Commands of Celery as forks of a process that has imported Celery (tests/forks.py).

A fork runs the program ``celery`` as Python itself would run it: its script is ``__main__``. Workers with gevent are
forks of a second process, where gevent has patched modules before the import, as `celery` does.

``python -m tests.integrations.celery.launcher NUMBER KIND`` is one of these processes.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import runpy
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from tests.forks import ForkedProcess, Templates, serve

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


class Launcher:
    """The processes that have imported Celery; ended by `close`."""

    def __init__(self) -> None:
        self._templates = Templates(__name__)

    def close(self) -> None:
        """End them. Commands that still run go on."""
        self._templates.close()

    def start(
        self,
        *arguments: str,
        environ: Mapping[str, str],
        stdout: int,
        stderr: int,
        gevent: bool = False,
    ) -> ForkedProcess:
        """Start ``celery`` with these arguments; the files are descriptors. ``gevent``: its pool is that of gevent."""
        template = self._templates["gevent" if gevent else "plain"]
        return template.start(arguments, environ, {1: stdout, 2: stderr})

    def run(
        self, *arguments: str, environ: Mapping[str, str], timeout: float = 60.0
    ) -> subprocess.CompletedProcess[str]:
        """Run ``celery`` with these arguments to its end; return its output."""
        with contextlib.ExitStack() as stack:
            files = [os.memfd_create(name) for name in ("stdout", "stderr")]
            for file in files:
                stack.callback(os.close, file)
            process = self.start(*arguments, environ=environ, stdout=files[0], stderr=files[1])
            try:
                code = process.wait(timeout)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                raise
            outputs = [os.pread(file, os.fstat(file).st_size, 0).decode() for file in files]
        return subprocess.CompletedProcess(["celery", *process.args], code, *outputs)


def main(descriptor: int, kind: str) -> None:
    control = socket.socket(fileno=descriptor)
    if kind == "gevent":
        importlib.import_module("gevent.monkey").patch_all()
        importlib.import_module("celery.concurrency.gevent")
    for name in MODULES:
        importlib.import_module(name)
    arguments = serve(control)
    if arguments is None:
        return
    if kind == "gevent":
        importlib.import_module("gevent").reinit()
    sys.argv = [PROGRAM, *arguments]
    sys.path[0] = str(Path(PROGRAM).parent)
    runpy.run_path(PROGRAM, run_name="__main__")


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
