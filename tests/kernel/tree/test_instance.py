"""The tree of a server: make it, enter it, share it with workers, leave it behind, remove it."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from rcon_plugins.errors import KernelError
from rcon_plugins.kernel.cgroup import Cgroup, Hierarchy, Resources
from rcon_plugins.tree.garbage import Collected, collect
from rcon_plugins.tree.instance import Instance
from tests.kernel.cgroup.helpers import eventually, layout, running, settings_of, sleep_forever

pytestmark = pytest.mark.each_layout

NOBODY = 65534


@pytest.fixture
def instance(hierarchy: Hierarchy, group: Cgroup) -> Iterator[Instance]:
    made = Instance.create(hierarchy, base=group.path)
    try:
        yield made
    finally:
        assert made.close()


def where_am_i() -> str:
    return Path("/proc/self/cgroup").read_text()


@pytest.mark.smoke
def test_the_name_holds_the_owner(instance: Instance, group: Cgroup) -> None:
    (name,) = group.children()
    assert instance.path == f"{group.path}/{name}"
    started = Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]
    assert name == f"rcon-{os.getpid()}-{started}"
    assert instance.policy_cgroup("a").path == f"{instance.path}/work/a"
    assert instance.executor_cgroup("a", "1").path == f"{instance.path}/work/a/1"
    assert instance.threaded("a").path == f"{instance.path}/host/a"
    for wrong in ("../x", "a/b", "", "tasks", "x" * 256, "a\0", "a\n"):
        for place in (
            instance.policy_cgroup,
            instance.threaded,
            lambda name: instance.executor_cgroup("a", name),
        ):
            with pytest.raises(ValueError, match=r".+"):
                place(wrong)


def test_two_instances_in_one_process(hierarchy: Hierarchy, instance: Instance) -> None:
    second = Instance.create(hierarchy, base=instance.base)
    assert second.path == f"{instance.path}-2"
    assert second.close()
    assert instance.work.exists()


def test_executor_cgroups_are_accounted_and_limits_nest(instance: Instance) -> None:
    together, leaf = instance.policy_cgroup("a"), instance.executor_cgroup("a", "1-1")
    leaf.create()
    together.configure(Resources(pids_max=3))
    with running(leaf, sleep_forever), running(instance.executor_cgroup("a", "1-2").create(), sleep_forever):
        assert leaf.read().pids_current == 1
        assert together.read().pids_current == 2
        instance.sweep("1-")
    assert not together.exists()


def test_sweep_removes_only_its_prefix(instance: Instance) -> None:
    for name, leaf in (("a", "12-1"), ("a", "123-1"), ("b", "12-7")):
        instance.executor_cgroup(name, leaf).create()
    with (
        running(instance.executor_cgroup("a", "12-1"), sleep_forever),
        running(instance.executor_cgroup("a", "123-1"), sleep_forever),
    ):
        instance.sweep("12-")
        assert instance.work.children() == ["a"]
        assert instance.policy_cgroup("a").children() == ["123-1"]
        assert len(instance.executor_cgroup("a", "123-1").processes()) == 1
        instance.sweep("123-")
    with pytest.raises(ValueError, match="empty prefix"):
        instance.sweep("")


def adopt_and_release(base: str) -> tuple[str, str, str]:
    instance = Instance.create(Hierarchy.discover(), base=base)
    before = where_am_i()
    instance.adopt()
    instance.adopt()
    inside = where_am_i()
    child = os.fork()
    if child == 0:
        # This process did not make it, so `close` does nothing.
        os._exit(0 if instance.close() is False and where_am_i() == inside else 1)
    assert os.waitpid(child, 0)[1] == 0
    instance.release()
    instance.release()
    after = where_am_i()
    assert instance.close()
    return before, inside, after


def test_adopt_and_release(group: Cgroup) -> None:
    with running(None, adopt_and_release, group.path) as child:
        before, inside, after = child.result()
    assert before == after
    used = {"cpu", "cpuacct", "cpuset", "pids", "blkio", "memory", ""}
    for line in inside.splitlines():
        _, names, path = line.split(":", 2)
        if names in used:
            assert path.endswith("/host"), line
    assert group.children() == []


def enter_and_leave(base: str, adopt: bool) -> list[str]:
    """Enter and leave a cgroup in a second thread. Return its cgroups before, inside, after, and the main thread's."""
    instance = Instance.create(Hierarchy.discover(), base=base)
    if adopt:
        instance.adopt()
    cgroup = instance.threaded("t").create()
    cgroup.configure(Resources(cpu_quota=0.5, pids_max=10))
    seen: list[str] = []

    def run() -> None:
        with cgroup.entrance() as entrance, instance.exit() as home:
            seen.append(Path("/proc/thread-self/cgroup").read_text())
            entrance.enter()
            seen.append(Path("/proc/thread-self/cgroup").read_text())
            assert cgroup.threads() == [threading.get_native_id()]
            assert cgroup.read().pids_current == 1
            home.enter()
            seen.append(Path("/proc/thread-self/cgroup").read_text())

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert len(seen) == 3
    seen.append(Path("/proc/thread-self/cgroup").read_text())
    assert cgroup.delete()
    assert instance.close()
    return seen


