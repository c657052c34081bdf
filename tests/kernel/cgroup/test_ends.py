"""Stopping, ending and removing: everything inside, nothing outside, in bounded time."""

from __future__ import annotations

import errno
import os
import resource
import signal
import threading
import time
from pathlib import Path

import pytest

from rcon_plugins.errors import KernelError
from rcon_plugins.kernel.cgroup import Cgroup, Hierarchy
from tests import children
from tests.kernel.cgroup.helpers import eventually, running, sleep_forever

pytestmark = pytest.mark.each_layout


def count(path: str) -> None:
    """Write ever more to a file."""
    with Path(path).open("ab", buffering=0) as file:
        while True:
            file.write(b".")
            time.sleep(0.002)


@pytest.mark.smoke
def test_freeze_and_thaw(group: Cgroup, tmp_path: Path) -> None:
    path = tmp_path / "count"
    leaf = group.child("a").create().child("b").create()
    with running(leaf, count, str(path)):
        eventually(lambda: path.exists() and path.stat().st_size > 5)
        group.freeze()
        size = path.stat().st_size
        time.sleep(0.1)
        assert path.stat().st_size == size
        group.thaw()
        eventually(lambda: path.stat().st_size > size)
        group.freeze()
        group.kill()
        assert group.processes(subtree=True) == []
    group.thaw()


def test_kill_takes_the_subtree_and_nothing_else(group: Cgroup) -> None:
    victim, bystander = group.child("victim").create(), group.child("bystander").create()
    # v2 has processes in leaves only.
    near, deep = victim.child("near").create(), victim.child("not").child("so").child("near").create()
    with (
        running(near, sleep_forever) as one,
        running(deep, sleep_forever) as two,
        running(bystander, sleep_forever) as three,
    ):
        assert near.processes() == [one.pid]
        assert victim.processes() == []
        assert victim.processes(subtree=True) == sorted([one.pid, two.pid])
        victim.kill()
        assert victim.processes(subtree=True) == []
        assert one.wait() == two.wait() == -signal.SIGKILL
        assert bystander.processes() == [three.pid]
        assert victim.delete()
        assert not deep.exists()
        bystander.kill()
        assert three.wait() == -signal.SIGKILL


def escape(pipe: int) -> None:
    """A daemon: new session, double fork, all signals ignored, the first two generations gone."""
    for _ in range(2):
        if os.fork() > 0:
            os._exit(0)
        os.setsid()
    for number in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}:
        signal.signal(number, signal.SIG_IGN)
    os.write(pipe, b"x")
    sleep_forever()


def test_a_daemon_does_not_get_away(group: Cgroup) -> None:
    reading, writing = os.pipe()
    with running(group, escape, writing) as child:
        assert os.read(reading, 1) == b"x"
        child.wait()
        # The generations between may still be on their way out.
        eventually(lambda: len(group.processes()) == 1)
        assert child.pid not in group.processes()
        group.kill()
    os.close(reading)
    os.close(writing)
    assert group.processes() == []


def fork_quickly() -> None:
    """Always a new process, never the same: a walk that looks once misses it."""
    while True:
        if os.fork() > 0:
            os._exit(0)


def test_a_process_that_replaces_itself_by_forks_is_killed(group: Cgroup) -> None:
    with running(group, fork_quickly) as child:
        child.wait()
        time.sleep(0.05)
        group.kill()
    assert group.processes() == []
    time.sleep(0.1)
    assert group.processes() == []


def tell(path: str) -> None:
    """Write to a file at SIGTERM, and go on."""

    def note(*_: object) -> None:
        with Path(path).open("ab", buffering=0) as file:
            file.write(b"TERM ")

    signal.signal(signal.SIGTERM, note)
    Path(path).touch()
    sleep_forever()


