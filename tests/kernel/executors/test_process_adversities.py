"""What hostile work, slow deaths and failing plugins must not bring about: hangs, leaks, limits undone."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from rcon_plugins import Manager, RunningManager, Settings, hookimpl
from rcon_plugins.confinement.confinement import Confinement
from rcon_plugins.errors import ConcurrencyLimitExceeded, ConfinementError, LimitExceeded
from rcon_plugins.executors import pool, process
from rcon_plugins.kernel.cgroup import MAX, Hierarchy, Resources
from rcon_plugins.settings.file import from_mapping
from tests.kernel.executors.service import ask, begin, end, managing, serve, soon, take_out_of_its_cgroups
from tests.processes import alive


@pytest.mark.smoke
@pytest.mark.each_layout
def test_a_closed_way_into_a_cgroup_is_an_error_and_no_way_past_it() -> None:
    cgroup = Hierarchy.discover().cgroup(f"/rcon-closed-{os.getpid()}").create()
    try:
        entrance = cgroup.entrance()
        entrance.close()
        with pytest.raises(OSError, match="closed"):
            entrance.enter()
    finally:
        cgroup.delete()


def an_idle_executor(manager: RunningManager, **attributes: str) -> int:
    """The pid of an executor that has served and waits. On a loaded machine several may run into their deadline."""
    while True:
        admission = begin(manager, "pid", **attributes)
        if end(admission)[1].ending == "ok" and admission.executor_pid:
            return admission.executor_pid


@pytest.mark.each_layout
def test_work_that_leaves_its_cgroup_still_has_its_deadline() -> None:
    """The executor is moved while it waits, so its deadline begins after the move."""
    with managing({"each": {"timeout": "1s"}}) as manager:
        pid = an_idle_executor(manager)
        take_out_of_its_cgroups(pid)
        admission = begin(manager, "sleep", 300)
        assert admission.executor_pid == pid
        assert end(admission)[1].ending == "timeout"
        assert soon(lambda: not alive(pid))
        assert soon(lambda: ask(manager, "pid")[1].ending == "ok")


def test_a_fork_server_that_does_not_answer_hangs_no_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "READY_SECONDS", 0.5)
    with managing({"concurrency": 1, "each": {"timeout": "30s"}}) as manager:
        assert manager.fork_server_pid is not None
        os.kill(manager.fork_server_pid, signal.SIGSTOP)
        try:
            for _ in range(2):
                with pytest.raises(ConfinementError, match=r"not ready within 0\.5 s"):
                    begin(manager, "pid")
        finally:
            os.kill(manager.fork_server_pid, signal.SIGCONT)
            monkeypatch.undo()  # half a second is short for an emulated machine
        assert ask(manager, "pid")[1].ending == "ok"


def test_a_process_that_goes_on_after_its_answer_serves_no_other(tmp_path: Path) -> None:
    with managing({"each": {"timeout": "60s"}}) as manager:
        first, outcome = ask(manager, "go_on", str(tmp_path / "never"))
        assert outcome.ending == "ok"
        other, outcome = ask(manager, "pid")
        assert (outcome.ending, other != first) == ("ok", True)
        assert soon(lambda: not alive(first), 60)  # it uses the machine for nobody
        assert alive(other)


def test_a_process_that_comes_back_late_serves_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(pool, "LATE_SECONDS", 600.0)
    gate = tmp_path / "gate"
    with managing({"concurrency": 2, "each": {"timeout": "60s"}}) as manager:
        first, _ = ask(manager, "go_on", str(gate))
        other, _ = ask(manager, "pid")
        assert other != first
        gate.touch()
        held = begin(manager, "pid")  # by whichever
        assert soon(lambda: {ask(manager, "pid")[0], held.executor_pid} == {first, other}, 60)
        end(held)
        assert alive(first)


@pytest.mark.each_layout
def test_an_executor_that_dies_slowly_delays_no_other_deadline() -> None:
    slow = {"pids": 400, "each": {"timeout": "6s"}}
    settings = {
        "policy": {"slow": slow, "p": {"each": {"timeout": "7s"}}},
        "route": [{"host": "slow", "policy": "slow"}, {"policy": "p"}],
    }
    with managing({}, settings=settings) as manager:
        for host in ("slow", "p"):
            an_idle_executor(manager, host=host)
        first = begin(manager, "many", 150, host="slow")
        soon(lambda: len(first.group.processes(subtree=True)) > 150, 3)  # with fewer it would die sooner
        # Now it dies slowly. To start under this quota takes an emulated machine longer than the host waits.
        first.group.configure(Resources(cpu_quota=0.05))
        second = begin(manager, "sleep", 300)
        assert end(second)[1].ending == "timeout"
        assert second.executor_pid
        assert end(first)[1].ending == "timeout"
        first.group.configure(Resources(cpu_quota=MAX))  # the server does not wait for long when it closes


def test_a_deadline_concludes_the_work_whatever_its_thread_waits_for() -> None:
    with managing({"concurrency": 1, "each": {"timeout": "2s"}}) as manager:
        admission = begin(manager, "sleep", 300)
        woken = threading.Event()
        admission.on_deadline = woken.set
        assert admission.outcome is None  # the deadline is still to come
        assert woken.wait(10)  # nobody has asked the admission anything
        assert soon(lambda: _admitted(manager))  # and its slot is free
        assert admission.died().ending == "timeout"
        assert admission.finish().ending == "timeout"


def _admitted(manager: Any) -> bool:
    try:
        return ask(manager, "pid")[1].ending == "ok"
    except ConcurrencyLimitExceeded:
        return False


def test_a_fresh_process_for_each_work_serves_many_threads() -> None:
    seen: Counter[str] = Counter()
    with managing({"max_uses": 1, "each": {"timeout": "30s"}}, settings={"processes": 16}) as manager:

        def client() -> None:
            for _ in range(5):
                try:
                    seen[ask(manager, "pid")[1].ending] += 1
                except LimitExceeded as error:
                    seen[error.limit] += 1

        threads = [threading.Thread(target=client) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert seen == {"ok": 40}


def test_no_two_requests_take_the_last_process() -> None:
    inside: list[int] = []
    refused: set[str] = set()
    with managing({"isolation": "process", "pids": 4, "each": {"timeout": "30s"}}) as manager:
        admission = begin(manager, "pid")
        cgroup = admission.group
        end(admission)
        over = threading.Event()

        def watch() -> None:
            while not over.wait(0.001):
                inside.append(cgroup.read().pids_current or 0)

        def client() -> None:
            for _ in range(3):
                try:
                    ask(manager, "sleep", 0.05)
                except LimitExceeded as error:
                    refused.add(error.limit)

        threads = [threading.Thread(target=watch), *(threading.Thread(target=client) for _ in range(16))]
        for thread in threads:
            thread.start()
        for thread in threads[1:]:
            thread.join()
        over.set()
        threads[0].join()
    assert 2 <= max(inside) <= 4
    assert refused == {"pids"}


def test_a_frame_of_an_earlier_request_does_not_answer_a_later_one() -> None:
    with managing({"each": {"timeout": "30s"}}) as manager:
        assert ask(manager, "speak_later", 0.1)[1].ending == "ok"
        time.sleep(0.5)
        assert isinstance(ask(manager, "pid")[0], int)


def test_deadlines_of_requests_that_are_over_are_not_kept() -> None:
    with managing({"each": {"timeout": "1h"}}) as manager:
        for _ in range(200):
            ask(manager, "pid")
        assert manager._pool is not None
        supervisor = manager._pool.processes._supervisor
        assert supervisor is not None
        assert len(supervisor._deadlines) < 10


@pytest.mark.parametrize("hook", ["rcon_select_policy", "rcon_resources", "rcon_work_started"])
@pytest.mark.parametrize("policy", [{"pids": 50}, {"each": {"timeout": "30s"}}], ids=["inline", "process"])
def test_a_failing_plugin_refuses_the_request_and_leaks_nothing(hook: str, policy: dict[str, Any]) -> None:
    broken = False

    def fail(self: object) -> None:
        if broken:
            raise ValueError("out of order")

    plugin = type("Broken", (), {hook: hookimpl(fail)})()
    with managing({"concurrency": 1, "per": "host", **policy}, plugins=[plugin]) as manager:
        instance = manager.instance
        assert instance is not None
        broken = True
        files = set(Path("/proc/self/fd").iterdir())
        for number in range(3):
            with pytest.raises(ConfinementError, match="out of order"):
                begin(manager, "pid", host=f"h{number}")
        if hook != "rcon_work_started":  # there a confinement was made, and is kept
            assert set(Path("/proc/self/fd").iterdir()) == files
        leaves = [leaf for name in instance.work.children() for leaf in instance.work.child(name).children()]
        assert hook == "rcon_work_started" or leaves == []
        broken = False


def test_executors_hold_no_means_of_waking_the_server() -> None:
    import select

    epoll, pipe = select.epoll(), os.pipe()
    file = os.open(Path(__file__), os.O_RDONLY)
    try:
        with managing({"each": {"timeout": "30s"}}) as manager:
            held = ask(manager, "descriptors")[0]
            mine = {number: target for number, target in held.items() if int(number) > 2}
            assert not [
                target for target in mine.values() if target.startswith(("anon_inode", "pipe:", "/memfd:"))
            ]
            assert (
                str(Path(__file__)) in mine.values()
            )  # what the application opened when it was loaded stays
    finally:
        epoll.close()
        for descriptor in (*pipe, file):
            os.close(descriptor)


@pytest.mark.each_layout
def test_a_changed_policy_has_a_new_cgroup_and_the_same_slots() -> None:
    def settings(memory: str) -> Settings:
        return from_mapping(
            {"policy": {"p": {"concurrency": 1, "memory": memory}}, "route": [{"policy": "p"}]}
        )

    deployment = Manager(settings("64M")).deploy()
    with contextlib.closing(deployment), contextlib.closing(deployment.start(serve)) as before:
        first = begin(before, "sleep", 300)
        deployment.reload(Manager(settings("32M"), hierarchy=deployment.instance.hierarchy))
        with contextlib.closing(deployment.start(serve)) as after:
            second = begin(after, "pid")
            assert (first.host.name, second.host.name) == ("p", "p.1")
            assert isinstance(first.host, Confinement)
            assert isinstance(second.host, Confinement)
            assert first.host.first_slot == second.host.first_slot
            assert first.group.path != second.group.path
            end(second)
        first.abort("over")