@pytest.mark.parametrize("adopt", [True, pytest.param(False, marks=pytest.mark.layout("v1", "hybrid"))])
def test_a_thread_enters_and_leaves(group: Cgroup, adopt: bool) -> None:
    with running(None, enter_and_leave, group.path, adopt) as child:
        before, inside, after, main = child.result()
    assert before == after == main
    names = {line.split(":")[1] for line in inside.splitlines() if line.endswith("/host/t")}
    assert names == ({""} if layout() == "v2" else {"cpu", "cpuacct", "cpuset", "pids", "blkio"})


@pytest.mark.layout("v1", "hybrid")
def test_a_thread_enters_only_the_needed_hierarchies(instance: Instance) -> None:
    cgroup = instance.threaded("t").create()
    with cgroup.entrance({"cpu"}) as entrance:
        assert entrance._files[0][1].endswith("/host/t/tasks")
        assert len(entrance._files) == 1
    with cgroup.entrance({"cpu", "cpuacct", "pids"}) as entrance:
        assert len(entrance._files) == 3
    cgroup.delete()


def test_a_thread_cannot_have_memory_limits(hierarchy: Hierarchy, instance: Instance) -> None:
    cgroup = instance.threaded("t")
    cgroup.create()
    assert [r.limit for r in hierarchy.refusals(Resources(memory_max=1, pids_max=1), threaded=True)] == [
        "memory_max"
    ]
    for act in (lambda: cgroup.configure(Resources(memory_max=1)), lambda: cgroup.entrance({"memory"})):
        with pytest.raises(KernelError, match="memory"):
            act()
    with pytest.raises(KernelError, match="not killing"):
        cgroup.kill()
    cgroup.delete()


@pytest.mark.layout("v2")
def test_v2_refuses_a_thread_from_outside_its_domain(instance: Instance) -> None:
    cgroup = instance.threaded("t").create()
    with cgroup.entrance() as entrance, pytest.raises(KernelError) as caught:
        entrance.enter()
    assert "adopt" in str(caught.value)
    cgroup.delete()


def unprivileged(base: str) -> list[str]:
    """Make the tree for workers of another user, and do in one worker everything that workers do."""
    instance = Instance.create(Hierarchy.discover(), base=base, owner=(NOBODY, NOBODY))
    assert instance.needs_adoption or layout() == "v1"
    instance.adopt()
    worker = os.fork()
    if worker == 0:
        status = 1
        try:
            os.setgroups([])
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)
            _work_unprivileged(instance)
            status = 0
        finally:
            os._exit(status)
    assert os.waitpid(worker, 0)[1] == 0
    left = instance.work.children()
    # The files that control the whole tree still belong to the master.
    for path in (instance.work, instance.host):
        for directory in path.directories:
            for name in (
                "memory.max",
                "cpu.max",
                "cgroup.kill",
                "cgroup.freeze",
                "pids.max",
                "cpu.cfs_quota_us",
            ):
                with contextlib.suppress(FileNotFoundError):
                    assert Path(directory, name).stat().st_uid == 0
    instance.close()
    return left


