"""The tasks under test, and a worker's application: `make` for a producer, ``-A`` this module for a worker.

The tasks are the same with and without confinement. What happens to each is written down as it happens, in the list
``record:<task id>`` of the application's own Redis database: signals, handlers of the task's class.
"""

from __future__ import annotations

import ast
import codecs
import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import celery
import kombu.serialization
import redis
from celery import signals
from celery.exceptions import Ignore, Reject, SoftTimeLimitExceeded
from celery.utils.log import get_task_logger

import rcon_celery

BROKER = "RCON_TEST_BROKER"
CONFINED = "RCON_TEST_CONFINED"
SERIALIZER = "RCON_TEST_SERIALIZER"

#: For every task of these tests; far from what they need.
LIMITS = {"memory": "256M", "pids": 64, "timeout": "60s"}


class OutOfPaper(Exception):
    """An exception of the application's own."""

    def __init__(self, printer: str, pages: int) -> None:
        super().__init__(printer, pages)
        self.printer = printer
        self.pages = pages


class Stubborn(Exception):
    """An exception that cannot be constructed from its arguments."""

    def __init__(self, *, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Point:
    """A class of the application's own; crosses by pickle only."""

    def __init__(self, x: int, y: int) -> None:
        self.x = x
        self.y = y

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Point) and (self.x, self.y) == (other.x, other.y)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Point({self.x}, {self.y})"


