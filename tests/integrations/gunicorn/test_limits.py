"""Limits over HTTP, for every worker class and with the application loaded before and after the fork."""

from __future__ import annotations

import http.client
import threading
import time
from collections.abc import Iterator
from itertools import product

import pytest

from tests.integrations.gunicorn.server import Answer, Gunicorn
from tests.processes import until

SETTINGS = """
[policy.free]
memory = "256M"
pids = 64

[policy.small]
memory = "64M"
pids = 64

[policy.apart]
oom = "process"
memory = "64M"
pids = 64

[policy.short]
memory = "256M"
each = { timeout = "700ms" }

[policy.narrow]
memory = "256M"
concurrency = 1

[policy.few]
memory = "256M"
pids = 16

[policy.light]
cpu_weight = 50
pids = 4096

[[route]]
path = "/free/**"
policy = "free"

[[route]]
path = "/small/**"
policy = "small"

[[route]]
path = "/apart/**"
policy = "apart"

[[route]]
path = "/short/**"
policy = "short"

[[route]]
path = "/narrow/**"
policy = "narrow"

[[route]]
path = "/few/**"
policy = "few"

[[route]]
path = "/light/**"
policy = "light"
"""

CLASSES = {
    "sync": ("--workers", "2"),
    "gthread": ("--workers", "1", "--threads", "4"),
    "gevent": ("--workers", "1"),
}


@pytest.fixture(
    scope="module",
    params=list(product(CLASSES, (False, True))),
    ids=lambda parameter: f"{parameter[0]}-{'preload' if parameter[1] else 'lazy'}",
)
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gunicorn]:
    worker_class, preload = request.param
    arguments = ["--worker-class", worker_class, *CLASSES[worker_class], *(["--preload"] if preload else [])]
    with Gunicorn(tmp_path_factory.mktemp("gunicorn"), SETTINGS, *arguments) as running:
        yield running
    assert not [path for path in running.cgroups() if path.exists()]


def assert_problem(answer: Answer, status: int, limit: str, policy: str) -> None:
    assert answer.status == status
    assert answer.headers["Content-Type"] == "application/problem+json"
    problem = answer.json()
    assert (problem["status"], problem["limit"], problem["policy"]) == (status, limit, policy)
    assert b"Traceback" not in answer.body


def test_each_request_runs_confined(server: Gunicorn) -> None:
    who = server.get("/free/who").json()
    assert who["confined"]
    assert who["pid"] not in server.workers()
    assert who["pid"] in server.executors("free")


@pytest.mark.parametrize("work", ["lose", "lost"])
def test_an_oom_kill_of_a_child_ends_the_request(server: Gunicorn, work: str) -> None:
    for _ in range(3):
        assert_problem(server.get(f"/small/{work}"), 503, "memory", "small")
        line = server.lines()[-1]
        assert (line["event"], line["limit"]) == ("memory", "memory")
        assert line["usage"]["oom_kills"] >= 1


def test_with_oom_process_a_request_that_lost_a_child_answers_and_is_logged(server: Gunicorn) -> None:
    assert server.get("/apart/lose").json() == {"status": 9}
    line = server.lines()[-1]
    assert (line["event"], line["policy"], line["usage"]["oom_kills"]) == ("ok", "apart", 1)
    assert line["detail"] == "GET /apart/lose: 1 process was killed at the memory limit"


def test_memory_ends_in_503_and_the_next_request_is_served(server: Gunicorn) -> None:
    began = time.monotonic()
    answer = server.get("/small/allocate?mib=200")
    assert time.monotonic() - began < 2, "the issue's own bound, not a measurement"
    assert_problem(answer, 503, "memory", "small")
    assert server.get("/small/allocate?mib=20").json() == {"mib": 20}
    line = server.lines()[-1]
    assert (line["event"], line["policy"], line["limit"]) == ("memory", "small", "memory")
    assert line["usage"]["memory_peak"] <= 64 * 1024 * 1024


def test_time_ends_in_504(server: Gunicorn) -> None:
    assert_problem(server.get("/short/sleep?seconds=15"), 504, "each.timeout", "short")
    assert server.get("/short/who").status == 200


def test_concurrency_ends_in_503_with_retry_after(server: Gunicorn) -> None:
    slow: list[Answer] = []
    thread = threading.Thread(target=lambda: slow.append(server.get("/narrow/sleep?seconds=1")))
    thread.start()
    until(lambda: bool(server.executors("narrow")))
    time.sleep(0.2)
    answer = server.get("/narrow/who")
    thread.join()
    assert_problem(answer, 503, "concurrency", "narrow")
    assert int(answer.headers["Retry-After"]) >= 1
    assert slow[0].status == 200
    assert server.get("/narrow/who").status == 200


def test_fork_bomb_stays_within_its_limit_and_is_gone_after(server: Gunicorn) -> None:
    most, done = 0, threading.Event()

    def watch() -> None:
        nonlocal most
        while not done.wait(0.005):
            most = max(most, len(server.executors("few")))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        answer = server.get("/few/bomb")
    finally:
        done.set()
        watcher.join()
    assert_problem(answer, 503, "pids", "few")
    assert 1 < most <= 16
    # one waiting executor may be there already
    until(lambda: len(server.executors("few")) <= 1, 5)
    assert server.get("/few/who").status == 200


def test_a_response_that_had_begun_is_cut(server: Gunicorn) -> None:
    with pytest.raises((http.client.IncompleteRead, ConnectionResetError)):
        server.get("/small/stream")


def test_the_applications_own_error_stays_its_own(server: Gunicorn) -> None:
    answer = server.get("/free/fail")
    assert answer.status == 500
    assert answer.headers["Content-Type"] != "application/problem+json"
    assert "the application's own error" in server.log()


def test_the_serving_thread_is_confined_if_that_is_enough(server: Gunicorn) -> None:
    who = server.get("/light/who").json()
    assert who["confined"]
    greenlets = "gevent" in server.arguments
    assert (who["pid"] in server.workers()) is not greenlets


def test_a_request_without_a_route_is_refused(server: Gunicorn) -> None:
    answer = server.get("/elsewhere/who")
    assert answer.status == 421
    assert answer.headers["Content-Type"] == "application/problem+json"