def _work_unprivileged(instance: Instance) -> None:
    together, leaf = instance.policy_cgroup("p"), instance.executor_cgroup("p", "1-1")
    leaf.create()
    together.configure(Resources(memory_max=64 << 20, swap_max=0, pids_max=8, cpu_quota=0.5, cpus="0"))
    leaf.configure(Resources(memory_max=32 << 20, pids_max=4))
    with leaf.meter() as meter, running(leaf, sleep_forever):
        assert meter.read().pids_current == 1
        leaf.freeze()
        leaf.kill()
    assert leaf.delete()
    assert together.delete()
    threaded = instance.threaded("t").create()
    threaded.configure(Resources(cpu_quota=0.5))
    with threaded.entrance() as entrance, instance.exit() as home:
        entrance.enter()
        home.enter()
    assert threaded.delete()
    for cgroup in (instance.work, instance.host):
        for limit in (Resources(pids_max=5), Resources(memory_max=5)):
            with pytest.raises(KernelError, match="delegate the cgroup") as caught:
                cgroup.configure(limit)
            assert caught.value.errno == errno.EACCES


def test_a_worker_with_another_user(group: Cgroup) -> None:
    with running(None, unprivileged, group.path) as child:
        assert child.result() == []


def own_and_hang(base: str, pipe: int, leave_host_process: bool) -> None:
    """Run a server that will be killed: with work, a daemon in it, and perhaps another process of the server itself."""
    instance = Instance.create(Hierarchy.discover(), base=base)
    instance.adopt()
    leaf = instance.executor_cgroup("p", "1-1").create()
    instance.policy_cgroup("p").configure(Resources(pids_max=10))
    if os.fork() == 0:
        leaf.enter_process()
        os.setsid()
        if os.fork() == 0:
            os.write(pipe, b".")
            sleep_forever()
        sleep_forever()
    if leave_host_process and os.fork() == 0:
        os.setsid()
        os.write(pipe, b".")
        sleep_forever()
    sleep_forever()


def killed_owner(base: str, leave_host_process: bool) -> None:
    reading, writing = os.pipe()
    with running(None, own_and_hang, base, writing, leave_host_process) as owner:
        for _ in range(1 + leave_host_process):
            assert os.read(reading, 1) == b"."
        os.kill(owner.pid, signal.SIGKILL)
        owner.wait()
    os.close(reading)
    os.close(writing)


def test_the_tree_of_a_dead_owner_is_removed(hierarchy: Hierarchy, instance: Instance, group: Cgroup) -> None:
    killed_owner(group.path, False)
    foreign = [group.child("rcon-x-1"), group.child("rcon-1"), group.child("somebody")]
    for cgroup in foreign:
        cgroup.create()
    (dead,) = set(group.children()) - {instance.path.rpartition("/")[2], *(c.name for c in foreign)}
    assert len(hierarchy.cgroup(f"{group.path}/{dead}").processes(subtree=True)) == 2
    (report,) = collect(hierarchy, group.path)
    assert report == Collected(f"{group.path}/{dead}", "removed")
    # Trees of living owners and all other cgroups are unchanged.
    assert instance.work.exists()
    assert set(group.children()) == {instance.path.rpartition("/")[2], *(c.name for c in foreign)}
    assert collect(hierarchy, group.path) == []


