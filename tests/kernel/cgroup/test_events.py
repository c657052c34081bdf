"""Each kind of event really happens, on this hierarchy, and is told."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Literal

import pytest

from rcon_plugins.errors import ControllerUnavailable, KernelError
from rcon_plugins.kernel.cgroup import Cgroup, Hierarchy, Resources
from rcon_plugins.kernel.events import POLLED_SECONDS, Event, Pressure, Watcher
from tests.kernel.cgroup.helpers import MIB, eventually, layout, running, sleep_forever, touch

pytestmark = pytest.mark.each_layout


class Told:
    """What a watch told, in the order in which it did."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.gone = threading.Event()

    def __call__(self, event: Event) -> None:
        self.events.append(event)

    def of(self, kind: str) -> list[Event]:
        return [event for event in self.events if event.kind == kind]

    def wait_for(self, kind: str, seconds: float = 20.0) -> Event:
        eventually(lambda: self.of(kind), seconds)
        return self.of(kind)[0]


@pytest.fixture
def watcher() -> Iterator[Watcher]:
    with Watcher() as made:
        yield made
    assert not [thread for thread in threading.enumerate() if thread.name == "cgroup-events"]


@pytest.fixture
def told() -> Told:
    return Told()


def spin(seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pass


def hold(size: int) -> None:
    memory = bytearray(size)
    for at in range(0, size, 4096):
        memory[at] = 1
    sleep_forever()


def fork_until_refused() -> bool:
    children = []
    try:
        for _ in range(16):
            pid = os.fork()
            if pid == 0:
                signal.pause()
            children.append(pid)
    except BlockingIOError:
        return True
    finally:
        for pid in children:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    return False


@pytest.mark.smoke
def test_memory_limit_and_kill(group: Cgroup, watcher: Watcher, told: Told) -> None:
    leaf = group.child("leaf").create()
    leaf.configure(Resources(memory_max=32 * MIB, swap_max=0))
    with (
        watcher.add(leaf, told, kinds=("memory_limit", "oom_kill")),
        running(leaf, touch, 100 * MIB) as child,
    ):
        assert child.wait() == -signal.SIGKILL
        limit, kill = told.wait_for("memory_limit"), told.wait_for("oom_kill")
    assert (limit.cgroup, limit.limit) == (leaf.path, 32 * MIB)
    assert limit.count >= 1
    assert kill.count >= 1
    assert kill.total is not None
    assert kill.total >= 1
    assert {event.kind for event in told.events} == {"memory_limit", "oom_kill"}


def test_a_limit_hit_is_reported_by_the_cgroup_with_the_limit(
    group: Cgroup, watcher: Watcher, told: Told
) -> None:
    """Of two levels only the one whose limit was reached says so; the kill is told at both."""
    group.configure(Resources(memory_max=32 * MIB))
    leaf = group.child("leaf").create()
    leaf.configure(Resources(memory_max=256 * MIB))
    of_leaf = Told()
    kinds = ("memory_limit", "oom_kill")
    with watcher.add(group, told, kinds=kinds), watcher.add(leaf, of_leaf, kinds=kinds):
        with running(leaf, touch, 100 * MIB) as child:
            assert child.wait() == -signal.SIGKILL
        told.wait_for("memory_limit")
        told.wait_for("oom_kill")
        of_leaf.wait_for("oom_kill")
    assert not of_leaf.of("memory_limit")


@pytest.mark.layout("v2")
def test_memory_high(group: Cgroup, watcher: Watcher, told: Told) -> None:
    group.configure(Resources(memory_high=32 * MIB, memory_max=256 * MIB))
    with watcher.add(group, told, kinds=("memory_high",)), running(group, hold, 64 * MIB):
        event = told.wait_for("memory_high")
        assert event.limit == 32 * MIB
        assert event.usage is not None
        group.configure(Resources(memory_high=128 * MIB))


@pytest.mark.layout("v1", "hybrid")
def test_v1_has_no_memory_high(group: Cgroup, watcher: Watcher, told: Told) -> None:
    with pytest.raises(ControllerUnavailable, match="v1 has none"):
        watcher.add(group, told, kinds=("memory_high",))


def test_usage_thresholds(group: Cgroup, watcher: Watcher, told: Told) -> None:
    with (
        watcher.add(group, told, kinds=(), thresholds=(16 * MIB, 32 * MIB, 512 * MIB)),
        running(group, hold, 40 * MIB) as child,
    ):
        eventually(lambda: len(told.of("memory_usage")) == 2)
        assert [event.limit for event in told.events] == [16 * MIB, 32 * MIB]
        assert all((event.usage or 0) >= (event.limit or 0) for event in told.events)
        child.end_by_signal()
        # That it fell is seen when v2 is polled again, or not at all.
        eventually(lambda: (group.read().memory_current or 0) < 16 * MIB)
        time.sleep(4 * POLLED_SECONDS)
        with running(group, hold, 40 * MIB):
            eventually(lambda: [event.limit for event in told.events].count(32 * MIB) == 2)


def test_threshold_that_is_passed_already(group: Cgroup, watcher: Watcher, told: Told) -> None:
    with running(group, hold, 40 * MIB):
        eventually(lambda: (group.read().memory_current or 0) > 32 * MIB)
        with watcher.add(group, told, kinds=(), thresholds=(16 * MIB,)):
            told.wait_for("memory_usage")


def test_pids_limit(group: Cgroup, watcher: Watcher, told: Told) -> None:
    group.configure(Resources(pids_max=4))
    leaf = group.child("leaf").create()
    with watcher.add(group, told, kinds=("pids_limit",)), running(leaf, fork_until_refused) as child:
        assert child.result()
        assert told.wait_for("pids_limit").limit == 4


def test_cpu_throttled(group: Cgroup, watcher: Watcher, told: Told) -> None:
    group.configure(Resources(cpu_quota=0.1))
    with watcher.add(group, told, kinds=("cpu_throttled",)), running(group, spin, 1.0):
        event = told.wait_for("cpu_throttled")
        assert event.limit == pytest.approx(0.1)
        assert event.usage is not None
        assert event.usage > 0


@pytest.mark.parametrize("share", ["some", "full"])
def test_pressure(group: Cgroup, watcher: Watcher, told: Told, share: Literal["some", "full"]) -> None:
    pressure = Pressure("cpu", stall=0.1, window=2.0, share=share)
    group.configure(Resources(cpu_quota=0.1))
    with (
        watcher.add(group, told, kinds=(), pressure=(pressure,)),
        running(group, spin, 30.0),
        running(group, spin, 30.0),
    ):
        event = told.wait_for("pressure")
        assert (event.resource, event.share, event.limit) == ("cpu", share, 0.1)
        assert event.usage is not None


@pytest.mark.parametrize("resource", ["cpu", "memory", "io"])
def test_pressure_of_each_resource_can_be_asked_for(
    group: Cgroup, watcher: Watcher, told: Told, resource: Literal["cpu", "memory", "io"]
) -> None:
    watcher.add(group, told, pressure=(Pressure(resource),)).close()


def test_window_of_pressure_without_privilege(
    group: Cgroup, told: Told, in_child: Callable[..., object]
) -> None:
    def without() -> str:
        from rcon_plugins.kernel import capability

        state = capability.read_state()
        less = state.effective - capability.Capabilities.of(capability.CAP_SYS_RESOURCE)
        capability.set_capabilities(state.permitted, less, state.inheritable)
        with Watcher() as watcher, pytest.raises(KernelError) as refused:
            watcher.add(group, told, pressure=(Pressure("cpu", stall=0.1, window=1.0),))
        return str(refused.value)

    assert "CAP_SYS_RESOURCE (choose a multiple of 2 s" in str(in_child(without))


@pytest.mark.layout("hybrid")
def test_v1_alone_measures_no_pressure(hierarchy: Hierarchy, watcher: Watcher, told: Told) -> None:
    with v1_alone(hierarchy) as group, pytest.raises(ControllerUnavailable, match="cannot report pressure"):
        watcher.add(group, told, pressure=(Pressure("memory"),))


def test_empty(group: Cgroup, watcher: Watcher, told: Told) -> None:
    leaf = group.child("leaf").create()
    with watcher.add(group, told, kinds=("empty",)):
        with running(leaf, time.sleep, 60):
            time.sleep(0.5)
            assert not told.events
        told.wait_for("empty")
        with running(leaf, time.sleep, 60):
            time.sleep(0.5)
        eventually(lambda: len(told.of("empty")) >= 2)


@pytest.mark.layout("hybrid")
def test_empty_on_v1_alone(hierarchy: Hierarchy, watcher: Watcher, told: Told) -> None:
    with v1_alone(hierarchy) as group, watcher.add(group, told, kinds=("empty",)):
        with running(group, time.sleep, 60):
            time.sleep(1.0)
            assert not told.events
        told.wait_for("empty")


@contextlib.contextmanager
def v1_alone(hierarchy: Hierarchy) -> Iterator[Cgroup]:
    alone = Hierarchy.of([mount for mount in hierarchy.mounts if mount.version == 1])
    group = alone.cgroup(f"/rcon-tests-{os.getpid()}").create()
    try:
        yield group
    finally:
        group.kill()
        group.delete()


def test_without_kinds_all_available_events_are_reported(group: Cgroup, watcher: Watcher, told: Told) -> None:
    """Without kinds, what this hierarchy lacks is left out."""
    group.configure(Resources(memory_max=32 * MIB, pids_max=4))
    with watcher.add(group, told):
        with running(group, fork_until_refused) as child:
            assert child.result()
        with running(group, touch, 100 * MIB) as child:
            child.wait()
        for kind in ("pids_limit", "memory_limit", "oom_kill", "empty"):
            told.wait_for(kind)
    assert layout() == "v2" or not told.of("memory_high")


def test_cgroup_without_controllers(
    hierarchy: Hierarchy, group: Cgroup, watcher: Watcher, told: Told
) -> None:
    bare = hierarchy.cgroup(group.child("bare").path, controllers=frozenset({"cpu"})).create()
    kinds = ("memory_limit", "pids_limit")
    for kind in kinds:
        with pytest.raises(ControllerUnavailable, match=f"cannot report {kind}"):
            watcher.add(bare, told, kinds=(kind,))
    with pytest.raises(ControllerUnavailable, match="cannot report memory_usage"):
        watcher.add(bare, told, thresholds=(MIB,))
    watcher.add(bare, told).close()


def test_invalid_arguments_are_refused(group: Cgroup, watcher: Watcher, told: Told) -> None:
    with pytest.raises(ValueError, match="unknown kind of event: earthquake"):
        watcher.add(group, told, kinds=("earthquake",))
    with pytest.raises(ValueError, match="more than 0"):
        watcher.add(group, told, thresholds=(0,))
    with pytest.raises(KernelError, match="there is no") as missing:
        watcher.add(group.child("missing"), told)
    assert missing.value.hint == "create() it first"
