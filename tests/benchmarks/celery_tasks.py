"""Measure what confinement costs a Celery worker: tasks per second of one process of a prefork pool, on Redis.

Each worker also imports this module as its application: ``-A celery_tasks``.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from celery import Celery

from rcon_celery import confined, install

ROOT = Path(__file__).resolve().parents[2]
URL = "RCON_BENCHMARK_REDIS"


#: The number of rounds of PBKDF2 in a task that works: some 10 ms of CPU time.
HASH_ROUNDS = 25_000


class Kind(NamedTuple):
    """A task, the number of them in one turn, the worker that runs them, and the kind to compare with."""

    task: str
    many: int
    worker: str
    base: str = "plain"


#: Workers by name, and the options of each. Kinds that are compared have workers of their own, which keep spares ready.
WORKERS: dict[str, tuple[str, ...]] = {
    "plain": (),
    "reused": (),
    "fresh": (),
    "child=1": ("--max-tasks-per-child", "1"),
}
KINDS = {
    "plain": Kind("plain", 100, "plain"),
    "reused": Kind("reused", 100, "reused"),
    "fresh": Kind("fresh", 30, "fresh"),
    # The pool checks only about once a second whether to replace one of its processes.
    "plain, child=1": Kind("plain", 5, "child=1"),
    "plain, 10 ms": Kind("plain-at-work", 30, "plain", "plain, 10 ms"),
    "reused, 10 ms": Kind("reused-at-work", 30, "reused", "plain, 10 ms"),
    "fresh, 10 ms": Kind("fresh-at-work", 30, "fresh", "plain, 10 ms"),
}


def make(url: str) -> Celery:
    """Return the application, with the same two tasks three times."""
    app = Celery("benchmark", broker=url, backend=url, set_as_current=False)
    app.conf.update(broker_connection_retry_on_startup=True, worker_prefetch_multiplier=32)
    install(app)

    def add(name: str, confine: Callable[[Any], Any]) -> None:
        def nothing(x: int) -> int:
            return x

        def work(x: int) -> int:
            hashlib.pbkdf2_hmac("sha256", b"", b"", HASH_ROUNDS)
            return x

        app.task(name=name, shared=False)(confine(nothing))
        app.task(name=f"{name}-at-work", shared=False)(confine(work))

    add("plain", lambda body: body)
    add("reused", confined(memory="256M", timeout="60s"))
    add("fresh", confined(memory="256M", timeout="60s", max_uses=1))
    return app


def rates(rounds: int) -> dict[str, dict[str, float]]:
    """Return tasks per second and CPU time per task of each kind, as medians of the rounds. The kinds take turns."""
    sys.path.insert(0, str(ROOT))  # use the redis-server and the worker of the tests
    from tests.integrations.celery.redis_server import RedisServer
    from tests.integrations.celery.worker import Worker
    from tests.processes import cpu_seconds_of_family

    measured: dict[str, list[tuple[float, float]]] = {name: [] for name in KINDS}
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        server = stack.enter_context(RedisServer(directory))
        apps: dict[str, Celery] = {}
        workers: dict[str, Worker] = {}
        for name, options in WORKERS.items():
            url = server.database()
            environ = {URL: url, "PYTHONPATH": str(Path(__file__).parent)}
            worker = Worker(
                directory,
                "celery_tasks",
                *options,
                concurrency=1,
                name=f"w{len(apps)}",
                environ=environ,
            )
            workers[name] = stack.enter_context(worker)
            apps[name] = stack.enter_context(contextlib.closing(make(url)))
        queues = (f"q{number}" for number in itertools.count())
        for turn in range(rounds + 1):
            for name, kind in KINDS.items():
                before = cpu_seconds_of_family(workers[kind.worker].pid)
                rate = throughput(apps[kind.worker], kind.task, next(queues), kind.many)
                cpu = cpu_seconds_of_family(workers[kind.worker].pid) - before
                if turn:  # the first turn is for warming up
                    measured[name].append((rate, cpu / kind.many))
    return {name: compared(measured[name], measured[kind.base]) for name, kind in KINDS.items()}


def compared(mine: list[tuple[float, float]], base: list[tuple[float, float]]) -> dict[str, float]:
    """Return the medians, and the medians of the ratios and differences within each round."""
    pairs = list(zip(mine, base, strict=True))
    return {
        "tasks_per_second": statistics.median(rate for rate, _ in mine),
        "ratio": statistics.median(rate / other for (rate, _), (other, _) in pairs),
        "ratio_of_best": max(rate for rate, _ in mine) / max(rate for rate, _ in base),
        "added": statistics.median(1 / rate - 1 / other for (rate, _), (other, _) in pairs),
        "added_of_best": 1 / max(rate for rate, _ in mine) - 1 / max(rate for rate, _ in base),
        "cpu_seconds": statistics.median(cpu for _, cpu in mine),
        "cpu_added": statistics.median(cpu - other for (_, cpu), (_, other) in pairs),
    }


def throughput(app: Celery, task: str, queue: str, count: int) -> float:
    """Put tasks into a queue, then make the worker read it. Return tasks per second."""
    sent = [app.tasks[task].apply_async((number,), queue=queue) for number in range(count)]
    app.control.add_consumer(queue)
    sent[-1].get(timeout=60)
    app.control.cancel_consumer(queue)
    first, last = (result.date_done for result in (sent[0], sent[-1]))
    return (count - 1) / float((last - first).total_seconds())


def report(found: dict[str, dict[str, float]]) -> None:
    """Print the table. CPU time covers all processes of the worker. It is the best figure on a busy machine."""
    print("\nCelery, a task that does nothing or works for 10 ms, one process of a prefork pool, Redis")
    head = ("tasks/s", "ratio", "of best", "added", "of best", "CPU", "added")
    print(f"  {'':16}" + "".join(f"{word:>10}" for word in head) + f"{'aim':>17}")
    aims = {"reused": "ratio >= 0.90", "fresh": "added <= 5 ms"}
    for name, row in found.items():
        times = (f"{row[key] * 1e3:.2f}" for key in ("added", "added_of_best", "cpu_seconds", "cpu_added"))
        print(
            f"  {name:16}{row['tasks_per_second']:10,.0f}{row['ratio']:10.2f}{row['ratio_of_best']:10.2f}"
            + "".join(f"{time:>7} ms" for time in times)
            + f"{aims.get(name, ''):>17}"
        )


def __getattr__(name: str) -> Any:
    """Return ``app`` when a worker imports it."""
    if name == "app":
        return make(os.environ[URL])
    raise AttributeError(name)
