"""CPU quotas hold within one percentage point, above 50 % within five per cent of the limit."""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from rcon_plugins.kernel.cgroup import Cgroup, Hierarchy, Resources
from rcon_plugins.tree.instance import Instance
from tests.kernel.cgroup.helpers import running
from tests.kernel.quota import judge, window

pytestmark = pytest.mark.timeout(300)

QUOTAS = (0.1, 0.2, 0.5)
#: Hashing lets go of the GIL; so long that threads do not spend their time on taking it back.
BLOCK = bytes(1 << 20)


def burn(seconds: float, cpu_time: Callable[[], float]) -> float:
    """Hash for that long; CPUs used, by the clock of the caller's own making."""
    begin, used = time.monotonic(), cpu_time()
    while (now := time.monotonic()) < begin + seconds:
        hashlib.sha256(BLOCK).digest()
    return (cpu_time() - used) / (now - begin)


def burn_and_count(seconds: float) -> tuple[float, float]:
    """Hash for that long. Return the CPUs used meanwhile, and the CPU seconds of this process since it was forked."""
    return burn(seconds, time.process_time), time.process_time()


def in_processes(group: Cgroup, quotas: tuple[float, ...], processes: int) -> dict[float, float]:
    seconds = window(*quotas)
    cgroups = {quota: group.child(f"{quota:g}").create() for quota in quotas}
    for quota, cgroup in cgroups.items():
        cgroup.configure(Resources(cpu_quota=quota))
    with contextlib.ExitStack() as stack:
        started = {
            quota: [stack.enter_context(running(cgroup, burn_and_count, seconds)) for _ in range(processes)]
            for quota, cgroup in cgroups.items()
        }
        results = {quota: [child.result() for child in some] for quota, some in started.items()}
    for quota, cgroup in cgroups.items():
        # The kernel's own account agrees with what the processes saw, the time before they measured included.
        total = sum(seconds for _, seconds in results[quota])
        assert cgroup.read().cpu_seconds == pytest.approx(total, rel=0.1)
        cgroup.delete()
    return {quota: sum(used for used, _ in some) for quota, some in results.items()}


def in_threads(base: str, quota: float, threads: int, seconds: float) -> float:
    """As ``inline`` does it: threads of this process enter, work and leave. The CPUs they used."""
    instance = Instance.create(Hierarchy.discover(), base=base)
    try:
        instance.adopt()
        cgroup = instance.threaded("quota").create()
        cgroup.configure(Resources(cpu_quota=quota))
        used: list[float] = []

        def run() -> None:
            entrance.enter()
            try:
                used.append(burn(seconds, time.thread_time))
            finally:
                home.enter()

        with cgroup.entrance() as entrance, instance.exit() as home:
            workers = [threading.Thread(target=run) for _ in range(threads)]
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join()
        assert cgroup.threads() == []
        assert cgroup.read().cpu_seconds == pytest.approx(sum(used) * seconds, rel=0.1)
        assert cgroup.delete()
        return sum(used)
    finally:
        assert instance.close()


def in_threads_of_processes(group: Cgroup, quotas: tuple[float, ...], threads: int) -> dict[float, float]:
    """Each quota in a process of its own: threads of one would stop each other while they hold the GIL."""
    with contextlib.ExitStack() as stack:
        started = {
            quota: stack.enter_context(running(None, in_threads, group.path, quota, threads, window(*quotas)))
            for quota in quotas
        }
        return {quota: child.result() for quota, child in started.items()}


@pytest.fixture
def group(group: Cgroup) -> Cgroup:
    """First in the queue for a CPU, whatever else this machine does: what is measured is the limit."""
    group.configure(Resources(cpu_weight=10_000))
    return group


@pytest.mark.measures(each_layout=True)
def test_processes(group: Cgroup) -> None:
    judge(lambda: in_processes(group, QUOTAS, 1))


@pytest.mark.measures(each_layout=True)
def test_threads(group: Cgroup) -> None:
    judge(lambda: in_threads_of_processes(group, QUOTAS, 1))


@pytest.mark.measures
@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="one and a half CPUs need two")
def test_processes_on_more_than_one_cpu(group: Cgroup) -> None:
    judge(lambda: in_processes(group, (1.5,), 2))


@pytest.mark.measures
@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="one and a half CPUs need two")
def test_threads_on_more_than_one_cpu(group: Cgroup) -> None:
    judge(lambda: in_threads_of_processes(group, (1.5,), 2))


def burn_cpu(seconds: float) -> None:
    """Use this much CPU time."""
    end = time.process_time() + seconds
    while time.process_time() < end:
        hashlib.sha256(BLOCK).digest()


def test_an_idle_group_saves_up_its_burst(group: Cgroup) -> None:
    """The kernel counts the periods in which a group used more than its quota (cpu.stat, nr_bursts)."""
    busy = group.child("busy").create()
    busy.configure(Resources(cpu_quota=0.2, cpu_burst=0.02))

    def alternate() -> int:
        for _ in range(40):
            time.sleep(0.25)
            burn_cpu(0.035)
            if bursts := bursts_of(busy):
                return bursts
        return 0

    with running(busy, alternate) as child:
        assert child.result() > 0


def bursts_of(group: Cgroup) -> int:
    texts = (Path(directory, "cpu.stat") for directory in group.directories)
    stat = next(text for path in texts if path.exists() and "nr_bursts" in (text := path.read_text()))
    return int(dict(line.split() for line in stat.splitlines())["nr_bursts"])
