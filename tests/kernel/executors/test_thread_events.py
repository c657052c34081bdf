"""Events of work that runs in threads of the server, `inline` and `thread`. Each test has a process of its own."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rcon_plugins import Limits, Manager, RunningManager, Server, Work
from rcon_plugins.confinement.admission import InlineAdmission, ThreadAdmission
from rcon_plugins.kernel.capability import CAP_SYS_RESOURCE, Capabilities, read_state, set_capabilities
from rcon_plugins.kernel.cgroup import read_limits
from rcon_plugins.kernel.events import watcher_of_process
from rcon_plugins.settings.file import from_mapping
from tests.children import in_child
from tests.kernel.cgroup.helpers import eventually
from tests.kernel.executors.service import ask, managing
from tests.listener import Listener

pytestmark = pytest.mark.each_layout

PATIENCE = 60.0
ISOLATIONS = ("inline", "thread")


def managed(
    isolation: str,
    policy: dict[str, Any],
    program: Callable[[RunningManager], Any],
    *plugins: object,
    **settings: Any,
) -> Any:
    """Run ``program`` with a started manager, in a process of its own; nothing may be watched or open afterwards."""

    def run() -> Any:
        before = descriptors()
        table = {"p": {"isolation": isolation, "per": "host", **policy}}
        manager = Manager(
            from_mapping({"policy": table, "route": [{"policy": "p"}], **settings}),
            server=Server(threads=False),
            plugins=plugins,
        ).start()
        try:
            return program(manager)
        finally:
            manager.close()
            assert watches() == 0
            eventually(lambda: "cgroup-events" not in [thread.name for thread in threading.enumerate()])
            eventually(lambda: descriptors() == before)

    return in_child(run, timeout=4 * PATIENCE)


def descriptors() -> dict[str, str]:
    """What is open, by number."""
    found = {}
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # that of the listing
            found[entry.name] = str(entry.readlink())
    return found


def watches() -> int:
    return len(watcher_of_process()._watches)


def run(manager: RunningManager, act: Callable[[], Any], host: str = "a.example") -> Any:
    """Do a work: where its confinement has it run."""
    admission = manager.admit(Work("call", "x", {"host": host}))
    assert isinstance(admission, InlineAdmission | ThreadAdmission)
    try:
        return admission.call(act)
    finally:
        admission.finish()


def until(heard: Callable[[], object], act: Callable[[], object]) -> None:
    """Go on with ``act`` until something was heard."""
    deadline = time.monotonic() + PATIENCE
    while not heard():
        assert time.monotonic() < deadline, "nothing was heard"
        act()


def spin() -> None:
    end = time.monotonic() + 0.1
    while time.monotonic() < end:
        pass


def start_threads() -> None:
    """As many as may be, and some more."""
    over = threading.Event()
    try:
        for _ in range(20):
            threading.Thread(target=over.wait, daemon=True).start()
    except RuntimeError:
        time.sleep(0.01)
    finally:
        over.set()


@pytest.mark.parametrize("isolation", ISOLATIONS)
def test_rcon_event_reports_the_cpu_quota_and_pids(isolation: str) -> None:
    listener = Listener()

    def program(manager: RunningManager) -> Any:
        # Counted when threads are held back; for how long, when they go on.
        run(manager, lambda: until(lambda: any(event.usage for event in listener.of("cpu_throttled")), spin))
        run(manager, lambda: until(lambda: listener.of("pids_limit"), start_threads))
        return listener.of("cpu_throttled")[0], listener.of("pids_limit")[0]

    cpu, pids = managed(isolation, {"cpu": "20%", "pids": 6}, program, listener)
    for event in (cpu, pids):
        assert (event.policy, event.key, event.group) == ("p", "a.example", "p~a.example")
        assert event.cgroup.endswith("/host/p~a.example")
        assert event.count >= 1
    assert (cpu.limit, cpu.bound) == ("cpu", 0.2)
    assert (pids.limit, pids.bound) == ("pids", 6)


@pytest.mark.parametrize("isolation", ISOLATIONS)
def test_limits_that_a_plugin_returns_are_applied_immediately(isolation: str) -> None:
    listener = Listener(pids_limit=Limits(pids=64))

    def program(manager: RunningManager) -> Any:
        def act() -> int:
            until(lambda: listener.of("pids_limit"), start_threads)
            cgroup = next(iter(manager._confinements.values())).executor.cgroup  # type: ignore[attr-defined]
            eventually(lambda: read_limits(cgroup).pids_max == 64, PATIENCE)
            over = threading.Event()
            threads = [threading.Thread(target=over.wait) for _ in range(20)]
            for thread in threads:
                thread.start()
            over.set()
            for thread in threads:
                thread.join()
            return len(threads)

        return run(manager, act)

    assert managed(isolation, {"pids": 6}, program, listener) == 20


@pytest.mark.once
@pytest.mark.parametrize("isolation", ISOLATIONS)
def test_a_group_is_watched_once_however_much_work_it_has(isolation: str) -> None:
    def program(manager: RunningManager) -> Any:
        seen = [watches()]
        for _ in range(20):
            run(manager, lambda: None)
            seen.append(watches())
        run(manager, lambda: None, "b.example")
        return [*seen, watches()]

    assert managed(isolation, {"pids": 9}, program, Listener()) == [0, *[1] * 20, 2]


@pytest.mark.once
@pytest.mark.parametrize("isolation", ISOLATIONS)
def test_nothing_is_watched_without_a_plugin_for_events(isolation: str) -> None:
    def program(manager: RunningManager) -> Any:
        run(manager, lambda: None)
        return watches(), "cgroup-events" in [thread.name for thread in threading.enumerate()]

    assert managed(isolation, {"pids": 9}, program) == (0, False)


@pytest.mark.parametrize("isolation", ISOLATIONS)
def test_confinements_that_are_not_kept_are_not_watched(isolation: str) -> None:
    def program(manager: RunningManager) -> Any:
        for number in range(9):
            run(manager, lambda: None, f"{number}.example")
        return watches()

    assert managed(isolation, {"pids": 9}, program, Listener(), confinements=2) == 2


@pytest.mark.smoke
def test_a_cgroup_that_another_worker_removed_is_watched_again() -> None:
    listener = Listener()

    def program(manager: RunningManager) -> Any:
        run(manager, lambda: None)
        next(iter(manager._confinements.values())).executor.cgroup.delete()  # type: ignore[attr-defined]
        run(manager, lambda: until(lambda: listener.of("pids_limit"), start_threads))
        eventually(lambda: watches() == 1)
        return listener.of("pids_limit")[0].bound

    assert managed("inline", {"pids": 6}, program, listener) == 6


@pytest.mark.layout("v2")
@pytest.mark.parametrize("isolation", ISOLATIONS)
def test_pressure_on_threads_is_listened_to(isolation: str) -> None:
    def program(manager: RunningManager) -> Any:
        run(manager, lambda: None)
        return sorted(Path(file).name for file in descriptors().values() if "/host/p~a.example/" in file)

    found = managed(isolation, {"pids": 9}, program, Listener())
    assert {"io.pressure", "memory.pressure"} <= set(found)


def test_without_access_to_pressure_the_other_events_are_reported() -> None:
    """Before Linux 6.4 that takes CAP_SYS_RESOURCE, which a server under an ordinary user has not."""
    listener = Listener()

    def program() -> list[str]:
        state = read_state()
        less = state.permitted - Capabilities.of(CAP_SYS_RESOURCE)
        set_capabilities(less, less, state.inheritable & less)
        with managing({"pids": 8, "each": {"timeout": "100s"}}, plugins=[listener]) as manager:
            ask(manager, "fork_bomb", 0.5)
            eventually(lambda: listener.of("pids_limit"), PATIENCE)
        return [event.kind for event in listener.events]

    assert "pids_limit" in in_child(program, timeout=4 * PATIENCE)
