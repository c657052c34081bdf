"""Run the soak: ``python -m tests.soak [--minutes N] [--seed N]``. Print what grows; fail on growth, wrong answers.

A gunicorn with two gthread workers on loopback, and beside it a Celery worker with two pool processes and Redis, serve
all isolations. Executors, fork servers, workers and pool processes are killed and stopped at random. At intervals load
and harm pause, and the figures of the quiet servers are printed. An unexpected traceback in a log is a failure.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from random import Random
from typing import Protocol

from tests import leftovers
from tests.forks import ForkedProcess
from tests.integrations.celery.redis_server import RedisServer
from tests.integrations.celery.worker import Worker
from tests.integrations.gunicorn.server import Gunicorn
from tests.processes import instance_directories
from tests.soak import tasks
from tests.soak.harm import ACTS, RELOADS, Harm
from tests.soak.load import SETTINGS, Load
from tests.soak.logs import unexpected
from tests.soak.measure import BOUNDS, SHARE, Figures, grown, measure, own_processes
from tests.soak.task_load import SETTINGS as TASK_SETTINGS
from tests.soak.task_load import TaskLoad

ROOT = Path(__file__).resolve().parents[2]
#: How long a server needs until it is quiet: executors that end, workers that are made again.
QUIET_SECONDS = 6.0
_COLUMNS = ("server", "minutes", "right", "refused", "cut", "harm", *Figures._fields)


def main() -> int:
    """Run; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=int(time.time()) % 1_000_000)
    parser.add_argument("--clients", type=int, default=6)
    parser.add_argument("--interval", type=float, default=60.0, help="seconds between two measurements")
    options = parser.parse_args()
    print(f"seed {options.seed}, {options.minutes:g} minutes, {options.clients} clients", flush=True)
    print(f"each figure may grow by {SHARE:.0%} and {BOUNDS}", flush=True)
    leftovers.become_subreaper()
    threading.Thread(target=_reap_orphans, daemon=True).start()
    with tempfile.TemporaryDirectory(prefix="rcon-soak-") as folder:
        problems = _soak(Path(folder), options)
    for problem in problems:
        print(problem)
    print("passed" if not problems else f"FAILED: {len(problems)} problems")
    return 1 if problems else 0


def _reap_orphans() -> None:
    """Reap what killed fork servers leave, as process 1 does: a zombie keeps the keyring of its user, which are few."""
    while True:
        for pid, parent in leftovers.zombies().items():
            if parent == os.getpid() and pid not in _own:
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(pid, os.WNOHANG)
        time.sleep(0.2)


#: Children of this program, which it waits for itself.
_own: set[int] = set()


class _Server(Protocol):
    """A server that is loaded and harmed."""

    @property
    def process(self) -> subprocess.Popen[bytes] | ForkedProcess:
        """Return its first process."""

    def log(self) -> str:
        """Return what it has written."""


