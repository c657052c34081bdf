"""What confinement costs a Celery worker: tasks a second, of one process of a prefork pool, on Redis.

Imported by each worker as its application too: ``-A celery_tasks``.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from celery import Celery

from rcon_celery import confined, install

ROOT = Path(__file__).resolve().parents[2]
URL = "RCON_BENCHMARK_REDIS"


#: What a task of the second sort does: so many rounds of PBKDF2, some 10 ms of CPU time.
HASH_ROUNDS = 25_000


class Kind(NamedTuple):
    """A task, how many of it are run at a time, the worker that runs it, and what it is compared with."""

    task: str
    many: int
    worker: str
    base: str = "plain"


#: Workers by name, and the options of each. Of what is compared each has its own, for they keep processes ready.
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
    # The pool looks only about once a second if one of its processes is to be replaced.
    "plain, child=1": Kind("plain", 5, "child=1"),
    "plain, 10 ms": Kind("plain-at-work", 30, "plain", "plain, 10 ms"),
    "reused, 10 ms": Kind("reused-at-work", 30, "reused", "plain, 10 ms"),
    "fresh, 10 ms": Kind("fresh-at-work", 30, "fresh", "plain, 10 ms"),
}


def make(url: str) -> Celery:
    """The application: the same two tasks, three times."""
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
    """Of each kind tasks per second and the CPU time of each task, medians of the rounds; they take turns."""
    sys.path.insert(0, str(ROOT))  # the redis-server and the worker are those of the tests
    from tests.integrations.celery.redis_server import RedisServer
    from tests.integrations.celery.worker import Worker

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
                before = cpu_seconds(workers[kind.worker].family())
                rate = throughput(apps[kind.worker], kind.task, next(queues), kind.many)
                cpu = cpu_seconds(workers[kind.worker].family()) - before
                if turn:  # the first is to warm up
                    measured[name].append((rate, cpu / kind.many))
    return {name: compared(measured[name], measured[kind.base]) for name, kind in KINDS.items()}


def compared(mine: list[tuple[float, float]], base: list[tuple[float, float]]) -> dict[str, float]:
    """The medians, and those of what is compared within each round."""
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


def cpu_seconds(pids: Iterable[int]) -> float:
    """The CPU time of these processes and of those of their children that have ended."""
    ticks = 0
    for pid in pids:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            ticks += sum(map(int, fields[11:15]))
    return ticks / os.sysconf("SC_CLK_TCK")


def throughput(app: Celery, task: str, queue: str, count: int) -> float:
    """Put tasks into a queue that nobody reads yet; then have the worker read it."""
    sent = [app.tasks[task].apply_async((number,), queue=queue) for number in range(count)]
    app.control.add_consumer(queue)
    sent[-1].get(timeout=60)
    app.control.cancel_consumer(queue)
    first, last = (result.date_done for result in (sent[0], sent[-1]))
    return (count - 1) / float((last - first).total_seconds())


def report(found: dict[str, dict[str, float]]) -> None:
    """The table. CPU time is that of all processes of the worker: it says most where others use the machine too."""
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
    """``app``, for a worker."""
    if name == "app":
        return make(os.environ[URL])
    raise AttributeError(name)
