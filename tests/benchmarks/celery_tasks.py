"""What confinement costs a Celery worker: tasks a second, of one process of a prefork pool, on Redis.

Imported by each worker as its application too: ``-A celery_tasks``.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from celery import Celery

from rcon_celery import confined, install

ROOT = Path(__file__).resolve().parents[2]
URL = "RCON_BENCHMARK_REDIS"


class Kind(NamedTuple):
    """A task, how many of it are run at a time, and the options of its worker."""

    task: str
    many: int
    options: tuple[str, ...] = ()


KINDS = {
    "plain": Kind("plain", 100),
    "reused": Kind("reused", 100),
    "fresh": Kind("fresh", 30),
    # The pool looks only about once a second if one of its processes is to be replaced.
    "plain, child=1": Kind("plain", 5, ("--max-tasks-per-child", "1")),
}


def make(url: str) -> Celery:
    """The application: three times the same task."""
    app = Celery("benchmark", broker=url, backend=url, set_as_current=False)
    app.conf.update(broker_connection_retry_on_startup=True, worker_prefetch_multiplier=32)
    install(app)

    def task(name: str) -> Any:
        return app.task(name=name, shared=False)

    def nothing(x: int) -> int:
        return x

    def nothing_reused(x: int) -> int:
        return x

    def nothing_fresh(x: int) -> int:
        return x

    task("plain")(nothing)
    task("reused")(confined(memory="256M", timeout="60s")(nothing_reused))
    task("fresh")(confined(memory="256M", timeout="60s", max_works=1)(nothing_fresh))
    return app


def rates(rounds: int) -> dict[str, dict[str, float]]:
    """Tasks per second of each kind, median of the rounds; they take turns."""
    sys.path.insert(0, str(ROOT))  # the redis-server and the worker are those of the tests
    from tests.integrations.celery.redis_server import RedisServer
    from tests.integrations.celery.worker import Worker

    measured: dict[str, list[float]] = {name: [] for name in KINDS}
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        server = stack.enter_context(RedisServer(directory))
        apps: dict[str, Celery] = {}
        for name, kind in KINDS.items():
            url = server.database()
            environ = {URL: url, "PYTHONPATH": str(Path(__file__).parent)}
            worker = Worker(
                directory, "celery_tasks", *kind.options, concurrency=1, name=f"w{len(apps)}", environ=environ
            )
            stack.enter_context(worker)
            apps[name] = stack.enter_context(contextlib.closing(make(url)))
        queues = (f"q{number}" for number in itertools.count())
        for turn in range(rounds + 1):
            for name, app in apps.items():
                rate = throughput(app, KINDS[name].task, next(queues), KINDS[name].many)
                if turn:  # the first is to warm up
                    measured[name].append(rate)
    plain = measured["plain"]
    return {
        name: {
            "tasks_per_second": statistics.median(mine),
            "ratio": statistics.median(a / b for a, b in zip(mine, plain, strict=True)),
            "added": statistics.median(1 / a - 1 / b for a, b in zip(mine, plain, strict=True)),
        }
        for name, mine in measured.items()
    }


def throughput(app: Celery, task: str, queue: str, count: int) -> float:
    """Put tasks into a queue that nobody reads yet; then have the worker read it."""
    sent = [app.tasks[task].apply_async((number,), queue=queue) for number in range(count)]
    app.control.add_consumer(queue)
    sent[-1].get(timeout=60)
    app.control.cancel_consumer(queue)
    first, last = (result.date_done for result in (sent[0], sent[-1]))
    return (count - 1) / float((last - first).total_seconds())


def report(found: dict[str, dict[str, float]]) -> None:
    """The table."""
    print("\nCelery, a task that does nothing, one process of a prefork pool, Redis")
    print(f"  {'':16}{'tasks/s':>10}{'ratio':>9}{'added':>12}{'aim':>22}")
    aims = {"reused": "ratio >= 0.90", "fresh": "added <= 5 ms"}
    for name, row in found.items():
        rate, ratio, added = row["tasks_per_second"], row["ratio"], row["added"] * 1000
        print(f"  {name:16}{rate:10,.0f}{ratio:9.2f}{added:9.2f} ms{aims.get(name, ''):>22}")


def __getattr__(name: str) -> Any:
    """``app``, for a worker."""
    if name == "app":
        return make(os.environ[URL])
    raise AttributeError(name)