def test_terminate_tells_each_process_once_and_nothing_else(group: Cgroup, tmp_path: Path) -> None:
    """Also one that is stopped, and one that is frozen. None is killed."""
    one, two, bystander = (group.child(name).create() for name in ("one", "two", "bystander"))
    inside = group.child("inside").create().child("deep").create()
    files = {cgroup.name: tmp_path / cgroup.name for cgroup in (one, two, bystander, inside)}
    with (
        running(one, tell, str(files["one"])) as first,
        running(two, tell, str(files["two"])),
        running(inside, tell, str(files["deep"])) as deep,
        running(bystander, tell, str(files["bystander"])),
    ):
        eventually(lambda: all(path.exists() for path in files.values()))
        assert group.child("inside").terminate() == [deep.pid]
        os.kill(first.pid, signal.SIGSTOP)
        assert one.terminate() == [first.pid]
        two.freeze()
        two.terminate()
        told = [files[name] for name in ("one", "two", "deep")]
        eventually(lambda: all(path.read_text() for path in told))
        time.sleep(0.1)
        assert [path.read_text() for path in told] == ["TERM "] * 3
        assert files["bystander"].read_text() == ""
        assert len(group.processes(subtree=True)) == 4
        group.kill()


def many(pipe: int, count: int) -> None:
    """Become a shell with many children, which end at SIGTERM. So many copies of this process take long to make."""
    os.dup2(pipe, 1)
    reading, writing = os.pipe()  # of which nothing can be read before all have ended
    os.dup2(reading, 0)
    os.set_inheritable(writing, True)
    script = (
        f"exec 3<&0; i=0; while [ $i -lt {count} ]; do read -r _ <&3 & i=$((i + 1)); done; printf x; wait"
    )
    os.execv("/bin/sh", ["sh", "-c", script])


@pytest.mark.parametrize("free", [None, 6], ids=["", "few descriptors"])
def test_many_processes_are_told_in_a_short_time(group: Cgroup, free: int | None) -> None:
    reading, writing = os.pipe()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with running(group, many, writing, 300) as child:
        assert os.read(reading, 1) == b"x"
        if free is not None:
            highest = max(int(link.name) for link in Path("/proc/self/fd").iterdir())
            resource.setrlimit(resource.RLIMIT_NOFILE, (highest + free, hard))
        try:
            began = time.monotonic()
            told = group.terminate(60)
            took = time.monotonic() - began
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert len(told) == 301
        assert took < (60 if free else 20)
        eventually(lambda: group.processes() == [], seconds=30)
        assert child.wait() == -signal.SIGTERM
    os.close(reading)
    os.close(writing)


def test_terminate_stops_in_time_while_processes_fork(group: Cgroup) -> None:
    with running(group, fork_quickly_and_ignore) as child:
        child.wait()
        began = time.monotonic()
        group.terminate(0.3)
        assert time.monotonic() - began < 5
        group.kill()
    assert group.processes(subtree=True) == []


def fork_quickly_and_ignore() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    fork_quickly()


def test_without_cgroup_kill(group: Cgroup, monkeypatch: pytest.MonkeyPatch) -> None:
    """What kernels before 5.14 get: freeze, signal each, again until empty."""
    monkeypatch.setattr("rcon_plugins.kernel.cgroup.v2.V2Branch.kill", lambda self: False)
    near, deep = group.child("near").create(), group.child("not").child("so").child("near").create()
    with running(near, fork_quickly) as child, running(deep, sleep_forever):
        child.wait()
        group.kill()
    assert group.processes(subtree=True) == []


def test_without_anything_to_freeze_with(group: Cgroup, monkeypatch: pytest.MonkeyPatch) -> None:
    """What v1 without a freezer gets: no more forks, signal each, again until empty."""
    monkeypatch.setattr("rcon_plugins.kernel.cgroup.v2.V2Branch.kill", lambda self: False)
    monkeypatch.setattr("rcon_plugins.kernel.cgroup.v2.V2Branch.freeze", lambda self, frozen: False)
    with running(group, fork_quickly) as child:
        child.wait()
        group.kill()
    assert group.processes(subtree=True) == []


@pytest.mark.layout("v1", "hybrid")
def test_v1_without_a_v2_side(hierarchy: Hierarchy, monkeypatch: pytest.MonkeyPatch) -> None:
    """The v1 freezer does what the v2 side does elsewhere."""
    alone = Hierarchy.of([mount for mount in hierarchy.mounts if mount.version == 1])
    assert alone.layout == "v1"
    group = alone.cgroup(f"/rcon-tests-v1-{os.getpid()}").create()
    try:
        assert any("/freezer/" in directory for directory in group.directories)
        with running(group, fork_quickly) as child, running(group.child("deep").create(), sleep_forever):
            child.wait()
            group.freeze()
            group.kill()
        assert group.processes(subtree=True) == []
    finally:
        group.kill()
        assert group.delete()


