"""An OOM kill ends the whole request or task, or one process of it; and it is told, whatever the ending."""

from __future__ import annotations

import time

import pytest

from rcon_plugins.kernel.cgroup import Hierarchy
from tests.kernel.executors.service import ask, begin, end, managing, soon

pytestmark = pytest.mark.each_layout

KILLED = "1 process was killed at the memory limit"


def logged(caplog: pytest.LogCaptureFixture) -> list[dict[str, object]]:
    return [vars(record)["rcon"] for record in caplog.records if "rcon" in vars(record)]


@pytest.mark.smoke
@pytest.mark.parametrize("policy", [{"each": {"memory": "64M"}}, {"memory": "64M"}])
def test_an_oom_kill_ends_all_of_a_request(policy: dict[str, object]) -> None:
    with managing(policy) as manager:
        for _ in range(3):
            began = time.monotonic()
            answer, outcome = ask(manager, "lose_child", 200, 60)
            assert time.monotonic() - began < 30
            assert (answer, outcome.ending) == (None, "memory")
            assert outcome.usage.oom_kills
            assert ask(manager, "pid")[1].usage.oom_kills == 0


def test_what_a_survivor_answers_is_not_taken() -> None:
    with managing({"each": {"memory": "64M"}}) as manager:
        for _ in range(5):
            admission = begin(manager, "lose_child", 200)
            time.sleep(0.05)
            _, outcome = end(admission)
            assert (outcome.ending, outcome.limit) == ("memory", "each.memory")
            assert ask(manager, "pid")[1].ending == "ok"


def test_the_others_of_a_policy_go_on() -> None:
    """The limit of the whole policy is reached, and every executor is notified on v1; one process is killed."""
    with managing({"memory": "96M"}) as manager:
        other = begin(manager, "sleep", 6)
        assert ask(manager, "lose_child", 200, 60)[1].ending == "memory"
        answer, outcome = end(other)
        assert (answer, outcome.ending, outcome.usage.oom_kills) == (None, "ok", 0)


def test_an_answer_after_an_oom_kill_is_told_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    with managing({"oom": "process", "each": {"memory": "64M"}}) as manager:
        answer, outcome = ask(manager, "lose_child", 200)
        assert (answer, outcome.ending) == ("child ended with -9", "ok")
        assert outcome.usage.oom_kills == 1
        assert outcome.detail == f"lose_child: {KILLED}"
        assert [(line["event"], line["detail"]) for line in logged(caplog)] == [("ok", outcome.detail)]
        assert ask(manager, "pid")[1].usage.oom_kills == 0
        assert len(logged(caplog)) == 1


def test_a_timeout_after_an_oom_kill_names_it(caplog: pytest.LogCaptureFixture) -> None:
    with managing({"oom": "process", "each": {"memory": "64M", "timeout": "5s"}}) as manager:
        outcome = ask(manager, "lose_child", 200, 60)[1]
        assert (outcome.ending, outcome.limit) == ("timeout", "each.timeout")
        assert outcome.usage.oom_kills == 1
        assert outcome.detail.endswith(f"; {KILLED}")
        assert [line["detail"] for line in logged(caplog)] == [outcome.detail]


def test_aborted_work_names_an_oom_kill() -> None:
    with managing({"oom": "process", "each": {"memory": "64M"}}) as manager:
        admission = begin(manager, "lose_child", 200)
        admission.channel.receive()
        outcome = admission.abort("the client closed the connection")
        assert outcome.ending == "aborted"
        assert outcome.detail == f"the client closed the connection; {KILLED}"


def test_the_memory_limit_of_a_policy_counts_too() -> None:
    with managing({"oom": "process", "memory": "64M"}) as manager:
        outcome = end(begin(manager, "lose_child", 200))[1]
        assert (outcome.ending, outcome.usage.oom_kills) == ("ok", 1)


@pytest.mark.layout("v1", "hybrid")
def test_watching_costs_little() -> None:
    """At most 0.1 ms of the time of a spawn, in the best of some."""
    assert Hierarchy.discover().layout != "v2"
    with managing({"each": {"memory": "64M"}}) as manager:
        admission = begin(manager, "sleep", 1)
        executor = admission._executor
        guard = admission._pool.processes._oom
        assert guard is not None
        times = []
        for _ in range(20):
            began = time.perf_counter()
            guard.add(executor)
            times.append(time.perf_counter() - began)
        assert min(times) < 0.0001
        assert end(admission)[1].ending == "ok"


@pytest.mark.layout("v1", "hybrid")
def test_the_notice_arrives_while_nobody_asks() -> None:
    """The supervisor kills the rest although the host's thread waits for nothing."""
    with managing({"each": {"memory": "64M"}}) as manager:
        admission = begin(manager, "lose_child", 200, 60)
        assert soon(admission._executor.ended.is_set)
        assert end(admission)[1].ending == "memory"
