"""The watcher's thread: it outlives what it watches, and leaves nothing behind."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from rcon_plugins.errors import KernelError
from rcon_plugins.kernel.cgroup import Cgroup, Resources
from rcon_plugins.kernel.events import Event, Watcher, watcher_of_process
from tests.kernel.cgroup.helpers import MIB, eventually, running, touch

pytestmark = pytest.mark.each_layout

ROOT = Path(__file__).resolve().parents[3]


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - asked thousands of times


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "cgroup-events"]


@pytest.mark.smoke
def test_cgroup_that_is_deleted(group: Cgroup) -> None:
    """It is told once, and the others go on being watched."""
    gone: list[int] = []
    told: list[Event] = []
    before = descriptors()
    with Watcher() as watcher:
        doomed, staying = group.child("doomed").create(), group.child("staying").create()
        staying.configure(Resources(memory_max=16 * MIB))
        first = watcher.add(doomed, lambda _: None, on_gone=lambda: gone.append(1))
        watcher.add(staying, told.append, kinds=("oom_kill",), on_gone=lambda: gone.append(2))
        with running(doomed, time.sleep, 60):
            pass
        doomed.delete()
        eventually(lambda: gone == [1])
        assert first.gone
        with running(staying, touch, 64 * MIB) as child:
            assert child.wait() == -signal.SIGKILL
        eventually(lambda: told)
        staying.delete()
        eventually(lambda: gone == [1, 2])
        eventually(lambda: not threads())
    assert descriptors() == before


def test_without_room_for_its_thread_it_refuses_and_works_later(group: Cgroup) -> None:
    """A limit on processes counts threads, too."""
    narrow, watched = group.child("narrow").create(), group.child("watched").create()
    narrow.configure(Resources(pids_max=1))

    def attempt() -> tuple[str, int, str]:
        before = descriptors()
        with Watcher() as watcher:
            with pytest.raises(KernelError) as refused:
                watcher.add(watched, lambda _: None)
            left = descriptors() - before
            narrow.configure(Resources(pids_max=2))
            gone = threading.Event()
            with watcher.add(watched, lambda _: None, on_gone=gone.set):
                watched.delete()
                told = gone.wait(30)
        return str(refused.value), left, f"told: {told}"

    with running(narrow, attempt) as child:
        reason, left, told = child.result()
    assert "the thread cgroup-events could not be started" in reason
    assert "pids.max" in reason
    assert (left, told) == (0, "told: True")


def test_many_added_and_closed_leave_nothing_behind(group: Cgroup) -> None:
    before = descriptors()
    most = 0
    with Watcher() as watcher:
        for number in range(2000):
            # The kernel takes its time over a threshold of v1.
            thresholds = (MIB,) if number % 100 == 0 else ()
            watcher.add(group, lambda _: None, thresholds=thresholds).close()
            if number % 10 == 9:  # to count takes longer than to add
                most = max(most, descriptors())
        eventually(lambda: not threads())
        assert descriptors() == before
        # What waits to be closed is bounded, too.
        assert most < before + 3000
        with watcher.add(group, lambda _: None):
            assert len(threads()) == 1
    assert descriptors() == before


def test_many_deleted_under_it(group: Cgroup) -> None:
    before = descriptors()
    gone: list[int] = []
    with Watcher() as watcher:
        for number in range(100):
            child = group.child(f"n{number}").create()
            watcher.add(child, lambda _: None, on_gone=lambda: gone.append(1))
            child.delete()
        eventually(lambda: len(gone) == 100)
        eventually(lambda: not threads())
    assert descriptors() == before


def test_one_thread_watches_all_cgroups(group: Cgroup) -> None:
    with Watcher() as watcher:
        for number in range(20):
            watcher.add(group.child(f"n{number}").create(), lambda _: None)
        assert len(threads()) == 1
    assert not threads()


def test_callback_that_fails_and_one_that_closes(group: Cgroup, caplog: pytest.LogCaptureFixture) -> None:
    group.configure(Resources(memory_max=16 * MIB))
    told: list[Event] = []
    with Watcher() as watcher:
        closing = []

        def fail(event: Event) -> None:
            raise RuntimeError("of the callback")

        def close(event: Event) -> None:
            closing.append(event)
            own.close()

        watcher.add(group, fail, kinds=("oom_kill",))
        own = watcher.add(group, close, kinds=("oom_kill",))
        watcher.add(group, told.append, kinds=("oom_kill",))
        with caplog.at_level(logging.ERROR, "rcon"):
            for _ in range(2):
                with running(group, touch, 64 * MIB) as child:
                    assert child.wait() == -signal.SIGKILL
                eventually(lambda: told)
                told.clear()
    assert len(closing) == 1
    assert "of the callback" in caplog.text


def test_fork_has_no_watcher(group: Cgroup, in_child: Callable[..., object]) -> None:
    """The thread did not come along, so the watcher refuses there; that of the process is a new one."""
    with Watcher() as watcher:
        watch = watcher.add(group, lambda _: None)
        shared = watcher_of_process()

        def ask() -> str:
            watch.close()
            watcher.close()
            with pytest.raises(KernelError) as refused:
                watcher.add(group, lambda _: None)
            own = watcher_of_process()
            with own.add(group, lambda _: None):
                alive = len(threads())
            own.close()
            return f"{refused.value} {own is shared} {alive}"

        answer = str(in_child(ask))
        assert f"is a fork of process {os.getpid()}" in answer
        assert answer.endswith("False 1")
        assert not watch.closed
        with running(group, time.sleep, 60):
            pass


@pytest.mark.once
def test_under_gevent(group: Cgroup) -> None:
    """The thread is a greenlet there, and others run beside it."""
    code = """
from gevent import monkey; monkey.patch_all()
import os, sys, time, threading
from rcon_plugins.kernel.cgroup import Hierarchy
from rcon_plugins.kernel.events import Watcher, Pressure
group = Hierarchy.discover().cgroup(sys.argv[1])
told, beats = [], []
def beat():
    while True:
        beats.append(1); time.sleep(0.01)
threading.Thread(target=beat, daemon=True).start()
with Watcher() as watcher:
    watcher.add(group, told.append, kinds=("oom_kill", "empty"), pressure=(Pressure("cpu"),))
    pid = os.fork()
    if pid == 0:
        group.enter_process()
        memory = bytearray(64 << 20)
        for at in range(0, len(memory), 4096): memory[at] = 1
        os._exit(0)
    os.waitpid(pid, 0)
    deadline = time.monotonic() + 20
    while {event.kind for event in told} < {"oom_kill", "empty"} and time.monotonic() < deadline:
        time.sleep(0.01)
print(sorted({event.kind for event in told}), len(beats) > 2)
"""
    group.configure(Resources(memory_max=16 * MIB))
    result = subprocess.run(
        [sys.executable, "-c", code, group.path], capture_output=True, text=True, timeout=60, cwd=ROOT
    )
    assert (result.stdout, result.returncode) == ("['empty', 'oom_kill'] True\n", 0), result.stderr
