"""Groups found in the real tree: everybody's, nested ones, with the limits that the kernel has."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from rcon_plugins.cli.groups import ls
from rcon_plugins.cli.top import samples, top
from rcon_plugins.errors import KernelError, UnknownGroup
from rcon_plugins.groups.find import Group, find_group, find_groups
from rcon_plugins.kernel.cgroup import MAX, Cgroup, Hierarchy, IoMax, Resources, device_of, read_limits
from rcon_plugins.kernel.files import gone
from rcon_plugins.tree.instance import Instance
from tests.kernel.cgroup.helpers import DISK, MIB, eventually, layout, running, sleep_forever, touch

pytestmark = pytest.mark.each_layout

NOBODY = 65534


def found_in(base: Cgroup) -> dict[str, Group]:
    """By path below the base."""
    return {
        group.cgroup.path.removeprefix(f"{base.path}/"): group
        for group in find_groups().groups
        if group.cgroup.path.startswith(f"{base.path}/")
    }


@pytest.mark.smoke
def test_groups_of_each_kind_and_nested_groups_are_found(
    hierarchy: Hierarchy, base: Cgroup, instance: Instance, own: str
) -> None:
    instance.policy_cgroup(f"{own}~a.example").create()
    leaf = instance.executor_cgroup(f"{own}-command", "main").create()
    taken = hierarchy.cgroup(f"{instance.path}/attached/{own}-taken").create()
    threaded = instance.threaded(f"{own}-web").create(threaded=True, controllers=frozenset({"cpu"}))
    within = Instance.create(hierarchy, base=instance.policy_cgroup(f"{own}-command").path)
    try:
        within.policy_cgroup(f"{own}-inner").create()
        name = instance.path.rpartition("/")[2]
        found = found_in(base)
        assert set(found) == {
            f"{name}/work/{own}~a.example",
            f"{name}/work/{own}-command",
            f"{name}/work/{own}-command/{name}/work/{own}-inner",
            f"{name}/attached/{own}-taken",
            f"{name}/host/{own}-web",
        }
        by_name = {group.name: group for group in found.values()}
        tenant = by_name[f"{own}~a.example"]
        assert (tenant.kind, tenant.policy, tenant.key, tenant.instance) == ("work", own, "a.example", name)
        assert tenant.owner.pid == os.getpid()
        assert tenant.owner.alive
        assert tenant.owner.uid == 0
        assert tenant.owner.command == " ".join(sys.orig_argv)
        assert {name: group.is_of_server() for name, group in by_name.items()} == {
            f"{own}~a.example": True,
            f"{own}-command": False,
            f"{own}-inner": True,
            f"{own}-taken": False,
            f"{own}-web": True,
        }
        # Two instances of one process have one name, where one is within the other: the path tells them apart.
        for group in found.values():
            assert find_group(group.label).cgroup.path == group.cgroup.path
    finally:
        assert within.close()
        for cgroup in (threaded, leaf, taken):
            cgroup.delete()


def test_processes_usage_and_pressure(instance: Instance, own: str) -> None:
    leaf = instance.executor_cgroup(f"{own}-a", "1-1").create()
    with running(leaf, _hold_memory) as child:
        group = find_group(f"{own}-a")
        eventually(lambda: (group.usage().memory_current or 0) > 20 * MIB)
        usage, statistics = group.usage(), group.statistics()
        assert usage.cpu_seconds
        assert usage.pids_current == 1
        assert (usage.memory_peak or 0) >= (usage.memory_current or 0) - MIB
        assert 20 * MIB < (statistics.memory_anon or 0) < 60 * MIB
        assert statistics.cpu_throttled == 0
        (process,) = group.processes()
        assert (process.pid, process.uid, process.threads) == (child.pid, 0, 1)
        assert (
            process.command == " ".join(Path(f"/proc/{os.getpid()}/cmdline").read_text().split("\0")).rstrip()
        )
        assert not group.is_frozen()
        group.cgroup.freeze()
        assert group.is_frozen()
        group.cgroup.thaw()
        assert not group.is_frozen()
        # Both kernels under test tell it, on a hybrid by its v2 side; a machine with v1 alone cannot.
        assert set(group.pressure()) == (set() if layout() == "v1" else {"cpu", "memory", "io"})
        sample = group.sample()
        assert (sample.id, sample.name) == (group.cgroup.path, f"{own}-a")
        assert sample.limits.pids_max is MAX


def _hold_memory() -> None:
    held = bytearray(24 * MIB)
    held[::4096] = b"x" * (len(held) // 4096)
    sleep_forever()


def test_limit_hits_in_leaves_are_those_of_the_group(instance: Instance, own: str) -> None:
    """Also where the kernel counts them in the cgroup of the process alone."""
    instance.policy_cgroup(f"{own}-a").create().configure(Resources(memory_max=32 * MIB, pids_max=3))
    leaf = instance.executor_cgroup(f"{own}-a", "main").create()
    group = find_group(f"{own}-a")
    with running(leaf, touch, 64 * MIB) as child:
        assert child.wait() == -signal.SIGKILL
    assert group.usage().oom_kills == 1
    with running(leaf, _fork_too_many):
        eventually(lambda: (group.usage().pids_limit_hits or 0) > 0)
        group.cgroup.kill()


def _fork_too_many() -> None:
    with contextlib.suppress(BlockingIOError):
        for _ in range(5):
            if os.fork() == 0:
                sleep_forever()
    sleep_forever()


def test_threads_of_the_server(instance: Instance, own: str) -> None:
    """A group of threads names the process that they belong to."""
    instance.adopt()
    cgroup = instance.threaded(f"{own}-web").create(threaded=True, controllers=frozenset({"cpu"}))
    cgroup.configure(Resources(cpu_quota=0.5))
    home = instance.exit({"cpu"})
    with cgroup.entrance({"cpu"}) as entrance, home:
        group = find_group(f"{own}-web")
        assert group.pids() == []
        entrance.enter()
        assert group.pids() == [os.getpid()]
        home.enter()
    assert group.limits().cpu_quota == 0.5
    assert group.limits().memory_max is None
    cgroup.delete()


EVERYTHING = {
    "cpu": Resources(cpu_quota=0.3, cpu_weight=50),
    "more than one": Resources(cpu_quota=1.5),
    "cpus": Resources(cpus="0"),
    "memory": Resources(memory_max=64 * MIB),
    "pids": Resources(pids_max=16),
    "io": Resources(io={device_of(str(DISK)): IoMax(wbps=5 * MIB, riops=100)}),
    "none again": Resources(cpu_quota=MAX, memory_max=MAX, pids_max=MAX),
}


@pytest.mark.parametrize("name", EVERYTHING)
def test_limits_are_read_back_from_the_kernel(instance: Instance, own: str, name: str) -> None:
    wanted = EVERYTHING[name]
    cgroup = instance.policy_cgroup(f"{own}-a").create()
    before = read_limits(cgroup)
    assert (before.cpu_quota, before.cpu_weight, before.cpus) == (MAX, 100, None)
    assert (before.memory_max, before.pids_max, before.io) == (MAX, MAX, {})
    cgroup.configure(wanted)
    after = read_limits(cgroup)
    for field in ("cpu_quota", "cpu_weight", "cpus", "memory_max", "pids_max"):
        asked = getattr(wanted, field)
        assert getattr(after, field) == (getattr(before, field) if asked is None else asked), field
    assert after.io == {
        device: IoMax(*(MAX if value is None else value for value in most))
        for device, most in wanted.io.items()
    }


@pytest.mark.layout("v2")
def test_memory_high_is_read_back(instance: Instance, own: str) -> None:
    cgroup = instance.policy_cgroup(f"{own}-a").create()
    cgroup.configure(Resources(memory_high=32 * MIB, memory_max=64 * MIB, oom_group=True))
    after = read_limits(cgroup)
    assert (after.memory_high, after.memory_max, after.oom_group) == (32 * MIB, 64 * MIB, True)


def test_a_group_that_was_removed_is_reported_as_gone(instance: Instance, own: str) -> None:
    cgroup = instance.policy_cgroup(f"{own}-a").create()
    group = find_group(f"{own}-a")
    cgroup.delete()
    with pytest.raises(KernelError) as caught:
        group.usage()
    assert gone(caught.value)
    assert group.pids() == []
    assert group.processes() == []
    with pytest.raises(UnknownGroup):
        find_group(f"{own}-a")


@pytest.mark.once
def test_a_dead_owner_is_recognised(hierarchy: Hierarchy, base: Cgroup, own: str) -> None:
    """And of a number that another process has now, nothing is said."""
    for name in (f"rcon-{os.getpid()}-1", "rcon-4194303-1"):
        hierarchy.cgroup(f"{base.path}/{name}/work/{own}").create()
    owners = {group.owner.pid: group.owner for group in found_in(base).values()}
    assert set(owners) == {os.getpid(), 4194303}
    assert {(one.alive, one.uid, one.command) for one in owners.values()} == {(False, None, None)}


def test_an_ordinary_user_sees_them_too(instance: Instance, own: str, in_child: Any) -> None:
    """All that the file system shows anybody; what is closed to them is named."""
    cgroup = instance.policy_cgroup(f"{own}-a").create()
    cgroup.configure(Resources(pids_max=5))
    closed = instance.policy_cgroup(f"{own}-b").create()
    for directory in closed.directories:
        Path(directory).chmod(0o700)

    def as_nobody() -> tuple[object, list[str], list[str], str]:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
        found = find_groups()
        mine = [group for group in found.groups if group.name == f"{own}-a"]
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            assert ls.ls(as_json=False) == 0
            assert top.top(samples.local, iterations=1, interval=0.1) == 0
        assert f"{own}-a  " in out.getvalue()
        return (
            mine[0].limits().pids_max,
            [group.name for group in found.groups],
            found.unreadable,
            err.getvalue(),
        )

    pids, names, unreadable, said = in_child(as_nobody)
    assert said.startswith("rcon: note: this user cannot read the cgroup /")
    assert "(run rcon ls as root)" in said
    assert pids == 5
    assert f"{own}-b" not in names
    assert any(f"{own}-b" in path for path in unreadable)