@pytest.mark.layout("hybrid")
def test_kill_gives_up_in_time(group: Cgroup) -> None:
    """A process in the v1 freezer, which is none of ours, dies only when it is let go."""
    freezer = Path(f"/sys/fs/cgroup/freezer/rcon-tests-{os.getpid()}")
    freezer.mkdir()
    try:
        with running(group, sleep_forever) as child:
            (freezer / "cgroup.procs").write_text(str(child.pid))
            (freezer / "freezer.state").write_text("FROZEN")
            begin = time.monotonic()
            with pytest.raises(KernelError) as caught:
                group.kill(timeout=0.5)
            assert 0.4 < time.monotonic() - begin < 3
            assert caught.value.errno == errno.ETIMEDOUT
            assert str(child.pid) in str(caught.value)
            begin = time.monotonic()
            with pytest.raises(KernelError) as caught:
                group.delete(timeout=0.3)
            assert time.monotonic() - begin < 3
            assert caught.value.errno == errno.EBUSY
            (freezer / "freezer.state").write_text("THAWED")
            group.kill()
            child.wait()
    finally:
        (freezer / "freezer.state").write_text("THAWED")
        freezer.rmdir()


def killed_from_inside(group: Cgroup) -> int | None:
    group.enter_process()
    try:
        group.kill()
    except KernelError as error:
        return error.errno
    return None


def test_a_process_cannot_kill_its_own_cgroup(group: Cgroup) -> None:
    assert children.in_child(killed_from_inside, group) == errno.EDEADLK


def test_the_root_cgroup_cannot_be_killed_or_deleted(hierarchy: Hierarchy) -> None:
    root = hierarchy.cgroup("/")
    for act in (root.kill, root.delete):
        with pytest.raises(KernelError, match="not"):
            act()


def test_killing_an_empty_cgroup(group: Cgroup) -> None:
    group.kill()
    group.child("never-made").kill()
    assert group.child("never-made").delete()


def test_deleting_a_shared_cgroup_in_use_returns_false(group: Cgroup) -> None:
    shared = group.child("shared", shared=True).create()
    begin = time.monotonic()
    with running(shared, sleep_forever):
        assert shared.delete() is False
        shared.kill()
    leaf = shared.child("leaf").create()
    assert shared.delete() is False
    assert leaf.exists()
    leaf.delete()
    assert time.monotonic() - begin < 1
    assert shared.delete() is True


def churn(shared: Cgroup, number: int, rounds: int) -> int:
    """Make a leaf, use it, remove it, and the cgroup above with it when nobody else is there."""
    removed = 0
    for turn in range(rounds):
        leaf = shared.child(f"{number}-{turn}").create()
        assert leaf.exists()
        leaf.meter().close()
        if turn % 5 == 0:
            with running(leaf, os.getpid) as child:
                child.result()
        assert leaf.delete()
        removed += shared.delete()
    return removed


def test_several_processes_make_and_remove_siblings(group: Cgroup) -> None:
    shared = group.child("shared", shared=True)
    workers = [running(None, churn, shared, number, 60) for number in range(4)]
    started = [worker.__enter__() for worker in workers]
    try:
        removed = [worker.result() for worker in started]
    finally:
        for worker in workers:
            worker.__exit__(None, None, None)
    assert sum(removed) > 0
    assert shared.delete()
    assert not shared.exists()


def test_a_process_with_several_threads_enters_whole(group: Cgroup) -> None:
    def enter() -> list[int]:
        threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
        group.enter_process()
        return group.threads()

    assert len(children.in_child(enter)) == 2


def test_attach(group: Cgroup) -> None:
    with running(None, sleep_forever) as child:
        group.attach(child.pid)
        assert group.processes() == [child.pid]
        group.kill()
    for wrong in (0, -1):
        with pytest.raises(ValueError, match="not a process"):
            group.attach(wrong)
