"""An application whose tasks reach their limits, for a worker and for the test that sends it tasks.

Environment variables configure it. Tasks write to lists in Redis, ``log:<name>``.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import encodings.idna  # noqa: F401 - a task of another user may not be able to read it
import gc
import json
import mmap
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import celery
import msgspec
import redis
from celery.exceptions import Reject, SoftTimeLimitExceeded
from celery.signals import worker_process_init, worker_process_shutdown, worker_shutdown
from celery.utils.log import get_task_logger

from rcon_celery import confined, expand, handler_side, install, wire
from rcon_plugins.errors import MemoryLimitExceeded, SoftMemoryLimitExceeded
from rcon_plugins.executors.channel import Channel

#: A Redis: the result backend, the store of ``log:<name>``, and the broker unless `AMQP` is set.
BROKER = "RCON_TEST_BROKER"
AMQP = "RCON_TEST_AMQP"
#: The URL of another result backend.
BACKEND = "RCON_TEST_BACKEND"
#: The type of the queue, with RabbitMQ.
QUEUE_TYPE = "RCON_TEST_QUEUE_TYPE"
SETTINGS = "RCON_TEST_SETTINGS"
#: If set, the application is not given to `install`.
INSTALL = "RCON_TEST_INSTALL"
ACCEPT = "RCON_TEST_ACCEPT"
#: The visibility timeout of Redis, seconds.
VISIBILITY = "RCON_TEST_VISIBILITY"
#: If set, results never expire.
KEPT = "RCON_TEST_KEPT"
#: If set, the worker's processes may not remove cgroups when they end.
CANNOT_REMOVE = "RCON_TEST_CANNOT_REMOVE"
#: How long a process of the pool, and an executor process, takes to start; seconds.
SLOW_START = "RCON_TEST_SLOW_START"

MANY = 100_000.0


def make(
    url: str,
    settings: str | None = None,
    *,
    installed: bool = True,
    accept: str = "json",
    environ: Mapping[str, str] | None = None,
) -> celery.Celery:
    """Return the application with its tasks; ``environ`` is the worker's, if that is another process."""
    environ = os.environ if environ is None else environ
    backend = None if "RCON_TEST_NO_BACKEND" in os.environ else environ.get(BACKEND, url)
    app = celery.Celery("limited", broker=environ.get(AMQP, url), backend=backend, set_as_current=False)
    if QUEUE_TYPE in environ:
        app.conf.task_default_queue_type = environ[QUEUE_TYPE]
    app.conf.update(
        broker_connection_retry_on_startup=True,
        worker_prefetch_multiplier=1,
        accept_content=accept.split(","),
        broker_transport_options=of_redis(environ) if AMQP not in environ else {},
        task_routes={"queued": {"queue": "slow"}},
    )
    if KEPT in environ:
        app.conf.result_expires = 0
    if "RCON_TEST_SPAWN" in os.environ:
        app.conf.worker_pool_start_method = "spawn"
    if CANNOT_REMOVE in os.environ:
        # An executor process has no right to do that.
        worker_process_shutdown.connect(handler_side("outside")(become_nobody), weak=False)
        worker_shutdown.connect(become_nobody, weak=False)
    if SLOW_START in os.environ:
        worker_process_init.connect(start_slowly, weak=False)
    if installed:
        install(app, settings)
    define(app, url)
    return app


def of_redis(environ: Mapping[str, str]) -> dict[str, int]:
    """Return when the transport redelivers unacknowledged messages; it checks every second."""
    return {
        "visibility_timeout": int(environ.get(VISIBILITY, "3600")),
        "unacked_restore_interval": 1,
        "unacked_restore_throttle": 1,
    }


def become_nobody(**_: object) -> None:
    os.seteuid(65534)


def start_slowly(**_: object) -> None:
    time.sleep(float(os.environ[SLOW_START]))


def whereabouts() -> dict[str, Any]:
    return {
        "pid": os.getpid(),
        "cgroup": Path("/proc/self/cgroup").read_text(),
        "threads": Path("/proc/thread-self/cgroup").read_text(),
        "confined": "/work/" in Path("/proc/self/cgroup").read_text(),
    }


