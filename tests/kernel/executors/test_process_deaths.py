"""kill -9 of each process there is, and what cannot be confined: nothing hangs, runs unconfined or is left over."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest

from rcon_plugins import Manager, hookimpl
from rcon_plugins.errors import ConcurrencyLimitExceeded, ConfinementError, Killed
from rcon_plugins.kernel.cgroup import Hierarchy
from rcon_plugins.settings.file import from_mapping
from rcon_plugins.tree.instance import Instance
from tests.children import in_child
from tests.kernel.executors.service import ask, begin, end, managing, serve, soon
from tests.processes import alive


@pytest.mark.smoke
@pytest.mark.each_layout
def test_kill_9_of_an_executor_at_work() -> None:
    with managing({"each": {"timeout": "60s"}}) as manager:
        admission = begin(manager, "sleep", 300)
        os.kill(admission.executor_pid, signal.SIGKILL)
        outcome = end(admission)[1]
        assert (outcome.ending, outcome.signal) == ("killed", signal.SIGKILL)
        error = outcome.error()
        assert isinstance(error, Killed)
        assert error.signal == signal.SIGKILL
        assert ask(manager, "pid")[1].ending == "ok"


def test_kill_9_of_a_waiting_executor() -> None:
    with managing({"each": {"timeout": "60s"}}) as manager:
        pid = ask(manager, "pid")[0]
        os.kill(pid, signal.SIGKILL)
        assert soon(lambda: not alive(pid))
        time.sleep(0.2)
        assert ask(manager, "pid")[1].ending == "ok"


def test_an_executor_that_exits_in_mid_work() -> None:
    with managing({"each": {"timeout": "60s"}}) as manager:
        outcome = ask(manager, "end", 3)[1]
        assert (outcome.ending, outcome.signal) == ("killed", None)
        assert "exited with status 3" in outcome.detail


def test_a_limit_of_cpu_time_is_named() -> None:
    """At the hard limit, which is the soft one, the kernel sends SIGKILL: setrlimit(2)."""
    with managing({"rlimits": {"cpu": "1s"}}) as manager:
        outcome = ask(manager, "burn", 30)[1]
        assert (outcome.ending, outcome.limit, outcome.signal) == ("killed", "rlimits.cpu", signal.SIGKILL)
        assert "CPU time limit 1s of a process reached (rlimits.cpu" in outcome.detail
        assert isinstance(outcome.error(), Killed)


@pytest.mark.each_layout
def test_kill_9_of_the_fork_server() -> None:
    lost = threading.Event()
    with managing({"each": {"timeout": "60s"}}, on_lost=lost.set) as manager:
        admission = begin(manager, "sleep", 300)
        assert manager.fork_server_pid is not None
        os.kill(manager.fork_server_pid, signal.SIGKILL)
        assert end(admission)[1].ending == "killed"
        assert soon(lambda: not alive(admission.executor_pid))
        assert lost.wait(10)
        with pytest.raises(ConfinementError, match="fork server"):
            ask(manager, "pid")


@pytest.mark.each_layout
def test_kill_9_of_the_host_leaves_no_process_and_the_next_start_no_cgroup() -> None:
    reading, writing = os.pipe()

    def host() -> None:
        with managing({"each": {"timeout": "60s"}}) as manager:
            sleepers_in = begin(manager, "sleep", 300)
            os.write(writing, f"{sleepers_in.executor_pid} {manager.fork_server_pid}".encode())
            os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(Exception, match="killed by signal 9"):
        in_child(host)
    pids = [int(pid) for pid in os.read(reading, 100).split()]
    os.close(reading)
    os.close(writing)
    assert len(pids) == 2
    assert soon(lambda: not any(alive(pid) for pid in pids))
    in_child(_start_and_stop)  # removes what is left; the check after the run would find it


def _start_and_stop() -> None:
    Instance.create(Hierarchy.discover()).close()


def test_the_next_worker_removes_what_a_worker_killed_with_its_fork_server_left() -> None:
    def server() -> tuple[list[str], list[str]]:
        settings = {"policy": {"p": {"isolation": "process"}}, "route": [{"policy": "p"}]}
        deployment = Manager(from_mapping(settings)).deploy()
        try:
            reading, writing = os.pipe()
            worker = os.fork()
            if worker == 0:
                manager = deployment.start(serve)
                begin(manager, "sleep", 300)
                os.write(writing, str(manager.fork_server_pid).encode())
                time.sleep(300)
            fork_server = int(os.read(reading, 100))
            os.kill(fork_server, signal.SIGSTOP)  # or it would remove the cgroup
            os.kill(worker, signal.SIGKILL)
            os.waitpid(worker, 0)
            os.kill(fork_server, signal.SIGKILL)
            left = [leaf.path for leaf in deployment.instance._leaves()]
            deployment.start(serve).close()
            return left, [leaf.path for leaf in deployment.instance._leaves()]
        finally:
            deployment.close()

    left, later = in_child(server)
    assert len(left) == 1
    assert later == []


def test_concurrency_holds_in_all_workers_of_a_server_together() -> None:
    def server() -> tuple[str, str, str]:
        settings = {"policy": {"p": {"concurrency": 2, "isolation": "process"}}, "route": [{"policy": "p"}]}
        deployment = Manager(from_mapping(settings)).deploy()
        try:
            until_killed, _ = os.pipe()
            ready_reading, ready_writing = os.pipe()
            worker = os.fork()
            if worker == 0:
                try:
                    held = begin(deployment.start(serve), "sleep", 300)
                    os.write(ready_writing, b"x")
                    os.read(until_killed, 1)
                    held.abort("let go")
                finally:
                    os._exit(1)
            os.close(ready_writing)
            assert os.read(ready_reading, 1) == b"x"
            manager = deployment.start(serve)
            try:
                mine = begin(manager, "sleep", 300)
                try:
                    begin(manager, "pid")
                    third = "admitted"
                except ConcurrencyLimitExceeded as error:
                    third = f"{error.limit} {error.retry_after}"
                mine.abort("over")
                fourth = ask(manager, "pid")[1].ending
                os.kill(worker, signal.SIGKILL)  # its slot comes back however it ends
                os.waitpid(worker, 0)
                both = [begin(manager, "sleep", 300) for _ in range(2)]
                fifth = f"{len(both)} held"
                for admission in both:
                    admission.abort("over")
            finally:
                manager.close()
            deployment.instance.sweep(f"{worker}-")
            return third, fourth, fifth
        finally:
            deployment.close()

    assert in_child(server) == ("concurrency 1", "ok", "2 held")


@pytest.mark.once
@pytest.mark.each_layout
def test_every_executor_process_at_work() -> None:
    with managing({"per": "host", "each": {"timeout": "60s"}}, settings={"processes": 2}) as manager:
        held = [begin(manager, "sleep", 300, host=host) for host in ("a", "b")]
        with pytest.raises(ConcurrencyLimitExceeded, match="processes"):
            begin(manager, "pid", host="c")
        held[0].abort("over")
        assert soon(lambda: not alive(held[0].executor_pid))
        assert soon(lambda: _served(manager, "c"))
        held[1].abort("over")


def _served(manager: object, host: str) -> bool:
    try:
        return ask(manager, "pid", host=host)[1].ending == "ok"  # type: ignore[arg-type]
    except ConcurrencyLimitExceeded:
        return False


@pytest.mark.each_layout
def test_confinements_are_kept_up_to_their_bound() -> None:
    with managing({"per": "host", "each": {"timeout": "60s"}}, settings={"confinements": 2}) as manager:
        admission = begin(manager, "pid", host="first")
        work = admission.group
        end(admission)
        for number in range(6):
            assert ask(manager, "pid", host=f"host-{number}")[1].ending == "ok"
        assert soon(lambda: not work.exists())
        assert ask(manager, "pid", host="first")[1].ending == "ok"
        assert work.exists()


@pytest.mark.parametrize(
    "key",
    ["../../x", "..", ".", "", "a\0b", "x" * 300, "ünï.example", "a\nb", "/", "tasks", "~", "\udcff", "a/b"],
)
def test_no_key_names_a_cgroup_outside(key: str) -> None:
    with managing({"per": "host", "each": {"timeout": "60s"}}) as manager:
        admission = begin(manager, "pid", host=key)
        cgroup = admission.group
        assert cgroup.name.startswith("p~")
        assert "/" not in cgroup.name
        assert len(cgroup.name) < 200
        assert cgroup.path.count("/work/p~") == 1
        assert end(admission)[1].ending == "ok"
        assert admission.key == key


def test_a_process_whose_privileges_cannot_be_dropped_runs_nothing(tmp_path: Path) -> None:
    class Stubborn:
        @hookimpl
        def rcon_drop(self, target: str) -> None:
            if stubborn.exists():
                raise PermissionError(f"not in this {target}")

    stubborn = tmp_path / "stubborn"
    with managing({"each": {"timeout": "60s"}}, plugins=[Stubborn()]) as manager:
        stubborn.touch()
        for _ in range(2):
            with pytest.raises(ConfinementError, match="PermissionError: not in this process"):
                ask(manager, "pid")
    with (
        pytest.raises(ConfinementError, match="no executor process can serve: PermissionError"),
        managing({"each": {"timeout": "60s"}}, plugins=[Stubborn()]),
    ):
        pass


def test_a_manager_is_of_no_use_in_a_fork() -> None:
    with managing({"each": {"timeout": "60s"}}) as manager:

        def fork() -> str:
            with pytest.raises(ConfinementError, match="this is its fork"):
                ask(manager, "pid")
            manager.close()  # does nothing
            return "refused"

        assert in_child(fork) == "refused"
        assert ask(manager, "pid")[1].ending == "ok"