def test_work_of_a_dead_owner_is_killed_before_it_runs_again(
    hierarchy: Hierarchy, instance: Instance, group: Cgroup
) -> None:
    killed_owner(group.path, False)
    (dead,) = set(group.children()) - {instance.path.rpartition("/")[2]}
    work = hierarchy.cgroup(f"{group.path}/{dead}/work")
    assert work.processes(subtree=True)
    instance.end_orphans()
    assert not work.processes(subtree=True)
    assert collect(hierarchy, group.path) == [Collected(f"{group.path}/{dead}", "removed")]


def test_a_dead_owners_own_processes_are_never_killed(hierarchy: Hierarchy, group: Cgroup) -> None:
    killed_owner(group.path, True)
    (name,) = group.children()
    host = hierarchy.cgroup(f"{group.path}/{name}/host")
    begin = time.monotonic()
    (report,) = collect(hierarchy, group.path)
    assert 0.9 < time.monotonic() - begin < 4
    (survivor,) = host.processes()
    assert report == Collected(f"{group.path}/{name}", "host_runs", (survivor,))
    assert hierarchy.cgroup(f"{group.path}/{name}").children() == ["host"]
    os.kill(survivor, signal.SIGKILL)
    eventually(lambda: not host.processes())
    assert collect(hierarchy, group.path) == [Collected(f"{group.path}/{name}", "removed")]
    assert group.children() == []


def test_the_next_start_removes_the_tree(hierarchy: Hierarchy, group: Cgroup) -> None:
    killed_owner(group.path, False)
    (dead,) = group.children()
    instance = Instance.create(hierarchy, base=group.path)
    assert dead not in group.children()
    assert instance.close()


def test_a_pid_reused_by_another_process(hierarchy: Hierarchy, group: Cgroup) -> None:
    """A process with the pid exists, but it started at another time, so the owner is dead."""
    taken_over = group.child(f"rcon-{os.getpid()}-1").create()
    assert collect(hierarchy, group.path) == [Collected(taken_over.path, "removed")]


def test_close_leaves_other_processes_alone(hierarchy: Hierarchy, group: Cgroup) -> None:
    instance = Instance.create(hierarchy, base=group.path)
    with running(instance.host, sleep_forever) as worker:
        begin = time.monotonic()
        assert instance.close() is False
        assert time.monotonic() - begin < 4
        assert instance.host.processes() == [worker.pid]
    instance = Instance.create(hierarchy, base=group.path)
    assert instance.close()
    hierarchy.cgroup(f"{group.path}").child(instance.path.rpartition("/")[2].removesuffix("-2")).delete()


def test_limits_of_a_confinement_that_another_worker_removes(instance: Instance) -> None:
    """The leaf is created before limits are set, so a process that enters it always has limits."""
    name = "pids.max"

    def take_away() -> None:
        while not stop.is_set():
            instance.policy_cgroup("a").delete()

    stop = threading.Event()
    thread = threading.Thread(target=take_away)
    thread.start()
    try:
        for number in range(60):
            leaf, together = instance.executor_cgroup("a", f"1-{number}"), instance.policy_cgroup("a")
            leaf.create()
            together.configure(Resources(pids_max=7))
            assert settings_of(together, name) == "7"
            leaf.delete()
    finally:
        stop.set()
        thread.join()


def test_a_base_that_others_remove_meanwhile_is_made_again(hierarchy: Hierarchy, group: Cgroup) -> None:
    """As a server does that ends while another starts."""
    base = group.child("base")
    over = threading.Event()
    began = time.monotonic()
    Instance.create(hierarchy, base=base.path).close()
    pause = time.monotonic() - began  # removed more often than it is made, no number of attempts would do

    def remove() -> None:
        while not over.wait(pause):
            for directory in base.directories:
                with contextlib.suppress(OSError):
                    Path(directory).rmdir()

    thread = threading.Thread(target=remove)
    thread.start()
    try:
        for _ in range(100):
            assert Instance.create(hierarchy, base=base.path).close()
    finally:
        over.set()
        thread.join()
