"""Processes that serve one work each are made while the one before is at work."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from rcon_plugins import RunningManager
from rcon_plugins.confinement.admission import ProcessAdmission
from rcon_plugins.executors import pool
from tests.kernel.executors.service import ask, begin, end, managing, soon
from tests.processes import alive

FRESH: dict[str, Any] = {"max_uses": 1, "each": {"memory": "256M", "timeout": "5m"}}
PATIENCE = 60.0


def others(manager: RunningManager, admission: ProcessAdmission) -> list[int]:
    """The processes of a confinement but the one that serves this work."""
    found = admission.group.processes(subtree=True)
    return [pid for pid in found if pid != admission.executor_pid]


def supervisor_has_done_its_jobs(manager: RunningManager) -> bool:
    done = threading.Event()
    manager._pool.processes.submit(done.set)
    return done.wait(PATIENCE)


@pytest.mark.smoke
def test_a_spare_waits_before_the_request_ends_and_serves_the_next() -> None:
    with managing(FRESH) as manager:
        first = begin(manager, "sleep", 0.1)
        assert soon(lambda: len(others(manager, first)) == 1, PATIENCE)
        successor = others(manager, first)[0]
        assert end(first)[1].ending == "ok"
        assert soon(lambda: not alive(first.executor_pid), PATIENCE)
        assert ask(manager, "pid")[0] == successor
        assert soon(lambda: not alive(successor), PATIENCE)


def test_a_spare_waits_before_the_last_use_of_an_executor_ends() -> None:
    with managing({**FRESH, "max_uses": 3}) as manager:
        pids = [ask(manager, "pid")[0] for _ in range(2)]
        assert supervisor_has_done_its_jobs(manager)
        last = begin(manager, "sleep", 0.1)
        assert soon(lambda: len(others(manager, last)) == 1, PATIENCE)
        successor = others(manager, last)[0]
        assert [last.executor_pid, end(last)[1].ending] == [pids[0], "ok"]
        assert pids[0] == pids[1]
        assert ask(manager, "pid")[0] == successor


@pytest.mark.parametrize("together", [{"pids": 8}, {"memory": "512M"}, {"rlimits": {"nproc": 100}}])
def test_spares_leave_pids_and_memory_to_the_running_request(together: dict[str, Any]) -> None:
    with managing({**FRESH, **together}) as manager:
        first = begin(manager, "sleep", 0.1)
        assert supervisor_has_done_its_jobs(manager)
        assert others(manager, first) == []
        end(first)
        assert ask(manager, "pid")[1].ending == "ok"


def test_a_spare_does_not_count_as_a_request() -> None:
    """It takes no slot of those that may be under way, and no process from a work that needs one."""
    with managing({**FRESH, "concurrency": 2}, settings={"processes": 2}) as manager:
        first = begin(manager, "sleep", 0.1)
        assert soon(lambda: len(others(manager, first)) == 1, PATIENCE)
        second = begin(manager, "sleep", 0.1)
        assert supervisor_has_done_its_jobs(manager)
        assert others(manager, first) == [second.executor_pid]
        assert [end(one)[1].ending for one in (first, second)] == ["ok", "ok"]


@pytest.mark.each_layout
def test_a_spare_is_ended_for_another_confinement() -> None:
    with managing({**FRESH, "per": "host"}, settings={"processes": 2}) as manager:
        first = begin(manager, "sleep", 0.1, host="a")
        assert soon(lambda: len(others(manager, first)) == 1, PATIENCE)
        second = begin(manager, "sleep", 0.1, host="b")
        assert soon(lambda: others(manager, first) == [], PATIENCE)
        assert [end(one)[1].ending for one in (first, second)] == ["ok", "ok"]


def test_after_many_requests_all_spares_but_one_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "IDLE_SECONDS", 0.5)
    with managing(FRESH) as manager:
        pids = [ask(manager, "pid")[0] for _ in range(20)]
        assert len(set(pids)) == 20
        work = manager.instance.policy_cgroup(next(iter(manager._confinements)))
        assert soon(lambda: len(work.processes(subtree=True)) == len(work.children()) == 1, PATIENCE)
        assert supervisor_has_done_its_jobs(manager)
        assert manager._pool.processes.count_usable() == 1
