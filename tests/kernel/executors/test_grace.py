"""each.grace of a task: SIGTERM to all of its processes at the time limit, and SIGKILL after the grace."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from rcon_plugins import Manager
from rcon_plugins.confinement.isolation import Server
from rcon_plugins.errors import SettingsError, TimeLimitExceeded
from rcon_plugins.settings.file import from_mapping
from tests.kernel.executors.service import ask, begin, end, managing, soon
from tests.processes import alive

pytestmark = pytest.mark.each_layout

TASKS = Server(tasks=True)


def policy(grace: str) -> dict[str, Any]:
    return {"each": {"timeout": "3s", "grace": grace}}


@pytest.mark.smoke
def test_all_of_a_task_ends_in_its_grace(tmp_path: Path) -> None:
    """The executor process ends at SIGTERM, its child after it has tidied up."""
    said = tmp_path / "said"
    with managing(policy("60s"), server=TASKS) as manager:
        admission = begin(manager, "tidy_child", str(said))
        pid = admission.executor_pid
        began = time.monotonic()
        answer, outcome = end(admission)
        assert time.monotonic() - began < 60
        assert answer is None
        assert (outcome.ending, outcome.limit, outcome.needed_kill) == ("timeout", "each.timeout", False)
        assert outcome.detail == "tidy_child: wall time limit 3s reached; ended within the grace of 1m"
        assert isinstance(outcome.error(), TimeLimitExceeded)
        assert said.read_text() == "tidy"
        assert not alive(pid)
        assert ask(manager, "pid")[1].ending == "ok"
        assert soon(lambda: not admission._executor.leaf.exists())


def test_what_does_not_end_in_its_grace_is_killed() -> None:
    with managing(policy("1s"), server=TASKS) as manager:
        admission = begin(manager, "deaf_children", 2)
        children = [int(pid) for pid in admission.channel.receive().payload.strip(b"[]").split(b",")]
        began = time.monotonic()
        outcome = admission.finish()
        assert outcome.ending == "ok"
        assert soon(lambda: not any(map(alive, children)))
        # The same with children that outlive the executor process, at the time limit.
        outcome = ask(manager, "deaf_for_ever")[1]
        assert time.monotonic() - began < 60
        assert (outcome.ending, outcome.needed_kill) == ("timeout", True)
        assert outcome.detail == "deaf_for_ever: wall time limit 3s reached; killed after the grace of 1s"
        assert ask(manager, "pid")[1].ending == "ok"


@pytest.mark.once
def test_an_answer_in_the_grace_does_not_count() -> None:
    with managing(policy("60s"), server=TASKS) as manager:
        began = time.monotonic()
        answer, outcome = ask(manager, "answer_after_sigterm")
        assert time.monotonic() - began < 60
        assert answer == "late"
        assert (outcome.ending, outcome.needed_kill) == ("timeout", False)


@pytest.mark.once
def test_a_server_that_ends_does_not_wait_for_a_grace() -> None:
    with managing(policy("10m"), server=TASKS) as manager:
        admission = begin(manager, "deaf_for_ever")
        pid = admission.executor_pid
        time.sleep(4)
        began = time.monotonic()
    assert time.monotonic() - began < 60
    assert not alive(pid)
    assert admission.died().ending == "timeout"


@pytest.mark.once
def test_requests_have_no_grace() -> None:
    settings = from_mapping({"policy": {"p": policy("1s")}, "route": [{"policy": "p"}]})
    with pytest.raises(SettingsError, match="only tasks and commands have a grace") as caught:
        Manager(settings, server=Server())
    assert caught.value.key == "policy.p.each.grace"