class _Subject:
    """A server with its load and its harm, and its figures."""

    def __init__(self, name: str, server: _Server, load: Load | TaskLoad, harm: Harm, least: int) -> None:
        """``least``: how many processes of its own it has when it is quiet."""
        self.name, self.server, self.load, self.harm = name, server, load, harm
        self.pid = server.process.pid
        self._least = least
        self._first: Figures | None = None
        #: The figures that have grown beyond their bounds.
        self.grown: list[str] = []

    def measure(self, minutes: float) -> None:
        """Wait until it is quiet, and print its figures."""
        deadline = time.monotonic() + 3 * QUIET_SECONDS
        while len(own_processes(self.pid)) < self._least and time.monotonic() < deadline:
            time.sleep(0.5)
        now = measure(self.pid)
        load = self.load
        counts = (load.right.total(), load.refused.total(), load.cut, self.harm.done.total())
        cells = [self.name, f"{minutes:.1f}", *map(str, counts), *(f"{figure:.0f}" for figure in now)]
        print(" ".join(f"{cell:>11}" for cell in cells), flush=True)
        self._first = self._first or now
        self.grown = [f"{self.name}: {text}" for text in grown(self._first, now)]

    def end(self) -> None:
        """End harm and load."""
        self.harm.end()
        self.load.end()

    def sum_up(self) -> list[str]:
        """Print what was done, once the server has ended; return what is wrong."""
        print(f"{self.name}: right: {dict(sorted(self.load.right.items()))}")
        print(f"{self.name}: refused: {dict(sorted(self.load.refused.items()))}")
        print(f"{self.name}: harm: {dict(sorted(self.harm.done.items()))}")
        problems = [f"{self.name}: {text}" for text in (*self.load.wrong, *self.grown)]
        if self.server.process.returncode != 0:
            problems.append(f"{self.name}: the server ended with status {self.server.process.returncode}")
        problems += [f"{self.name}: left a cgroup: {one}" for one in instance_directories(self.pid)]
        log = self.server.log()
        path = ROOT / "build" / f"soak-{self.name}.log"
        path.parent.mkdir(exist_ok=True)
        path.write_text(log)
        tracebacks = Counter(unexpected(log))
        print(
            f"{self.name}: log: {path.relative_to(ROOT)}, {len(log) >> 10} KiB, {len(tracebacks)} kinds of tracebacks"
        )
        return problems + [f"{self.name}: {count} in the log: {text}" for text, count in tracebacks.items()]


def _soak(folder: Path, options: argparse.Namespace) -> list[str]:
    with contextlib.ExitStack() as servers:
        subjects = [_gunicorn(servers, folder, options), _celery(servers, folder, options)]
        try:
            problems = _rounds(subjects, options)
        finally:
            for subject in subjects:
                subject.end()
    # What the killed fork servers had forked is adopted here, and ends soon.
    deadline = time.monotonic() + 10
    while leftovers.descendants(os.getpid()) and time.monotonic() < deadline:
        time.sleep(0.1)
    problems += [f"left a process: {one}" for one in leftovers.descendants(os.getpid()).values()]
    leftovers.kill_descendants()
    return problems + [problem for subject in subjects for problem in subject.sum_up()]


def _gunicorn(servers: contextlib.ExitStack, folder: Path, options: argparse.Namespace) -> _Subject:
    server = Gunicorn(
        folder, SETTINGS, "-k", "gthread", "--threads", "4", "--workers", "2", "--timeout", "30",
        app="tests.soak.application:app", environ={"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    _own.add(server.pid)
    servers.enter_context(server)
    harm = Harm(server.pid, {**ACTS, **RELOADS}, Random(options.seed))
    return _Subject("gunicorn", server, Load(server.port, options.seed, options.clients), harm, 5)


def _celery(servers: contextlib.ExitStack, folder: Path, options: argparse.Namespace) -> _Subject:
    redis = RedisServer(folder)
    _own.add(redis.process.pid)
    url = servers.enter_context(redis).database()
    settings = folder / "tasks.toml"
    settings.write_text(TASK_SETTINGS)
    environ = {tasks.BROKER: url, tasks.SETTINGS: str(settings)}
    worker = Worker(folder, tasks.__name__, concurrency=2, environ=environ)
    _own.add(worker.pid)
    servers.enter_context(worker)
    harm = Harm(worker.pid, ACTS, Random(options.seed + 1))
    return _Subject("celery", worker, TaskLoad(url, options.seed, options.clients), harm, 3)


def _rounds(subjects: list[_Subject], options: argparse.Namespace) -> list[str]:
    print(" ".join(f"{name:>11}" for name in _COLUMNS), flush=True)
    began = time.monotonic()
    end = began + options.minutes * 60
    while time.monotonic() < end:
        for subject in subjects:
            subject.load.go_on()
            subject.harm.go_on()
        time.sleep(min(options.interval, max(1.0, end - time.monotonic())))
        for subject in subjects:
            subject.harm.pause()
        for subject in subjects:
            subject.load.pause()
        time.sleep(QUIET_SECONDS)
        for subject in subjects:
            subject.measure((time.monotonic() - began) / 60)
            if subject.server.process.poll() is not None:
                return [f"{subject.name}: the server ended"]
    return []


if __name__ == "__main__":
    sys.exit(main())
