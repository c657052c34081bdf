"""Memory that expands, on the real kernel."""

from __future__ import annotations

import fcntl
import mmap
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from rcon_plugins import Event, Limits, Memory, expand
from rcon_plugins.errors import ControllerUnavailable
from rcon_plugins.kernel.cgroup import MAX, Cgroup, Hierarchy, Resources, read_limits
from rcon_plugins.kernel.events import Watcher
from tests.kernel.cgroup.helpers import DISK, MIB, eventually, layout, running, sleep_forever, touch

pytestmark = pytest.mark.each_layout


def memory(limit: str, expand: str, up_to: str) -> Memory:
    return Memory.parse({"limit": limit, "expand": expand, "up_to": up_to})


@pytest.fixture
def watcher() -> Iterator[Watcher]:
    with Watcher() as made:
        yield made


def in_steps(sizes: list[int], pause: float = 0.3) -> None:
    """Need so much, then so much more ..."""
    kept = []
    for size in sizes:
        block = mmap.mmap(-1, size)
        for at in range(0, size, mmap.PAGESIZE):
            block[at] = 1
        kept.append(block)
        time.sleep(pause)


def when_told(sizes: list[int], folder: str) -> None:
    """Need so much, and then more, each as soon as there is a file with its number."""
    kept = []
    for number, size in enumerate(sizes):
        eventually(Path(folder, str(number)).exists, 60)
        block = mmap.mmap(-1, size)
        for at in range(0, size, mmap.PAGESIZE):
            block[at] = 1
        kept.append(block)