class Records:
    """The records of each task, in order. Any process of the application may write them."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._client: redis.Redis | None = None
        self._pid = 0

    def client(self) -> redis.Redis:
        if self._client is None or self._pid != os.getpid():
            self._client, self._pid = redis.Redis.from_url(self._url), os.getpid()
        return self._client

    def write(self, task_id: str, *what: object) -> None:
        self.client().rpush(f"record:{task_id}", json.dumps(what))

    def read(self, task_id: str) -> list[list[Any]]:
        return [json.loads(line) for line in self.client().lrange(f"record:{task_id}", 0, -1)]

    def close(self) -> None:
        if self._client is not None:
            self._client.close()


def rot13_dumps(data: object) -> str:
    return codecs.encode(json.dumps(data), "rot13")


def rot13_loads(text: str | bytes) -> object:
    return json.loads(codecs.decode(text if isinstance(text, str) else text.decode(), "rot13"))


def literal_loads(text: str | bytes) -> object:
    """Of what Python writes: carries more than JSON does."""
    return ast.literal_eval(text if isinstance(text, str) else bytes(text).decode())


def make(url: str, *, confined: bool = False, serializer: str = "json") -> celery.Celery:
    """Return the application with all its tasks."""
    register: Any = kombu.serialization.register
    register("literal", repr, literal_loads, "application/x-literal", "utf-8")
    register("rot13", rot13_dumps, rot13_loads, "application/x-rot13", "utf-8")
    app = celery.Celery("shop", broker=url, backend=url, set_as_current=False)
    app.conf.update(
        task_serializer=serializer,
        result_serializer=serializer,
        accept_content=["json", "rot13", "literal", *({serializer} - {"json"})],
        result_extended=True,
        result_expires=600,
        worker_prefetch_multiplier=4,
        worker_hijack_root_logger=True,
        broker_connection_retry_on_startup=True,
        worker_send_task_events=True,
        task_send_sent_event=False,
        visibility_timeout=3600,
    )
    confine: Callable[..., Any] = unconfined
    if confined:
        rcon_celery.install(app)
        confine = rcon_celery.confined
    define(app, confine, Records(url))
    return app


def unconfined(**_limits: object) -> Callable[[Any], Any]:
    return lambda task: task


def define(app: celery.Celery, confined: Callable[..., Any], records: Records) -> None:
    """Register the tasks."""
    logger = get_task_logger("shop")

    class Recording(celery.Task):
        """Record the calls that Celery makes to a task's class."""

        abstract = True

        def before_start(self, task_id: str, args: Any, kwargs: Any) -> None:
            records.write(task_id, "before_start", args, kwargs)

        def on_success(self, retval: Any, task_id: str, args: Any, kwargs: Any) -> None:
            records.write(task_id, "on_success", retval, args, kwargs)

        def on_failure(self, exc: Any, task_id: str, args: Any, kwargs: Any, einfo: Any) -> None:
            records.write(task_id, "on_failure", repr(exc), args, kwargs, type(einfo).__name__)

        def on_retry(self, exc: Any, task_id: str, args: Any, kwargs: Any, einfo: Any) -> None:
            records.write(task_id, "on_retry", repr(exc), args, kwargs, type(einfo).__name__)

        def after_return(
            self, status: str, retval: Any, task_id: str, args: Any, kwargs: Any, einfo: Any
        ) -> None:
            records.write(task_id, "after_return", status, repr(retval))

    class Called(Recording):
        """Has a ``__call__`` of its own."""

        abstract = True
        greeting = "hello"

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return [self.greeting, super().__call__(*args, **kwargs)]

    def task(**options: Any) -> Callable[[Callable[..., Any]], Any]:
        def decorate(function: Callable[..., Any]) -> Any:
            return app.task(shared=False, **options)(confined(**LIMITS)(function))

        return decorate

    @task(name="add")
    def add(x: Any, y: Any) -> Any:
        return x + y

    @task(name="echo")
    def echo(*args: Any, **kwargs: Any) -> Any:
        return [list(args), kwargs]

    @task(name="rot13", serializer="rot13")
    def rot13(text: str) -> str:
        return text.upper()

    @task(name="total")
    def total(numbers: list[Any]) -> Any:
        return sum(numbers)

    @task(name="where")
    def where() -> dict[str, Any]:
        """Return its pid and its cgroups."""
        return {"pid": os.getpid(), "cgroups": Path("/proc/self/cgroup").read_text()}

    @task(name="request", bind=True, base=Recording)
    def request(self: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Return what a task sees of its request."""
        seen = self.request
        names = [
            *(
                "id",
                "root_id",
                "parent_id",
                "correlation_id",
                "group",
                "retries",
                "is_eager",
                "called_directly",
            ),
            *(
                "args",
                "kwargs",
                "argsrepr",
                "kwargsrepr",
                "timelimit",
                "expires",
                "shadow",
                "priority",
                "stamps",
            ),
            *("reply_to", "origin"),
        ]
        found = {name: getattr(seen, name, "missing") for name in names}
        found["delivery_info"] = dict(seen.delivery_info)
        found["headers"] = {name: value for name, value in (seen.headers or {}).items() if name == "tenant"}
        found["tenant"] = seen.get("tenant")
        found["hostname"] = seen.hostname
        found["name"] = self.name
        found["app"] = self.app.main
        found["current"] = celery.current_task.name
        found["origin"] = bool(found["origin"])
        return found

    @task(name="instance", bind=True, base=Recording)
    def instance(self: Any) -> str:
        return type(self).__mro__[1].__name__

    @task(name="called", base=Called)
    def called(name: str) -> str:
        return name

    @task(name="raising", base=Recording)
    def raising(kind: str) -> None:
        if kind == "own":
            raise OutOfPaper("laser", 3)
        if kind == "stubborn":
            raise Stubborn(reason="because")
        if kind == "group":
            raise ExceptionGroup(
                "several", [ValueError(1), ExceptionGroup("inner", [OutOfPaper("laser", 3)])]
            )
        if kind == "cause":
            try:
                raise KeyError("inner")
            except KeyError as error:
                raise ValueError("outer") from error
        if kind == "unicode":
            raise ValueError("Grüße \N{SNOWMAN}")
        raise ValueError(kind)

    @task(name="throwing", base=Recording, throws=(KeyError,))
    def throwing() -> None:
        raise KeyError("expected")

    @task(name="retrying", bind=True, base=Recording, max_retries=5)
    def retrying(self: Any, until: int, *, step: int = 0) -> list[int]:
        if self.request.retries < until:
            error = OutOfPaper("laser", step)
            raise self.retry(args=(until,), kwargs={"step": step + 1}, exc=error, countdown=0.1)
        return [self.request.retries, step]

    @task(name="retrying_in_vain", bind=True, base=Recording, max_retries=2, default_retry_delay=0.05)
    def retrying_in_vain(self: Any, kind: str) -> None:
        if kind == "own":
            raise self.retry(exc=OutOfPaper("inkjet", 1))
        raise self.retry()

    @task(name="auto", bind=True, base=Recording, autoretry_for=(ConnectionError,), default_retry_delay=0.05)
    def auto(self: Any, failures: int) -> int:
        if self.request.retries < failures:
            raise ConnectionError(f"failure {self.request.retries}")
        return int(self.request.retries)

    @task(
        name="auto_in_vain",
        base=Recording,
        autoretry_for=(OutOfPaper,),
        retry_backoff=False,
        retry_kwargs={"max_retries": 1, "countdown": 0.05},
    )
    def auto_in_vain() -> None:
        raise OutOfPaper("plotter", 2)

    @task(name="ignoring", bind=True, base=Recording)
    def ignoring(self: Any) -> None:
        self.update_state(state="SKIPPED", meta={"why": "nothing to do"})
        raise Ignore

    @task(name="rejecting", bind=True, base=Recording, acks_late=True)
    def rejecting(self: Any, requeue: bool) -> str:
        if self.request.delivery_info.get("redelivered"):
            return "redelivered"
        raise Reject("not me", requeue=requeue)

    @task(name="late", base=Recording, acks_late=True)
    def late() -> str:
        return "late"

    @task(name="without_result", base=Recording, ignore_result=True)
    def without_result() -> str:
        return "unheard"

    @task(name="progress", bind=True, base=Recording)
    def progress(self: Any, gate: str) -> str:
        """Stay in a state of its own until the file exists."""
        self.update_state(state="PROGRESS", meta={"done": 1, "of": 2})
        while not Path(gate).exists():
            time.sleep(0.02)
        return "done"

    @task(name="started", base=Recording, track_started=True)
    def started(gate: str) -> str:
        while not Path(gate).exists():
            time.sleep(0.02)
        return "done"

    @task(name="limited", rate_limit="5/s")
    def limited() -> float:
        return time.time()

    @task(name="clock")
    def clock() -> float:
        return time.time()

    @task(name="replacing", bind=True)
    def replacing(self: Any, x: int) -> Any:
        raise self.replace(add.s(x, 100))

    @task(name="calling", bind=True)
    def calling(self: Any, x: int) -> str:
        """Send another task, whose parent is this one."""
        child = request.apply_async((x,), task_id=f"{self.request.id}-child")
        return str(child.id)

    @task(name="listen")
    def listen(task_id: str) -> str:
        """An error callback of the old kind: it gets the id alone."""
        records.write(task_id, "errback by id")
        return task_id

    @app.task(
        name="listen_closely", shared=False
    )  # an error callback of the new kind runs in the worker itself
    def listen_closely(request: Any, exc: Any, traceback: Any) -> None:
        records.write(request.id, "errback", type(exc).__name__, repr(exc), bool(traceback))

    @task(name="soft", base=Recording, soft_time_limit=1, time_limit=30)
    def soft() -> str:
        try:
            time.sleep(20)
        except SoftTimeLimitExceeded:
            return "cleaned up"
        return "slept"

    @task(name="too_long", base=Recording, time_limit=1)
    def too_long() -> None:
        time.sleep(30)

    @task(name="wait", base=Recording)
    def wait(seconds: float) -> str:
        time.sleep(seconds)
        return "waited"

    @task(name="speaking", bind=True)
    def speaking(self: Any) -> None:
        logger.warning("the task speaks")
        print("the task prints")

    @task(name="pointed")
    def pointed(point: Any, numbers: Any) -> Any:
        if isinstance(point, Point):
            return Point(point.y, point.x), sorted(numbers)
        return [type(point).__name__, numbers]

    @task(name="unserializable", base=Recording)
    def unserializable(kind: str = "object") -> object:
        return object() if kind == "object" else 10**5000  # which no text can be made of

    @task(name="spelled")
    def spelled(what: Any) -> str:
        return repr(what)


def write_down_signals(records: Records) -> None:
    """Connect to Celery's signals about tasks, with strong references: the receivers are local."""

    def before(sender: Any, task_id: str, **_: Any) -> None:
        records.write(task_id, "prerun", sender.name)

    def after(sender: Any, task_id: str, state: str, retval: Any, **_: Any) -> None:
        retval = type(retval).__name__ if isinstance(retval, BaseException) else None
        records.write(task_id, "postrun", sender.name, state, retval)

    def success(sender: Any, result: Any, **_: Any) -> None:
        records.write(sender.request.id, "success", sender.name)

    def failure(sender: Any, task_id: str, exception: Any, **_: Any) -> None:
        records.write(task_id, "failure", sender.name, type(exception).__name__)

    def retry(sender: Any, request: Any, reason: Any, **_: Any) -> None:
        records.write(request.id, "retry", sender.name, repr(reason.exc))

    def revoked(sender: Any, request: Any, terminated: bool, signum: Any, expired: bool, **_: Any) -> None:
        records.write(request.id, "revoked", sender.name, terminated, expired, signum and str(signum))

    def internal_error(sender: Any, task_id: str, exception: Any, **_: Any) -> None:
        records.write(task_id, "internal error", sender.name, repr(exception))

    for signal, receiver in (
        (signals.task_prerun, before),
        (signals.task_postrun, after),
        (signals.task_success, success),
        (signals.task_failure, failure),
        (signals.task_retry, retry),
        (signals.task_revoked, revoked),
        (signals.task_internal_error, internal_error),
    ):
        signal.connect(receiver, weak=False)


def __getattr__(name: str) -> Any:
    """Make ``app`` from the environment, when a worker imports it."""
    if name != "app":
        raise AttributeError(name)
    url = os.environ[BROKER]
    app = make(url, confined=CONFINED in os.environ, serializer=os.environ.get(SERIALIZER, "json"))
    write_down_signals(Records(url))
    globals()["app"] = app
    return app


def environment(url: str, *, confined: bool, serializer: str = "json") -> Mapping[str, str]:
    """Return the environment variables that configure the application in a worker."""
    return {BROKER: url, SERIALIZER: serializer, **({CONFINED: "1"} if confined else {})}
