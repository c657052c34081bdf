"""An application whose tasks use features of Celery and of Python that assume something about their process.

The tasks are the same with and without confinement. Environment variables configure the application, which a worker and
the test that sends it tasks both make.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import billiard
import celery
import redis
from celery.app.task import Context
from celery.contrib.abortable import AbortableTask
from celery.result import allow_join_result
from celery.utils.nodenames import node_format

import rcon_celery

#: A Redis: the broker unless `BROKER` is set, the result backend unless `BACKEND` is, the store of ``log:<name>``.
REDIS = "RCON_TEST_REDIS"
BROKER = "RCON_TEST_BROKER"
BACKEND = "RCON_TEST_BACKEND"
CONFINED = "RCON_TEST_CONFINED"
#: The visibility timeout of Redis, seconds.
VISIBILITY = "RCON_TEST_VISIBILITY"
#: If set, pools may be restarted by remote control.
RESTARTS = "RCON_TEST_RESTARTS"
#: A folder with a module ``reloaded``, which a test changes.
MODULES = "RCON_TEST_MODULES"

LIMITS = {"memory": "256M", "pids": 64, "timeout": "60s"}
LONG = 1000.0


def make(environ: Mapping[str, str]) -> celery.Celery:
    """Return the application with all its tasks."""
    url = environ[REDIS]
    broker = environ.get(BROKER, url)
    app = celery.Celery("features", broker=broker, backend=environ.get(BACKEND, url), set_as_current=False)
    app.conf.update(
        broker_connection_retry_on_startup=True,
        worker_prefetch_multiplier=1,
        worker_pool_restarts=RESTARTS in environ,
        result_extended=True,
    )
    if broker.startswith("redis"):
        app.conf.broker_transport_options = {
            "visibility_timeout": int(environ.get(VISIBILITY, "3600")),
            "unacked_restore_interval": 1,
            "unacked_restore_throttle": 1,
        }
    confine: Callable[..., Any] = unconfined
    if CONFINED in environ:
        rcon_celery.install(app)
        confine = rcon_celery.confined
    define(app, confine, url)
    if MODULES in environ:
        sys.path.insert(0, environ[MODULES])
        app.conf.imports = ("reloaded",)
    return app


def unconfined(**_limits: object) -> Callable[[Any], Any]:
    return lambda task: task


def square(number: int) -> int:
    return number * number


def own_cgroup() -> str:
    return Path("/proc/self/cgroup").read_text()


def put_cgroup(queue: Any) -> None:
    queue.put(own_cgroup())


def fill(size: int) -> int:
    return len(bytearray(size))


def package(name: str) -> Any:
    return {"multiprocessing": multiprocessing, "billiard": billiard}[name]


def define(app: celery.Celery, confined: Callable[..., Any], url: str) -> None:
    """Register the tasks."""

    def note(name: str, *what: Any) -> None:
        with contextlib.closing(redis.Redis.from_url(url)) as client:
            client.rpush(f"log:{name}", " ".join(map(str, what)))

    def task(limits: Mapping[str, Any] = LIMITS, **options: Any) -> Callable[[Callable[..., Any]], Any]:
        def decorate(function: Callable[..., Any]) -> Any:
            return app.task(shared=False, **options)(confined(**limits)(function))

        return decorate

    # --- processes ---

    @task(name="pool")
    def pool(library: str, method: str) -> list[int]:
        with package(library).get_context(method).Pool(2) as workers:
            found: list[int] = workers.map(square, range(5))
        return found

    @task(name="process")
    def process(library: str, method: str) -> bool:
        """Return whether a child process is in the cgroups of its task."""
        context = package(library).get_context(method)
        queue = context.Queue()
        child = context.Process(target=put_cgroup, args=(queue,))
        child.start()
        found = queue.get(timeout=30)
        child.join()
        return bool(found == own_cgroup())

    @task(name="futures")
    def futures(method: str) -> list[int]:
        context = multiprocessing.get_context(method)
        with concurrent.futures.ProcessPoolExecutor(2, mp_context=context) as workers:
            return list(workers.map(square, range(5)))

    @task(name="manager")
    def manager() -> dict[str, int]:
        with multiprocessing.Manager() as managed:
            shared = managed.dict()
            child = multiprocessing.Process(target=shared.update, args=({"a": 1},))
            child.start()
            child.join()
            return dict(shared)

    @task(name="leave_process")
    def leave_process(method: str) -> list[Any]:
        child = package("multiprocessing").get_context(method).Process(target=time.sleep, args=(LONG,))
        child.start()
        here: Any = multiprocessing.current_process()
        return [child.pid, os.getpid(), here._config.get("tempdir")]

    @task({**LIMITS, "pids": 8}, name="many_processes")
    def many_processes() -> None:
        children = [multiprocessing.Process(target=time.sleep, args=(LONG,)) for _ in range(20)]
        for child in children:
            child.start()

    @task({**LIMITS, "memory": "96M"}, name="large_process")
    def large_process() -> int:
        with concurrent.futures.ProcessPoolExecutor(1) as workers:
            return workers.submit(fill, 2**28).result()

    # --- exits ---

    @task(name="end")
    def end(how: str) -> None:
        end_process(how)

    class EndsOnFailure(celery.Task):
        abstract = True

        def on_failure(self, *_: Any) -> None:
            sys.exit(3)

    @task(name="end_on_failure", base=EndsOnFailure)
    def end_on_failure() -> None:
        raise ValueError("no")

    @task(name="end_late", acks_late=True, reject_on_worker_lost=True)
    def end_late(name: str) -> str:
        note(name, "run")
        with contextlib.closing(redis.Redis.from_url(url)) as client:
            runs = client.llen(f"log:{name}")
        if runs == 1:
            sys.exit(3)
        return "done"

    @task(name="end_retried", retry_on_worker_lost=True, max_retries=1, default_retry_delay=0)
    def end_retried(name: str) -> None:
        note(name, "run")
        sys.exit(3)

    # --- what a task sees and calls ---

    @task(name="surroundings", bind=True)
    def surroundings(self: Any) -> dict[str, Any]:
        here = billiard.process.current_process()
        return {
            "current_app": celery.current_app.main,
            "same app": celery.current_app._get_current_object() is self.app,
            "current_task": celery.current_task.name,
            "worker task": self.app.current_worker_task.request.id == self.request.id,
            "name": here.name.rpartition("-")[0] or here.name,
            "same names": here.name == multiprocessing.current_process().name,
            "has an index": getattr(here, "index", None) is not None,
            "same identities": here._identity == multiprocessing.current_process()._identity,
            "identity": len(here._identity),
            "node": node_format("%n %h %d", self.request.hostname),
            "node has an index": node_format("%i", self.request.hostname) != "0",
            "routing key": self.request.delivery_info["routing_key"],
            "context": isinstance(self.request, Context),
            "execution options": sorted(self.request.as_execution_options()),
            "task": self.request.task,
            "main thread": threading.current_thread() is threading.main_thread(),
        }

    @task(name="wait_for_child", bind=True)
    def wait_for_child(self: Any, allowed: bool) -> Any:
        child = surroundings.apply_async()
        with allow_join_result() if allowed else contextlib.nullcontext():
            return sorted(child.get(timeout=30))

    @task(name="states", bind=True)
    def states(self: Any) -> list[Any]:
        self.update_state(state="ONE", meta={"at": 1})
        first = self.AsyncResult(self.request.id)
        found = [first.state, first.info]
        self.update_state(task_id=self.request.id, state="TWO", meta=[2])
        second = self.AsyncResult(self.request.id)
        return [*found, second.state, second.info]

    @task(name="add")
    def add(x: int, y: int) -> int:
        return x + y

    @task(name="total")
    def total(numbers: list[int]) -> int:
        return sum(numbers)

    @task(name="replace_by", bind=True)
    def replace_by(self: Any, what: str) -> Any:
        members = [add.s(number, number) for number in range(3)]
        if what == "chord":
            raise self.replace(celery.chord(members, total.s()))
        if what == "group":
            raise self.replace(celery.group(members))
        raise self.replace(celery.chain(add.s(1, 2), add.s(3)))

    @task(name="enlarge", bind=True)
    def enlarge(self: Any, x: int) -> int:
        self.add_to_chord(add.s(x, 100))
        return x

    @task(name="again", bind=True)
    def again(self: Any, after_retry: bool = False) -> Any:
        """Retry at once. With ``after_retry`` the second attempt waits until the state of the first is stored.

        Otherwise two processes write the result at the same time. Celery does not write RETRY over SUCCESS, but a
        reader of its backend for files takes a file that is being written for one that is not there.
        """
        if self.request.retries:
            while after_retry and self.AsyncResult(self.request.id).state != "RETRY":
                time.sleep(0.02)
            return [self.request.retries, self.request.chord is None]
        raise self.retry(countdown=0)

    @task(name="abortable", bind=True, base=AbortableTask)
    def abortable(self: Any, name: str) -> str:
        note(name, "begins", self.is_aborted())
        end = time.monotonic() + 50
        while time.monotonic() < end:
            if self.is_aborted():
                return "aborted"
            time.sleep(0.05)
        return "never aborted"

    @task(name="raise")
    def raise_(text: str) -> None:
        raise ValueError(text)

    @task({"memory": "64M", "timeout": "60s"}, name="hog")
    def hog() -> int:
        return fill(2**28)

    @task(name="helper")
    def helper() -> Any:
        return sys.modules["reloaded"].VALUE

    @task(name="work")
    def work(name: str, seconds: float) -> int:
        note(name, "runs", time.time())
        time.sleep(seconds)
        return os.getpid()

    @task(name="work_until")
    def work_until(name: str, gate: str) -> int:
        note(name, "runs", time.time())
        while not Path(gate).exists():
            time.sleep(0.02)
        return os.getpid()

    @task(name="work_late", acks_late=True)
    def work_late(name: str, seconds: float) -> int:
        note(name, "runs", time.time())
        time.sleep(seconds)
        return os.getpid()


def end_process(how: str) -> None:
    if how == "_exit":
        os._exit(3)
    if how == "thread":
        with concurrent.futures.ThreadPoolExecutor(1) as threads:
            threads.submit(sys.exit, 3).result()
    if how == "text":
        sys.exit("for a reason")
    sys.exit({"status": 3, "none": None, "huge": 2**40 + 3, "negative": -1}[how])


def __getattr__(name: str) -> Any:
    """Make ``app`` from the environment, when a worker imports it."""
    if name != "app":
        raise AttributeError(name)
    app = make(os.environ)
    globals()["app"] = app
    return app
