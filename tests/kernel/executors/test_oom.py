"""A request or task whose child the OOM killer ends says so, whatever it answers."""

from __future__ import annotations

import json

import pytest

from tests.kernel.executors.service import ask, begin, end, managing

KILLED = "1 process was killed at the memory limit"


def logged(caplog: pytest.LogCaptureFixture) -> list[dict[str, object]]:
    return [json.loads(record.message) for record in caplog.records if record.message.startswith("{")]


@pytest.mark.smoke
def test_an_answer_after_an_oom_kill_is_told_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    with managing({"each": {"memory": "64M"}}) as manager:
        answer, outcome = ask(manager, "lose_child", 200)
        assert (answer, outcome.ending) == ("child ended with -9", "ok")
        assert outcome.usage.oom_kills == 1
        assert outcome.detail == f"lose_child: {KILLED}"
        assert [(line["event"], line["detail"]) for line in logged(caplog)] == [("ok", outcome.detail)]
        assert ask(manager, "pid")[1].usage.oom_kills == 0
        assert len(logged(caplog)) == 1


def test_a_timeout_after_an_oom_kill_names_it(caplog: pytest.LogCaptureFixture) -> None:
    with managing({"each": {"memory": "64M", "timeout": "3s"}}) as manager:
        outcome = ask(manager, "lose_child", 200, 60)[1]
        assert (outcome.ending, outcome.limit) == ("timeout", "each.timeout")
        assert outcome.usage.oom_kills == 1
        assert outcome.detail.endswith(f"; {KILLED}")
        assert [line["detail"] for line in logged(caplog)] == [outcome.detail]


def test_aborted_work_names_an_oom_kill() -> None:
    with managing({"each": {"memory": "64M"}}) as manager:
        admission = begin(manager, "lose_child", 200, 0.5)
        admission.channel.receive()
        outcome = admission.abort("the client closed the connection")
        assert outcome.ending == "aborted"
        assert outcome.detail == f"the client closed the connection; {KILLED}"


def test_the_memory_limit_of_a_policy_counts_too() -> None:
    with managing({"memory": "64M"}) as manager:
        outcome = end(begin(manager, "lose_child", 200))[1]
        assert outcome.usage.oom_kills == 1
