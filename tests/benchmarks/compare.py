"""Compare the CPU time of this checkout with that of another commit: ``make bench-compare COMMIT=...``.

Two servers (or Celery workers) of the old commit and one of this checkout take turns. The second old one is the
control: its ratio shows what the measurement itself is worth. The servers use one Python with one set of packages; only
the directory that rcon_plugins and its adapters are imported from differs.

CPU time is that of all processes below the server, those that have ended meanwhile included.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Protocol

from under_test import Gunicorn
from wire import Connection

from tests.processes import cpu_seconds_of_family

ROOT = Path(__file__).resolve().parents[2]
WEB = ("plain", "inline", "thread", "process")
TASKS = ("plain", "reused", "fresh")
SIDES = ("old", "new", "control")
#: How sure the interval of a median is.
CONFIDENCE = 0.95


class Subject(Protocol):
    """A server or worker under comparison."""

    def cpu_seconds(self) -> float:
        """Return the CPU seconds that all its processes have used so far."""

    def work(self, count: int) -> None:
        """Have it do so many requests or tasks."""


#: The name of a comparison, what starts its subjects, of which kind, and how much work there is in one turn.
Part = tuple[str, Callable[[str, Path], AbstractContextManager[dict[str, Subject]]], str, int]


class Web:
    """A gunicorn server and one kept connection."""

    def __init__(self, server: Gunicorn) -> None:
        self._server = server

    def cpu_seconds(self) -> float:
        return cpu_seconds_of_family(self._server.pid)

    def work(self, count: int) -> None:
        connection = Connection(self._server.port)
        for _ in range(count):
            connection.ask()
            connection.answer()
        connection.close()


@contextlib.contextmanager
def checked_out(commit: str) -> Iterator[Path]:
    """Return a directory with the files of a commit."""
    with tempfile.TemporaryDirectory(prefix="rcon-bench-") as folder:
        archive = subprocess.run(["git", "archive", commit], cwd=ROOT, stdout=subprocess.PIPE, check=True)
        subprocess.run(["tar", "-x", "-C", folder], input=archive.stdout, check=True)
        Path(folder).chmod(0o755)  # executors of another user import from it
        yield Path(folder)


@contextlib.contextmanager
def servers(mode: str, old: Path) -> Iterator[dict[str, Subject]]:
    """Start a gunicorn of each side."""
    with contextlib.ExitStack() as stack:
        found: dict[str, Subject] = {}
        for side in SIDES:
            server = Gunicorn(mode, ROOT if side == "new" else old)
            stack.callback(server.stop)
            found[side] = Web(server)
        yield found


@contextlib.contextmanager
def workers(task: str, old: Path) -> Iterator[dict[str, Subject]]:
    """Start a Celery worker of each side, with one process, on Redis."""
    import celery_tasks

    from tests.integrations.celery.redis_server import RedisServer
    from tests.integrations.celery.worker import Worker

    queues = (f"q{number}" for number in itertools.count())

    class Tasks:
        def __init__(self, url: str, worker: Worker) -> None:
            self._app = stack.enter_context(contextlib.closing(celery_tasks.make(url)))
            self._worker = worker

        def cpu_seconds(self) -> float:
            return cpu_seconds_of_family(self._worker.pid)

        def work(self, count: int) -> None:
            celery_tasks.throughput(self._app, task, next(queues), count)

    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="rcon-bench-")))
        redis = stack.enter_context(RedisServer(directory))
        found: dict[str, Subject] = {}
        for side in SIDES:
            checkout = ROOT if side == "new" else old
            url = redis.database()
            path = f"{checkout}:{checkout / 'integrations'}:{Path(__file__).parent}"
            environ = {celery_tasks.URL: url, "PYTHONPATH": path}
            worker = Worker(
                directory, "celery_tasks", concurrency=1, name=side, environ=environ, checkout=checkout
            )
            found[side] = Tasks(url, stack.enter_context(worker))
        yield found


def compare(
    subjects: dict[str, Subject], rounds: int, count: int, tell: Callable[[int], None]
) -> dict[str, list[float]]:
    """Return the CPU seconds of a request or task, for each side and round. The order of the sides changes."""
    for subject in subjects.values():
        subject.work(count)  # warm
    used: dict[str, list[float]] = {side: [] for side in subjects}
    orders = list(itertools.permutations(subjects))
    for number in range(rounds):
        tell(number)
        for side in orders[number % len(orders)]:
            before = subjects[side].cpu_seconds()
            subjects[side].work(count)
            used[side].append((subjects[side].cpu_seconds() - before) / count)
    return used


def ratio(mine: list[float], base: list[float]) -> dict[str, float]:
    """Return the median of the ratios of all rounds, and the interval that holds the true median."""
    ratios = sorted(one / other for one, other in zip(mine, base, strict=True))
    below = _rank(len(ratios))
    return {"ratio": statistics.median(ratios), "low": ratios[below], "high": ratios[len(ratios) - 1 - below]}


def _rank(count: int) -> int:
    """Return the rank of the lower end of the interval of a median, from the binomial distribution."""
    tail, rank = 0.0, 0
    while (tail := tail + math.comb(count, rank) / 2**count) < (1 - CONFIDENCE) / 2:
        rank += 1
    return max(0, rank - 1)


def main() -> int:
    """Compare, and print a table."""
    parser = argparse.ArgumentParser(
        prog="make bench-compare", description="CPU time, this checkout and a commit."
    )
    parser.add_argument("commit", help="the commit to compare with")
    parser.add_argument(
        "--only", action="append", default=[], metavar="NAME", help="web-inline, tasks-fresh, ..."
    )
    parser.add_argument("--rounds", type=int, default=30, help="how often the sides take turns")
    parser.add_argument("--count", type=int, default=300, help="requests in one turn; tasks are a third")
    parser.add_argument("--json", action="store_true", help="write JSON")
    options = parser.parse_args()
    parts: list[Part] = [(f"web-{mode}", servers, mode, options.count) for mode in WEB]
    parts += [(f"tasks-{task}", workers, task, max(1, options.count // 3)) for task in TASKS]
    found: dict[str, dict[str, dict[str, float]]] = {}
    if not options.json:
        print(
            f"CPU time of a request or task: this checkout in ratio to {options.commit}, {options.rounds} rounds"
        )
        print(f"  {'':14}{'old':>10}{'new':>10}{'ratio':>8}{'95 %':>16}{'control':>9}{'95 %':>16}")
    with checked_out(options.commit) as old:
        for name, start, what, count in parts:
            if options.only and name not in options.only:
                continue
            with start(what, old) as subjects:
                used = compare(subjects, options.rounds, count, partial(_say, name))
            row = {side: ratio(used[side], used["old"]) for side in ("new", "control")}
            found[name] = {"seconds": {side: statistics.median(used[side]) for side in SIDES}, **row}
            if not options.json:
                _print(name, found[name])
    if options.json:
        print(json.dumps(found, indent=2))
    return 0


def _say(name: str, number: int) -> None:
    if sys.stderr.isatty():
        print(f"\r{name}: round {number + 1} ", end="\r", file=sys.stderr, flush=True)


def _print(name: str, row: dict[str, dict[str, float]]) -> None:
    text = f"  {name:14}" + "".join(f"{row['seconds'][side] * 1e6:7,.0f} us" for side in ("old", "new"))
    for side in ("new", "control"):
        one = row[side]
        text += f"{one['ratio']:{8 if side == 'new' else 9}.3f}{one['low']:9.3f}-{one['high']:.3f} "
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
