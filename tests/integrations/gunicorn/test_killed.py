"""kill -9 of each kind of process while requests are under way: none hangs, none runs unconfined, nothing stays."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.integrations.gunicorn.server import Gunicorn, Load
from tests.processes import alive, children, entries, has_reaped, until

SETTINGS = """
[policy.free]
memory = "256M"
pids = 64
each = { timeout = "10s" }

[[route]]
path = "/free/**"
policy = "free"
"""

CLASSES = {
    "sync": ("--worker-class", "sync", "--workers", "2"),
    "gthread": ("--worker-class", "gthread", "--workers", "2", "--threads", "4"),
    "gevent": ("--worker-class", "gevent", "--workers", "2"),
}

#: Requests end so, or are served; "none" would be a hang, 500 an error nobody foresaw.
MAY_BE = {200, 503, "cut"}


def assert_survived(load: Load, server: Gunicorn) -> None:
    assert set(load.answers) <= MAY_BE, (load.answers, server.log())
    assert not load.unconfined
    assert "Traceback" not in server.log()


@pytest.fixture(
    scope="module", params=[pytest.param(arguments, id=name) for name, arguments in CLASSES.items()]
)
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gunicorn]:
    """A server of each class, for all tests after which it goes on. It leaves nothing."""
    with Gunicorn(tmp_path_factory.mktemp("gunicorn"), SETTINGS, *request.param) as running:
        yield running
    assert not running.cgroups()


def test_executor(server: Gunicorn) -> None:
    with Load(server) as load:
        for _ in range(5):
            load.wait_for_answers(5)
            for pid in server.executors():
                kill(pid)
        load.wait_for_answers(20)
    assert_survived(load, server)


def test_executor_at_work(server: Gunicorn) -> None:
    """The request of a killed process is answered at once, and the log says by what it ended."""
    answers: list[int | str] = []
    thread = threading.Thread(target=lambda: answers.append(server.status("/free/sleep?seconds=9")))
    thread.start()
    time.sleep(1)  # it is asleep by now; were it not, the test would only be weaker
    for pid in server.executors():
        kill(pid)
    thread.join(5)
    assert answers == [503]
    line = server.lines()[-1]
    assert (line["event"], line["signal"], line["policy"]) == ("killed", 9, "free")


def test_fork_server(server: Gunicorn) -> None:
    """The worker is replaced; what needs a process is refused until then."""
    workers = server.workers()
    with Load(server) as load:
        load.wait_for_answers(10)
        for worker in workers:
            for fork_server in children(worker):
                until(partial(has_reaped, fork_server))  # the trial of a worker that starts is over
                kill(fork_server)
        until(lambda: not set(workers) & set(server.workers()))
        load.wait_for_answers(20)
    assert_survived(load, server)
    assert "the fork server has ended" in server.log()


def test_worker(server: Gunicorn) -> None:
    with Load(server) as load:
        for _ in range(2):
            load.wait_for_answers(10)
            victim = server.workers()[0]
            below = children(victim)
            kill(victim)
            until(partial(is_replaced, server, victim))
            until(partial(are_gone, below))
            load.wait_for_answers(10)
    assert_survived(load, server)
    groups = [group for directory in server.cgroups() for group in entries(directory / "work")]
    leaves = {leaf.name for group in groups for leaf in entries(group) if "-" in leaf.name}
    assert {leaf.partition("-")[0] for leaf in leaves} <= set(map(str, server.workers()))


@pytest.mark.parametrize("arguments", CLASSES.values(), ids=CLASSES)
def test_master(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    """Its workers notice; the next start removes what was left."""
    first = Gunicorn(tmp_path, SETTINGS, *arguments).wait_until_served()
    with Load(first) as load:
        load.wait_for_answers(10)
        workers = first.workers()
        below = [*workers, *(pid for worker in workers for pid in children(worker)), *first.executors()]
        kill(first.pid)
        first.process.wait()
        load.wait_for_answers_of_any_kind(20)
    # A sync worker looks for its parent when nobody waits to be served.
    until(partial(are_gone, workers))
    assert set(load.answers) <= MAY_BE
    assert not load.unconfined
    with Gunicorn(tmp_path, SETTINGS, *arguments) as second:
        assert second.get("/free/who").json()["confined"]
        assert not first.cgroups()
        until(partial(are_gone, below))
    assert not second.cgroups()


def is_replaced(server: Gunicorn, victim: int) -> bool:
    workers = server.workers()
    return victim not in workers and len(workers) == 2


def are_gone(pids: list[int]) -> bool:
    return not any(map(alive, pids))


def kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return
