"""A real Celery worker, as the tests see it from outside."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from tests.forks import ROOT, ForkedProcess
from tests.integrations.celery.launcher import PROGRAM, Launcher
from tests.processes import PATIENCE, children, family, instance_directories, until

READY = " ready."
#: The variables that Python reads at its start, and Celery at its import. A fork of the launcher is after both.
READ_EARLY = re.compile("PYTHON|CELERY_|AUTOSCALE_")


class Worker:
    """One ``celery worker``; ended by `stop`, and by leaving a ``with`` block."""

    #: Starts the workers. Without it each is a new interpreter, as with ``celery worker`` in a shell.
    launcher: ClassVar[Launcher | None] = None

    def __init__(
        self,
        directory: Path,
        application: str,
        *arguments: str,
        pool: str = "prefork",
        concurrency: int = 2,
        name: str = "w",
        environ: Mapping[str, str] | None = None,
        checkout: Path = ROOT,
    ) -> None:
        """``application`` is a module, as ``-A`` takes it; ``environ`` is added to the environment.

        ``checkout`` is the working directory, which Celery puts before all else that is imported from.
        """
        self.directory = directory
        self.name = f"{name}@test"
        self.log_file = directory / f"{name}.log"
        self._began = self.log_file.stat().st_size if self.log_file.exists() else 0
        command = ["-A", application, "worker", "--hostname", self.name]
        command += ["--pool", pool, "--concurrency", str(concurrency), "--loglevel", "INFO"]
        # Nothing here is about several workers getting to know each other, which takes seconds.
        command += ["--without-gossip", "--without-mingle", *arguments]
        variables = {**os.environ, "C_FORCE_ROOT": "1", "PYTHONFAULTHANDLER": "1", **(environ or {})}
        own_start = checkout != ROOT or any(map(READ_EARLY.match, environ or {}))
        self.process: subprocess.Popen[bytes] | ForkedProcess
        with self.log_file.open("ab") as log:
            if self.launcher is not None and not own_start:
                self.process = self.launcher.start(
                    *command,
                    environ=variables,
                    stdout=log.fileno(),
                    stderr=log.fileno(),
                    gevent=pool == "gevent",
                )
                return
            self.process = subprocess.Popen(
                [sys.executable, PROGRAM, *command],  # what it starts itself anew with
                cwd=checkout,
                env=variables,
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
            )

    def __enter__(self) -> Worker:
        return self.wait_until_ready()

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        return self.process.pid

    def wait_until_ready(self) -> Worker:
        """Wait until it takes tasks."""
        try:
            until(lambda: self.process.poll() is not None or READY in self.log(), 3 * PATIENCE)
            assert self.process.poll() is None
        except AssertionError:
            if self.process.poll() is None:
                self.signal(signal.SIGABRT)  # it says where it is
                time.sleep(2)
            self.kill()
            raise AssertionError(f"the worker did not start:\n{self.log()[-5000:]}") from None
        return self

    def log(self) -> str:
        """What it has written since it was started."""
        with self.log_file.open("rb") as log:
            log.seek(self._began)
            return log.read().decode(errors="replace")

    def children(self) -> list[int]:
        """The living children of its main process: with prefork the pool's."""
        return children(self.pid)

    def family(self) -> list[int]:
        """It and all that is below it."""
        return family(self.pid)

    def cgroups(self) -> list[Path]:
        """The directories of the instances that it or any process below it made, in each hierarchy."""
        return instance_directories(*self.family())

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def stop(self, seconds: float = PATIENCE) -> int:
        """End it, warmly: what is under way is done first. Return its exit status."""
        if self.process.poll() is None:
            self.process.terminate()
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"the worker did not end:\n{self.log()[-5000:]}") from None

    def kill(self) -> None:
        """End it and all that is below it at once, whatever state it is in."""
        for pid in self.family():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()