def by_system_calls(size: int) -> int:
    """Have the kernel itself touch the memory: reads into fresh buffers, and a file in memory."""
    with Path("/dev/zero").open("rb", buffering=0) as zeros:
        buffer = bytearray(size // 2)
        assert zeros.readinto(buffer) == len(buffer)
    descriptor = os.memfd_create("test")
    written = 0
    while written < size // 2:
        written += os.write(descriptor, bytes(MIB))
    return len(buffer) + written


def read_file(path: str) -> int:
    with Path(path).open("rb", buffering=0) as file:
        return sum(len(data) for data in iter(lambda: file.read(MIB), b""))


@pytest.mark.smoke
def test_the_limit_grows_with_the_need(group: Cgroup, watcher: Watcher) -> None:
    told: list[Event] = []

    def take_note(event: Event) -> None:
        told.append(event)

    expansion = expand(group, memory("64M", "2x", "512M"), watcher=watcher, on_event=take_note)
    with running(group, in_steps, [200 * MIB], 60.0):
        eventually(lambda: (expansion.limit, expansion.times) == (256 * MIB, 2))
    assert told[0].kind == "memory_limit"
    assert (told[0].limit, told[0].bound, told[0].next_bound) == ("memory", 64 * MIB, 128 * MIB)
    assert read_limits(group).memory_max == 512 * MIB
    assert group.read().oom_kills == 0


@pytest.mark.smoke
def test_the_limit_grows_while_another_user_locks_the_cgroup(group: Cgroup, watcher: Watcher) -> None:
    """Any user may open the directory, and flock(2) needs no more. The watcher's thread serves all confinements."""
    descriptors = [os.open(directory, os.O_RDONLY | os.O_DIRECTORY) for directory in group.directories]
    try:
        for descriptor in descriptors:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        expansion = expand(group, memory("64M", "2x", "512M"), watcher=watcher)
        with running(group, in_steps, [200 * MIB], 0.5) as child:
            child.result()
        eventually(lambda: (expansion.limit, expansion.times) == (256 * MIB, 2))
        expansion.reset()
        assert (expansion.limit, expansion.times) == (64 * MIB, 0)
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def test_work_above_the_bound_is_killed(group: Cgroup, watcher: Watcher) -> None:
    expansion = expand(group, memory("32M", "2x", "160M"), watcher=watcher)
    with running(group, touch, 400 * MIB) as child:
        assert child.wait() == -signal.SIGKILL
    assert expansion.memory.describe() == "160M (up_to; expanded 3 times from 32M)"
    reading = group.read()
    assert reading.oom_kills
    assert (reading.memory_peak or 0) <= 160 * MIB


def test_the_limit_grows_by_one_step_at_a_time(group: Cgroup, watcher: Watcher, tmp_path: Path) -> None:
    """The next step is needed when the one before was made: on v1 nothing slows the work down."""
    limits: list[int] = []

    def made(steps: int) -> bool:
        return len(limits) >= steps

    expansion = expand(
        group,
        memory("32M", "1.5x", "400M"),
        watcher=watcher,
        on_event=lambda e: limits.append(e.next_bound or 0),
    )
    (tmp_path / "0").touch()
    with running(group, when_told, [28 * MIB, 14 * MIB, 20 * MIB, 30 * MIB, MIB], str(tmp_path)) as child:
        for number in range(1, 4):
            (tmp_path / str(number)).touch()
            eventually(partial(made, number))
        (tmp_path / "4").touch()
        child.result()
    assert limits == [48 * MIB, 72 * MIB, 108 * MIB]
    assert expansion.times == 3


def test_memory_that_the_kernel_touches_expands_too(group: Cgroup, watcher: Watcher) -> None:
    """A system call does not fail with ENOMEM or EFAULT where the work would only have had to wait."""
    expansion = expand(group, memory("48M", "2x", "400M"), watcher=watcher)
    with running(group, by_system_calls, 160 * MIB) as child:
        assert child.result() == 160 * MIB
    assert expansion.times >= 2


def test_page_cache_expands_nothing(group: Cgroup, watcher: Watcher) -> None:
    expansion = expand(group, memory("48M", "2x", "256M"), watcher=watcher)
    with tempfile.NamedTemporaryFile(dir=DISK) as file:
        file.write(bytes(MIB) * 120)
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        with running(group, read_file, file.name) as child:
            assert child.result() == 120 * MIB
        time.sleep(0.5)
        assert expansion.times == 0
        with running(group, in_steps, [80 * MIB], 60.0):
            eventually(lambda: expansion.times == 1)


def test_callback_that_returns_new_limits(group: Cgroup, watcher: Watcher) -> None:
    def decide(event: Event) -> Limits | None:
        return Limits(memory=Memory.parse("96M")) if event.bound == 64 * MIB else None

    def allocate() -> None:
        # Before the callback has returned, the work may use up to 512M: on v1 nothing slows it down.
        with mmap.mmap(-1, 300 * MIB) as memory:
            for at in range(0, 300 * MIB, mmap.PAGESIZE):
                memory[at] = 1
                if at == 70 * MIB:
                    eventually(lambda: read_limits(group).memory_max == 96 * MIB)

    expansion = expand(group, memory("32M", "2x", "512M"), watcher=watcher, on_event=decide)
    with running(group, allocate) as child:
        assert child.wait() == -signal.SIGKILL
    assert expansion.limit == 96 * MIB
    limits = read_limits(group)
    assert limits.memory_max == 96 * MIB
    assert limits.memory_high in (None, MAX)


def test_a_failing_callback_does_not_stop_the_growth(
    group: Cgroup, watcher: Watcher, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(event: Event) -> None:
        raise RuntimeError("of the callback")

    expand(group, memory("32M", "2x", "256M"), watcher=watcher, on_event=fail)
    # It stays: on v1, where nothing slows it down, it could be gone before the watcher looks.
    with running(group, in_steps, [100 * MIB], 60.0):
        eventually(lambda: (group.read().memory_current or 0) >= 100 * MIB)
        eventually(lambda: "of the callback" in caplog.text)


def test_two_levels_at_once(group: Cgroup, watcher: Watcher) -> None:
    leaf = group.child("leaf").create()
    outer = expand(group, memory("48M", "2x", "400M"), watcher=watcher)
    inner = expand(leaf, memory("32M", "2x", "400M"), watcher=watcher)
    with running(leaf, in_steps, [180 * MIB], 60.0):
        eventually(lambda: (outer.limit, inner.limit) == (192 * MIB, 256 * MIB))


def test_two_watchers_of_one_cgroup(group: Cgroup, watcher: Watcher) -> None:
    """As workers of one server do: it grows as if there were one."""
    with Watcher() as another:
        first = expand(group, memory("32M", "2x", "256M"), watcher=watcher)
        second = expand(group, memory("32M", "2x", "256M"), watcher=another)
        with running(group, touch, 100 * MIB) as child:
            assert child.result() == 100 * MIB
        eventually(lambda: first.limit == second.limit == 128 * MIB)
    high = read_limits(group).memory_high
    assert high == 128 * MIB if layout() == "v2" else high is None


def test_reset_to_the_first_limit(group: Cgroup, watcher: Watcher) -> None:
    expansion = expand(group, memory("32M", "2x", "256M"), watcher=watcher)
    with running(group, in_steps, [60 * MIB], 60.0):
        eventually(lambda: expansion.times == 1)
        eventually(lambda: (group.read().memory_current or 0) > 55 * MIB)
        expansion.reset()
        assert expansion.limit == 64 * MIB, "what is in it still needs it"
    expansion.reset()
    assert (expansion.limit, expansion.times) == (32 * MIB, 0)
    with running(group, in_steps, [60 * MIB], 60.0):
        eventually(lambda: expansion.times == 1)


def test_work_at_the_limit_can_be_killed_while_the_callback_hangs(group: Cgroup, watcher: Watcher) -> None:
    """Slowed down (v2) or not: work at the limit can be killed at once."""
    hold = threading.Event()

    def wait(event: Event) -> None:
        hold.wait(20)

    expand(group, memory("32M", "2x", "512M"), watcher=watcher, on_event=wait)
    with running(group, in_steps, [100 * MIB], 60.0) as child:
        eventually(lambda: (group.read().memory_current or 0) > 30 * MIB)
        time.sleep(0.3)
        began = time.monotonic()
        group.kill()
        assert child.wait() == -signal.SIGKILL
        assert time.monotonic() - began < 5
    hold.set()


def raise_for_a_while(path: str, ready: int) -> None:
    expand(Hierarchy.discover().cgroup(path), memory("32M", "2x", "128M"))
    os.write(ready, b"1")
    sleep_forever()


def test_the_watching_process_is_killed(group: Cgroup) -> None:
    """The bound stays. Work that is slowed down ends at the bound or by a kill, and never hangs in the kernel."""
    reading, writing = os.pipe()
    with running(None, raise_for_a_while, group.path, writing) as raiser:
        os.read(reading, 1)
        raiser.end_by_signal()
    assert read_limits(group).memory_max == 128 * MIB
    with running(group, in_steps, [300 * MIB], 0.0) as child:
        time.sleep(0.5)
        group.kill()
        assert child.wait() == -signal.SIGKILL
    for descriptor in (reading, writing):
        os.close(descriptor)


def test_the_cgroup_is_deleted(group: Cgroup, watcher: Watcher) -> None:
    gone = threading.Event()
    leaf = group.child("leaf").create()
    expansion = expand(leaf, memory("32M", "2x", "128M"), watcher=watcher, on_gone=gone.set)
    assert expansion.is_current
    leaf.delete()
    assert not expansion.is_current
    assert gone.wait(10)
    leaf.create()
    assert not expansion.is_current


def test_an_expansion_at_its_bound_is_current(group: Cgroup, watcher: Watcher) -> None:
    expansion = expand(group, memory("32M", "100x", "400M"), watcher=watcher)
    with running(group, in_steps, [60 * MIB], 60.0):
        eventually(lambda: (expansion.limit, expansion.times, expansion.is_current) == (400 * MIB, 1, True))


def test_the_smallest_steps(group: Cgroup, watcher: Watcher) -> None:
    """A notice of one step does not count for the next."""
    expansion = expand(group, memory("80M", "1.1x", "400M"), watcher=watcher)
    with running(group, in_steps, [81 * MIB], 0.5) as child:
        eventually(lambda: expansion.times)
        child.result()
    assert (expansion.limit, expansion.times) == (88 * MIB, 1)


@pytest.mark.layout("v2")
def test_a_limit_raised_by_another_process(group: Cgroup, watcher: Watcher) -> None:
    """Beyond all steps: there is nothing to be raised."""
    expansion = expand(group, memory("32M", "2x", "128M"), watcher=watcher)
    group.configure(Resources(memory_high=200 * MIB, memory_max=400 * MIB))
    with running(group, in_steps, [220 * MIB], 0.2):
        eventually(lambda: (group.read().memory_current or 0) > 195 * MIB)
        time.sleep(0.3)
        group.kill()
    assert expansion.limit == 128 * MIB


def test_no_memory_controller(hierarchy: Hierarchy, group: Cgroup, watcher: Watcher) -> None:
    bare = hierarchy.cgroup(group.child("bare").path, controllers=frozenset({"pids"})).create()
    with pytest.raises(ControllerUnavailable, match="no memory controller"):
        expand(bare, memory("32M", "2x", "128M"), watcher=watcher)


def test_the_example() -> None:
    program = Path(__file__).resolve().parents[3] / "examples" / "expand" / "grow.py"
    done = subprocess.run([sys.executable, program], capture_output=True, text=True, timeout=100)
    lines = done.stdout.splitlines()
    assert (done.returncode, done.stderr) == (0, "")
    assert [line.partition(": ")[2] for line in lines[:2]] == [
        "the limit expands from 32 to 64 MiB",
        "the limit expands from 64 to 128 MiB",
    ]
    assert any(line.startswith("oom_kill") for line in lines)
    assert lines[-1] == "the child ended, killed at its memory limit 128M (up_to; expanded 2 times from 32M)"