def fill(size: int) -> int:
    """Allocate so many bytes of memory, and touch each page."""
    block = mmap.mmap(-1, size)
    for page in range(0, size, 4096):
        block[page] = 1
    return len(block)


def define(app: celery.Celery, url: str) -> None:
    """Register the tasks."""

    def note(name: str, *what: Any) -> None:
        with contextlib.closing(redis.Redis.from_url(url)) as client:
            client.rpush(f"log:{name}", " ".join(map(str, what)))

    def task(**options: Any) -> Any:
        return app.task(shared=False, **options)

    @task(name="where")
    @confined(memory="128M", timeout="60s")
    def where() -> dict[str, Any]:
        return whereabouts()

    @task(name="fresh")
    @confined(memory="128M", timeout="60s", max_uses=1)
    def fresh() -> dict[str, Any]:
        return whereabouts()

    @task(name="plain")
    def plain() -> dict[str, Any]:
        return whereabouts()

    @task(name="complain")
    def complain() -> None:
        raise ValueError("no")

    @task(name="say")
    def say(number: int) -> list[str]:
        """Write to all that a task can write to. Return what standard output and error are."""
        print(f"printed {number}")
        get_task_logger("tests.say").warning("logged %d", number)
        os.write(1, f"written {number}\n".encode())
        subprocess.run(["/bin/sh", "-c", f"echo from a program {number} >&2"], check=True)
        return [str(Path(f"/proc/self/fd/{number}").readlink()).partition(":")[0] for number in (1, 2)]

    @task(name="who", bind=True)
    def who(self: Any) -> int:
        self.update_state(state="MEETING")
        note("who", self.AsyncResult(self.request.id).state)
        return os.getuid()

    @task(name="named")
    @confined("small")
    def named() -> dict[str, Any]:
        return whereabouts()

    @task(name="queued")
    def queued() -> dict[str, Any]:
        return whereabouts()

    @task(name="double")
    @confined(memory="128M", timeout="60s")
    def double(x: int) -> list[Any]:
        return [2 * x, whereabouts()["confined"]]

    @task(name="files")
    @confined(memory="128M", timeout="60s")
    def files() -> list[str]:
        """Return the open files; a TCP socket is named TCP."""
        lines = [line.split() for line in Path("/proc/self/net/tcp").read_text().splitlines()[1:]]
        connections = {f"socket:[{line[9]}]" for line in lines}
        found = []
        for entry in Path("/proc/self/fd").iterdir():
            with contextlib.suppress(OSError):
                link = str(entry.readlink())
                found.append(f"TCP {link}" if link in connections else link)
        return found

    @task(name="hog")
    @confined(memory="64M", timeout="60s")
    def hog() -> int:
        return fill(256 * 2**20)

    @task(name="hog_again", autoretry_for=(MemoryLimitExceeded,), max_retries=1, default_retry_delay=0)
    @confined(memory="64M", timeout="60s")
    def hog_again() -> int:
        note("hog_again", "run")
        return fill(256 * 2**20)

    @task(name="raising")
    @confined(memory="64M", timeout="60s")
    def raising() -> None:
        raise ValueError("mine")

    @task(name="unspeakable")
    @confined(memory="64M", timeout="60s", concurrency=1)
    def unspeakable() -> None:
        raise Unspeakable(5)

    @task(name="unencodable")
    @confined(memory="64M", timeout="60s")
    def unencodable() -> object:
        return object()

    @task(name="retrying", bind=True, max_retries=3)
    @confined(memory="128M", timeout="60s")
    def retrying(self: Any) -> list[Any]:
        note("retrying", whereabouts()["confined"], self.request.headers)
        if self.request.retries < 3:
            raise self.retry(countdown=0)
        return sorted(self.request.headers or {})

    @task(name="retried")
    @confined(
        memory="64M", timeout="60s", on_memory=expand("2x", up_to="512M"), max_deaths=4, max_result="128M"
    )
    def retried(size: int, answer: int = 0, gate: str = "") -> Any:
        note("retried", "run")
        while gate and not Path(gate).exists():
            time.sleep(0.02)
        return fill(size) if not answer else "x" * answer

    @task(name="retried_in_vain")
    @confined(memory="64M", on_memory=expand("2x", up_to="1G"), max_deaths=2, dead_letter="dead")
    def retried_in_vain(size: int) -> int:
        note("retried_in_vain", "run")
        return fill(size)

    @task(name="write")
    @confined(timeout="100s")
    def write(path: str, stop: str) -> str:
        """Write past the page cache until ``stop`` exists, and log the time of each MiB."""
        block = mmap.mmap(-1, 2**20)
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_DIRECT)
        while not Path(stop).exists():
            os.pwrite(file, block, 0)
            note("writes", time.monotonic())
        os.close(file)
        return "done"

    @task(name="untidy")
    @confined(timeout="60s", timeout_soft="3s")
    def untidy(do: str, path: str = "") -> Any:
        """Change the state of the process, or return it."""
        umask = os.umask(0o22)
        os.umask(umask)
        found = [os.getpid(), str(Path.cwd()), umask, os.environ.get("UNTIDY")]
        if do == "change":
            os.umask(0o77)
            os.chdir(path)
            os.environ["UNTIDY"] = "yes"
            signal.signal(signal.SIGUSR1, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
            signal.setitimer(signal.ITIMER_REAL, 1.0)
        elif do == "wait":
            try:
                time.sleep(MANY)
            except SoftTimeLimitExceeded:
                found.append("soft limit")
        return found

    @task(name="eat")
    def eat(size: int) -> int:
        """Has the policy of a route."""
        note("eat", "run")
        return fill(size)

    @task(name="eat_twice")
    @confined("small", max_deaths=2)
    def eat_twice(size: int) -> int:
        note("eat_twice", "run")
        return fill(size)

    @task(name="retrying_late", bind=True, acks_late=True, max_retries=20)
    @confined(timeout="60s", max_deaths=1)
    def retrying_late(self: Any) -> int:
        if self.request.retries < 20:
            raise self.retry(countdown=0)
        return int(self.request.retries)

    @task(name="replacing_late", bind=True, acks_late=True)
    @confined(timeout="60s", max_deaths=1)
    def replacing_late(self: Any, times: int) -> str:
        if times:
            raise self.replace(self.s(times - 1))
        return "done"

    @task(name="rejecting_late", bind=True, acks_late=True)
    @confined(timeout="60s", max_deaths=2)
    def rejecting_late(self: Any, times: int) -> str:
        note("rejecting_late", "run")
        with contextlib.closing(redis.Redis.from_url(url)) as client:
            runs = int(client.llen("log:rejecting_late"))
        if runs % 2:
            time.sleep(1.2)  # longer than a run without a stored lease
        if runs < times:
            raise Reject("not now", requeue=True)
        return "done"

    @task(name="retried_late", acks_late=True, reject_on_worker_lost=True)
    @confined(timeout="60s", max_deaths=2, dead_letter="dead")
    def retried_late(name: str, gate: str) -> str:
        note(name, "begins", os.getpid(), whereabouts()["confined"])
        while not Path(gate).exists():
            time.sleep(0.02)
        return "done"

    @task(name="heavy", bind=True, max_retries=0)
    @confined(memory="720M", timeout="60s")
    def heavy(self: Any, number: int, seconds: float) -> list[int]:
        return lift(number, seconds, self.request.retries)

    @task(name="heavy_late", bind=True, max_retries=0, acks_late=True)
    @confined(memory="720M", timeout="60s", max_deaths=2)
    def heavy_late(self: Any, number: int, seconds: float) -> list[int]:
        return lift(number, seconds, self.request.retries)

    def lift(number: int, seconds: float, retries: int) -> list[int]:
        note("heavy", "begins", number)
        time.sleep(seconds)
        note("heavy", "ends", number)
        return [number, retries]

    @task(name="count")
    def count(found: list[list[int]]) -> int:
        return len(found)

    @task(name="share")
    @confined(timeout="60s", together={"memory": "128M"})
    def share(size: int) -> int:
        block = b"x" * size
        time.sleep(2)
        return len(block)

    @task(name="hang")
    @confined(timeout="1s")
    def hang() -> None:
        time.sleep(MANY)

    @task(name="hang_tidily")
    @confined(timeout="2s", grace="60s")
    def hang_tidily(path: str) -> None:
        """Wait for a program that tidies up at SIGTERM."""
        script = f"trap 'sleep 1; echo tidy > {path}; exit' TERM; while :; do sleep 0.1; done"
        subprocess.run(["sh", "-c", script], check=True)

    @task(name="hang_briefly")
    @confined(timeout="200ms")
    def hang_briefly() -> None:
        time.sleep(MANY)

    @task(name="hang_deaf")
    @confined(timeout="6s", timeout_soft="2s")
    def hang_deaf() -> None:
        for _ in range(2):
            with contextlib.suppress(SoftTimeLimitExceeded):
                time.sleep(MANY)

    @task(name="fork")
    @confined(pids=8, memory="256M", timeout="60s")
    def fork() -> None:
        children = []
        try:
            while True:
                children.append(subprocess.Popen(["sleep", str(MANY)]))
        finally:
            for child in children:
                child.kill()
                child.wait()

    @task(name="orphans")
    @confined(pids=12, memory="256M", timeout="60s")
    def orphans() -> dict[str, Any]:
        """Make an orphan: who its parent is, and whether it is reaped soon after its end."""
        reading, writing = os.pipe()
        between = os.fork()
        if between == 0:
            parent_before = os.getpid()
            if os.fork() == 0:
                while os.getppid() == parent_before:
                    time.sleep(0.01)
                os.write(writing, f"{os.getpid()} {os.getppid()}".encode())
            os._exit(0)
        own = os.getpid()
        os.waitpid(between, 0)
        orphan, parent = map(int, os.read(reading, 30).split())
        end = time.monotonic() + 20
        while Path(f"/proc/{orphan}").exists() and time.monotonic() < end:
            time.sleep(0.01)
        os.close(reading)
        os.close(writing)
        return {
            "adopted by": "the fork server" if parent == os.getppid() else f"{parent}, not by {own}",
            "reaped": not Path(f"/proc/{orphan}").exists(),
        }

    @task(name="die")
    @confined(timeout="60s")
    def die(how: str) -> None:
        if how == "exit":
            sys.exit(3)
        if how == "abort":
            os.abort()
        os.kill(os.getpid(), signal.SIGKILL)

    @task(name="soft_memory")
    @confined(memory="256M", memory_soft="64M", timeout="60s")
    def soft_memory() -> str:
        blocks = []
        try:
            for _ in range(120):
                blocks.append(bytearray(os.urandom(1)) * 2**20)
                time.sleep(0.02)
        except SoftMemoryLimitExceeded as error:
            return f"cleaned up: {error}"
        return "no soft limit"

    @task(name="soft_time")
    @confined(timeout="60s", timeout_soft="2s")
    def soft_time() -> str:
        try:
            time.sleep(MANY)
        except SoftTimeLimitExceeded:
            return "cleaned up"
        return "no soft limit"

    @task(name="leaving")
    @confined(timeout="60s", pids=64)
    def leaving() -> int:
        return start_child()

    @task(name="leaving_on_purpose")
    @confined(timeout="60s", pids=64, leave_children=True)
    def leaving_on_purpose(fail: bool = False) -> int:
        pid = start_child()
        note("left", pid)
        if fail:
            raise ValueError("left something")
        return pid

    @task(name="lengthy", bind=True, max_retries=3)
    @confined(timeout="60s", max_result="1M")
    def lengthy(self: Any, how: str, size: int) -> list[Any]:
        if how == "raise":
            raise ValueError("x" * size)
        if how == "retry":
            raise self.retry(args=["return", size], kwargs={}, countdown=0)
        return [os.getpid(), "x" * size]

    @task(name="threads")
    @confined(timeout="60s", pids=64)
    def leave_threads(how: str, gate: str = "") -> int:
        return start_threads(how, gate)

    @task(name="threads_on_purpose")
    @confined(timeout="60s", pids=64, leave_children=True)
    def leave_threads_on_purpose(gate: str) -> int:
        return start_threads("wait", gate)

    @task(name="late", acks_late=True, reject_on_worker_lost=True)
    @confined(timeout="60s", pids=64)
    def late(name: str, gate: str) -> str:
        """Run until the file exists, and log a line regularly."""
        note(name, "begins", os.getpid(), whereabouts()["confined"])
        while not Path(gate).exists():
            note(f"{name}:beat", os.getpid(), time.monotonic())
            time.sleep(0.02)
        note(name, "ends", os.getpid())
        return "done"

    @task(name="stay")
    @confined(timeout="10m", pids=64)  # longer than any test on a slow machine
    def stay(name: str) -> None:
        note(name, os.getpid(), start_child())
        time.sleep(MANY)

    @task(name="stay_retried", acks_late=True, retry_on_worker_lost=True, default_retry_delay=0)
    @confined(timeout="10m", pids=64)
    def stay_retried(name: str) -> None:
        """What has its process killed by Celery itself is not lost."""
        note(name, os.getpid(), start_child())
        time.sleep(MANY)

    @task(name="stay_limited", time_limit=1)
    @confined(timeout="60s", pids=64)
    def stay_limited(name: str) -> None:
        note(name, os.getpid(), start_child())
        time.sleep(MANY)

    @task(name="no_memory")
    @confined(timeout="60s", rlimits={"as": "2G"})
    def no_memory() -> int:
        return len(bytearray(4 * 2**30))

    @task(name="hostile", bind=True)
    @confined(memory="64M", timeout="2s", max_uses=1)
    def hostile(self: Any, how: str, *arguments: Any) -> None:
        answer_as(how, *arguments)

    @task(name="hostile_large")
    @confined(memory="256M", timeout="20s", max_uses=1)
    def hostile_large(*arguments: Any) -> None:
        answer_as(*arguments)

    @task(name="expensive", bind=True)
    @confined(timeout="60s")
    def expensive(self: Any, kind: str) -> Any:
        if kind == "children":
            self.request.children += [app.AsyncResult(str(number)) for number in range(9999)]
        if kind == "exceptions":
            raise ExceptionGroup("many", [ValueError(number) for number in range(1999)])
        if kind == "exception":
            raise ValueError("x" * 2**21)
        if kind == "lines":
            raise ValueError("\n" * 200_000)
        if kind == "forged":
            raise ValueError("x\n[2026-11-30: CRITICAL/MainProcess] forged \x1b[31mred\rover")
        value: list[Any] = []
        for _ in range(150 * (kind == "deep")):
            value = [value]
        return [[]] * 2**19 if kind == "lists" else [value]

    @task(name="hostile_on")
    @confined(timeout="60s")
    def hostile_on(how: str) -> None:
        if how:
            answer_as(how)

    @task(name="numbered", acks_late=True)
    @confined(timeout="60s", max_uses=1)
    def numbered(number: int) -> int:
        return number

    @task(name="not_begun", soft_time_limit=1)
    @confined(timeout="60s")
    def not_begun() -> None:
        """With `SLOW_START` its time is over before it begins."""
        time.sleep(MANY)

    @task(name="one_at_a_time")
    @confined(timeout="60s", concurrency=1)
    def one_at_a_time(seconds: float = 0.2) -> list[float]:
        began = time.monotonic()
        note("one_at_a_time", "runs")
        time.sleep(seconds)
        return [began, time.monotonic()]


def answer_as(how: str, *arguments: Any) -> None:
    """In an executor process: send a malformed answer over its channel."""
    (channel,) = [found for found in gc.get_objects() if isinstance(found, Channel) and found.fileno() >= 0]
    number = held_number()
    if how == "silent":
        time.sleep(MANY)
    body: dict[str, Any] = {
        "pickle": lambda: pickle.dumps(Bomb(*arguments)),
        "error": lambda: json.dumps(
            {"error": {"module": arguments[0], "type": arguments[1], **parts(*arguments[2:])}, "children": []}
        ).encode(),
        "list": lambda: b"[1]",
        "value": lambda: b'{"value": 1, "children": []}',
        "children": lambda: b'{"value": 1, "children": 5}',
    }
    if how == "raw":
        send_raw(channel, number, *arguments)
    kind, _, manner = how.partition(" ")
    data = body[kind]()
    content = (
        ("application/x-python-serialize", "binary") if kind == "pickle" else ("application/json", "utf-8")
    )
    size = 2**40 if manner == "long" else len(data)
    if manner == "wrong":
        number = bytes(8)
    ending: Any = "error" if kind == "error" else "ok"
    head = wire.AnswerHead(number, ending, "", wire.Payload(*content, size))
    frames = [(wire.ANSWER, msgspec.msgpack.encode(head)), (wire.DATA, data)]
    if manner == "twice":
        frames *= 2
    if manner == "noise":
        frames.append((99, b"noise"))
    channel.send(*frames)
    time.sleep(MANY)


def send_raw(
    channel: Channel,
    number: bytes,
    how: Any,
    text: str,
    content_type: str,
    encoding: str,
    unit: str,
    frame: int,
) -> None:
    """Send an answer of the data that ``unit``, an expression, makes, in frames of so many bytes."""
    data: bytes = eval(unit)
    head = wire.AnswerHead(number, how, text, wire.Payload(content_type, encoding, len(data)))
    frames = [(wire.ANSWER, msgspec.msgpack.encode(head))]
    frames += [(wire.DATA, data[start : start + frame]) for start in range(0, len(data), frame)]
    for start in range(0, len(frames), 1000):
        channel.send(*frames[start : start + 1000])
    time.sleep(MANY)


def parts(*args: Any) -> dict[str, Any]:
    described = [[False, arg] for arg in args]
    return {
        "args": described,
        "constructor_args": described,
        "state": {"with_traceback": 5, "__traceback__": 5},
    }


def held_number() -> bytes:
    """Return the number of the running task, from the frames of the service."""
    frame: Any = sys._getframe()
    while "head" not in frame.f_locals:
        assert frame.f_back is not None
        frame = frame.f_back
    number: bytes = frame.f_locals["head"].number
    return number


class Unspeakable(Exception):
    def __str__(self) -> str:
        return str(len(self.args[0]))


class Bomb:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.write_text, (Path(self.path), "unpickled")


def start_threads(how: str, gate: str) -> int:
    """Start threads that run on after their task ended."""

    def wait() -> None:
        while not Path(gate).exists():
            time.sleep(0.02)
        Path(f"{gate}-done").touch()

    if how == "pool":
        pool = POOLS.setdefault("kept", concurrent.futures.ThreadPoolExecutor(2))
        pool.submit(int).result()
    elif how:
        threading.Thread(target=wait, daemon=how == "daemon").start()
    return os.getpid()


POOLS: dict[str, concurrent.futures.ThreadPoolExecutor] = {}


def start_child() -> int:
    """Start a grandchild in a session of its own; return its pid."""
    code = "import os, time; print(os.getpid(), flush=True); os.close(1); time.sleep(100000)"
    reading, writing = os.pipe()
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            os.dup2(writing, 1)
            os.execv(sys.executable, [sys.executable, "-c", code])
        os._exit(0)
    os.close(writing)
    os.wait()
    with os.fdopen(reading) as pipe:
        return int(pipe.readline())


def __getattr__(name: str) -> Any:
    """Make ``app`` from the environment, when a worker imports it."""
    if name != "app":
        raise AttributeError(name)
    app = make(
        os.environ[BROKER],
        os.environ.get(SETTINGS),
        installed=INSTALL not in os.environ,
        accept=os.environ.get(ACCEPT, "json"),
    )
    globals()["app"] = app
    return app
