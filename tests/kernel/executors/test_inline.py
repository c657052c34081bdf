"""What `inline` enforces: threads of this process, in and out of cgroups. Each test has a process of its own."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from pathlib import Path

import pytest

from rcon_plugins import Manager, Policy, Server, Work, confine
from rcon_plugins.confinement.admission import InlineAdmission
from rcon_plugins.confinement.confinement import InlineConfinement
from rcon_plugins.errors import KernelError, SettingsError
from rcon_plugins.settings.file import from_mapping
from tests.children import in_child
from tests.kernel.cgroup.helpers import running
from tests.kernel.executors.test_thread import POLICY as THREAD
from tests.kernel.executors.test_thread import managed, run
from tests.kernel.quota import judge, quota_in_force, window
from tests.processes import instance_directories

pytestmark = pytest.mark.each_layout

ALONE = Server(threads=False)


def where() -> str:
    """The cgroups of the calling thread."""
    return Path("/proc/thread-self/cgroup").read_text()


def burn(seconds: float) -> float:
    """The share of a CPU that the calling thread gets, in percent."""
    wall, cpu = time.monotonic(), time.thread_time()
    while time.monotonic() < wall + seconds:
        pass
    return 100 * (time.thread_time() - cpu) / (time.monotonic() - wall)


def use(seconds: float) -> None:
    """CPU time, however long that takes."""
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass


@pytest.mark.smoke
def test_a_thread_is_inside_the_block_and_nowhere_else() -> None:
    def program() -> list[str]:
        seen = [where()]
        with confine(pids=50):
            inside = where()
            other: list[str] = []
            thread = threading.Thread(target=lambda: other.append(where()))
            thread.start()  # a thread that a confined one starts is confined
            thread.join()
            seen += [inside, *other]
        return [*seen, where()]

    before, inside, started_inside, after = in_child(program)
    assert "/confine~" in inside
    assert inside == started_inside
    assert before == after
    assert "rcon" not in after


def test_blocks_nest() -> None:
    def program() -> list[bool]:
        outer, inner = confine(pids=50), confine(pids=40)
        seen = []
        with outer:
            first = where()
            with inner:
                seen.append(where() != first)
            seen.append(where() == first)
            try:
                with inner:
                    raise KeyError("left by an error")
            except KeyError:
                seen.append(where() == first)
        return [*seen, "rcon" not in where()]

    assert in_child(program) == [True, True, True, True]


def test_a_thread_that_could_not_leave_is_moved_before_the_next_request() -> None:
    """Otherwise that would run in the cgroup of another policy, which could not be removed at the end."""

    def program() -> list[bool]:
        settings = {
            "policy": {"p": {"isolation": "inline", "pids": 50}},
            "route": [{"path": "/p", "policy": "p"}],
            "unmatched": "allow",
        }
        manager = Manager(from_mapping(settings), server=ALONE).start()
        home = where()
        admission = manager.admit(Work("call", "p", {"path": "/p"}))
        assert isinstance(admission, InlineAdmission)
        (confinement,) = manager._confinements.values()
        assert isinstance(confinement, InlineConfinement)
        assert confinement.executor is not None
        number = confinement.executor._home._files[0][0]
        kept = os.dup(number)
        with pytest.raises(KernelError, match="Bad file descriptor"):
            admission.call(os.close, number)
        admission.finish("error")
        os.dup2(kept, number)
        found = [where() != home]
        assert manager.admit(Work("call", "free", {"path": "/free"})) is None
        found.append(where() == home)
        manager.close()
        return [*found, not instance_directories(os.getpid())]

    assert in_child(program) == [True, True, True]


def test_a_kept_confinement_is_entered_by_many_threads_at_once() -> None:
    def program() -> set[bool]:
        limited = confine(pids=50).open()
        seen: list[bool] = []

        def work() -> None:
            for _ in range(200):
                with limited:
                    seen.append("/confine~" in where())
                seen.append("/confine~" not in where())

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        limited.close()
        return {len(seen) == 1600, *seen}

    assert in_child(program) == {True}


def test_the_kernel_has_the_quota() -> None:
    def program() -> tuple[float | None, float | None]:
        with confine(cpu="30%"):
            inside = quota_in_force()
        return inside, quota_in_force()

    assert in_child(program) == (0.3, None)


@pytest.mark.measures
def test_cpu_quotas_are_held_within_a_point() -> None:
    """Each in a process of its own: threads of one would stop each other while they hold the GIL.

    Beside them a thread executor with a quota, whose window is shorter: together they leave a CPU idle.
    """

    def program(quota: float) -> float:
        with confine(cpu=f"{quota:.0%}", cpu_weight=10000):
            return burn(window(0.5))

    def in_a_thread(quota: float) -> float:
        policy = {**THREAD, "cpu": f"{quota:.0%}", "cpu_weight": 10000}
        share: float = managed(policy, lambda manager: run(manager, burn, window(quota)))
        return share

    def measure() -> list[tuple[float, float]]:
        with contextlib.ExitStack() as stack:
            started = [
                (quota, stack.enter_context(running(None, program, quota))) for quota in (0.1, 0.2, 0.5)
            ]
            started.append((0.2, stack.enter_context(running(None, in_a_thread, 0.2))))
            return [(quota, child.result() / 100) for quota, child in started]

    judge(measure)


@pytest.mark.measures
def test_cpu_quota_above_one_cpu() -> None:
    """Two processes, since the GIL lets no two threads of one use 150 %."""

    def program() -> float:
        with confine(cpu="150%", cpu_weight=10000):
            reading, writing = os.pipe()
            for _ in range(2):
                if os.fork() == 0:
                    os.write(writing, f"{burn(window(1.5)):7.2f}".encode())
                    os._exit(0)
            for _ in range(2):
                os.wait()
            return float(os.read(reading, 7)) + float(os.read(reading, 7))

    judge(lambda: {1.5: in_child(program) / 100})


def test_policies_that_need_a_process_are_refused() -> None:
    with pytest.raises(SettingsError, match="process"):
        confine(memory="64M")
    with pytest.raises(SettingsError, match="per"):
        confine(Policy.make("p", per="host", cpu="10%"))
    with pytest.raises(SettingsError, match="one of them"):
        confine(Policy.make("p", cpu="10%"), cpu="10%")


def test_a_manager_confines_inline_requests_per_key() -> None:
    def program() -> tuple[list[bool], str, bool]:
        settings = from_mapping(
            {"policy": {"p": {"per": "host", "pids": 50}}, "route": [{"policy": "p"}], "confinements": 2}
        )
        manager = Manager(settings, server=ALONE).start()
        seen = []
        usage = 0.0
        for host in ("a", "b", "c", "d", "a"):
            admission = manager.admit(Work("request", "GET /", {"host": host}))
            assert isinstance(admission, InlineAdmission)
            with admission.entered():
                seen.append(f"/p~{host}\n" in where())
                use(0.02)
            with admission.entered():
                seen.append(f"/p~{host}\n" in where())
            outcome = admission.finish()
            usage += outcome.usage.cpu_seconds or 0
        ending = outcome.ending
        manager.close()
        return seen, ending, 0.1 <= usage < 0.5

    seen, ending, used = in_child(program)
    assert seen == [True] * 10
    assert ending == "ok"
    assert used


def test_a_cgroup_that_another_worker_removed_is_made_again() -> None:
    def program() -> bool:
        settings = from_mapping({"policy": {"p": {"pids": 50}}, "route": [{"policy": "p"}]})
        manager = Manager(settings, server=ALONE).start()
        first = manager.admit(Work("call", "first"))
        assert isinstance(first, InlineAdmission)
        with first.entered():
            pass
        first.finish()
        assert isinstance(first.host, InlineConfinement)
        executor = first.host.executor
        assert executor is not None
        executor.cgroup.delete()
        second = manager.admit(Work("call", "second"))
        assert isinstance(second, InlineAdmission)
        with second.entered():
            inside = "/host/p\n" in where()
        second.finish()
        manager.close()
        return inside

    assert in_child(program)


def test_a_cgroup_that_other_workers_keep_removing_is_made_again() -> None:
    """A worker whose least recently used cgroup it is may remove it again, between its making and the entry."""

    def program() -> list[bool]:
        settings = from_mapping({"policy": {"p": {"pids": 50}}, "route": [{"policy": "p"}]})
        manager = Manager(settings, server=ALONE).start()
        make = InlineConfinement._make_cgroup
        left = 3

        def make_and_lose(self: InlineConfinement) -> None:
            nonlocal left
            make(self)
            if left and self.executor is not None:
                left -= 1
                self.executor.cgroup.delete()

        setattr(InlineConfinement, "_make_cgroup", make_and_lose)  # noqa: B010 - in a fork of this process
        inside = []
        for _ in range(2):
            work = manager.admit(Work("call", "one"))
            assert isinstance(work, InlineAdmission)
            with work.entered():
                inside.append("/host/p\n" in where())
            work.finish()
        manager.close()
        return inside

    assert in_child(program) == [True, True]
