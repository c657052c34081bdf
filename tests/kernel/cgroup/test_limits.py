"""Limits: written, read back without the code under test, changed, refused."""

from __future__ import annotations

import errno
import os
import pickle
from pathlib import Path

import pytest

from rcon_plugins.errors import ControllerUnavailable, KernelError
from rcon_plugins.kernel.cgroup import (
    MAX,
    Cgroup,
    Device,
    Hierarchy,
    IoMax,
    Resources,
    device_of,
    read_limits,
)
from tests.kernel.cgroup.helpers import DISK, MIB, layout, running, settings_of, sleep_forever, touch

pytestmark = pytest.mark.each_layout


@pytest.mark.smoke
def test_every_controller_is_there(hierarchy: Hierarchy) -> None:
    assert hierarchy.controllers == {"cpu", "cpuset", "memory", "io", "pids"}
    assert hierarchy.layout == layout()


def test_create_twice_and_delete_twice(hierarchy: Hierarchy, group: Cgroup) -> None:
    leaf = hierarchy.cgroup(f"{group.path}/a/b/c")
    assert not leaf.exists()
    leaf.create()
    leaf.create()
    assert leaf.exists()
    assert group.children() == ["a"]
    assert leaf.delete()
    assert leaf.delete()
    assert group.child("a").children() == ["b"]
    assert group.child("a").delete()
    assert group.children() == []


EXPECTED = {
    "v2": [
        (Resources(cpu_quota=0.3), "cpu.max", "30000 100000"),
        (Resources(cpu_quota=MAX), "cpu.max", "max 100000"),
        (Resources(cpu_quota=0.3, cpu_burst=0.02), "cpu.max.burst", "20000"),
        (Resources(cpu_weight=321), "cpu.weight", "321"),
        (Resources(cpus="1"), "cpuset.cpus", "1"),
        (Resources(memory_max=32 * MIB), "memory.max", str(32 * MIB)),
        (Resources(memory_max=MAX), "memory.max", "max"),
        (Resources(memory_high=16 * MIB), "memory.high", str(16 * MIB)),
        (Resources(swap_max=0), "memory.swap.max", "0"),
        (Resources(oom_group=True), "memory.oom.group", "1"),
        (Resources(pids_max=16), "pids.max", "16"),
        (Resources(pids_max=MAX), "pids.max", "max"),
    ],
    "v1": [
        (Resources(cpu_quota=0.3), "cpu.cfs_quota_us", "30000"),
        (Resources(cpu_quota=MAX), "cpu.cfs_quota_us", "-1"),
        (Resources(cpu_quota=0.3, cpu_burst=0.02), "cpu.cfs_burst_us", "20000"),
        (Resources(cpu_weight=200), "cpu.shares", "2048"),
        (Resources(cpus="1"), "cpuset.cpus", "1"),
        (Resources(memory_max=32 * MIB), "memory.limit_in_bytes", str(32 * MIB)),
        (Resources(memory_max=32 * MIB, swap_max=MIB), "memory.memsw.limit_in_bytes", str(33 * MIB)),
        (Resources(pids_max=16), "pids.max", "16"),
        (Resources(pids_max=MAX), "pids.max", "max"),
    ],
}


@pytest.mark.parametrize(("number"), range(12))
def test_written_as_the_kernel_reads_it(group: Cgroup, number: int) -> None:
    cases = EXPECTED["v2" if layout() == "v2" else "v1"]
    resources, name, value = cases[number % len(cases)]
    group.configure(resources)
    group.configure(resources)
    assert settings_of(group, name) == value


def test_io(group: Cgroup) -> None:
    disk = device_of(str(DISK))
    assert not Path(f"/sys/dev/block/{disk}/partition").exists()
    group.configure(Resources(io={disk: IoMax(rbps=10 * MIB, wbps=5 * MIB, riops=100, wiops=50)}))
    group.configure(Resources(io={disk: IoMax(wbps=6 * MIB, riops=MAX)}))
    if layout() == "v2":
        assert settings_of(group, "io.max") == f"{disk} rbps={10 * MIB} wbps={6 * MIB} riops=max wiops=50"
    else:
        assert settings_of(group, "blkio.throttle.read_bps_device") == f"{disk} {10 * MIB}"
        assert settings_of(group, "blkio.throttle.write_bps_device") == f"{disk} {6 * MIB}"
        assert settings_of(group, "blkio.throttle.read_iops_device") == ""
        assert settings_of(group, "blkio.throttle.write_iops_device") == f"{disk} 50"


def test_cpu_quota_and_burst_raised_and_lowered(group: Cgroup) -> None:
    """The kernel refuses a burst above the quota; a lower quota takes the burst along."""
    for quota, burst in ((0.3, 0.03), (0.1, 0.01), (0.5, 0.02), (1.5, 0.15), (0.5, 0.0), (MAX, 0.0)):
        group.configure(Resources(cpu_quota=quota, cpu_burst=burst))
        assert (read_limits(group).cpu_quota, read_limits(group).cpu_burst) == (quota, burst)
    group.configure(Resources(cpu_quota=0.5, cpu_burst=0.05))
    group.configure(Resources(cpu_quota=0.2))
    assert read_limits(group).cpu_burst == 0.02
    with pytest.raises(KernelError) as caught:
        group.configure(Resources(cpu_burst=0.03))
    assert caught.value.errno == errno.EINVAL


def test_memory_and_swap_raised_and_lowered_together(group: Cgroup) -> None:
    for memory, swap in ((64, 8), (16, 0), (128, 64), (128, 0), (32, 96), (8, 8)):
        group.configure(Resources(memory_max=memory * MIB, swap_max=swap * MIB))
        if layout() == "v2":
            assert settings_of(group, "memory.max") == str(memory * MIB)
            assert settings_of(group, "memory.swap.max") == str(swap * MIB)
        else:
            assert settings_of(group, "memory.limit_in_bytes") == str(memory * MIB)
            assert settings_of(group, "memory.memsw.limit_in_bytes") == str((memory + swap) * MIB)
    group.configure(Resources(memory_max=MAX, swap_max=MAX))


def test_a_leaf_may_have_a_quota_above_that_of_its_group(group: Cgroup) -> None:
    leaf = group.child("leaf").create()
    group.configure(Resources(cpu_quota=0.5))
    leaf.configure(Resources(cpu_quota=0.8))
    group.configure(Resources(cpu_quota=0.2))
    name, value = ("cpu.max", "20000 100000") if layout() == "v2" else ("cpu.cfs_quota_us", "20000")
    assert settings_of(group, name) == value
    group.configure(Resources(cpu_quota=MAX))
    leaf.configure(Resources(cpu_quota=0.8))


def test_a_cpuset_is_narrowed_and_widened_around_its_children(group: Cgroup) -> None:
    same, narrow = group.child("same").create(), group.child("narrow").create()
    narrow.configure(Resources(cpus="1"))
    name = "cpuset.cpus.effective" if layout() == "v2" else "cpuset.cpus"
    with running(same, sleep_forever):
        group.configure(Resources(cpus="1"))
        assert settings_of(same, name) == "1"
        assert settings_of(narrow, name) == "1"
        group.configure(Resources(cpus="0-1"))
        assert settings_of(group, name) == "0-1"
        assert settings_of(narrow, name) == "1"
        group.configure(Resources(cpus="0"))
        assert settings_of(group, name) == "0"
        assert settings_of(same, name) == "0"
        assert settings_of(narrow, name) == "0"
        same.kill()


def test_cpus_that_do_not_exist_are_refused(hierarchy: Hierarchy, group: Cgroup) -> None:
    missing = Resources(cpus=str(os.cpu_count()))
    with pytest.raises(KernelError) as caught:
        group.configure(missing)
    assert caught.value.path is not None
    assert caught.value.path.endswith("cpuset.cpus")
    assert caught.value.hint
    (refusal,) = hierarchy.refusals(missing)
    assert refusal.limit == "cpus"
    assert "choose from" in refusal.remedy


def test_limits_below_the_usage(group: Cgroup) -> None:
    with running(group, sleep_forever):
        group.configure(Resources(pids_max=0))
        assert group.read().pids_current == 1
        group.kill()


def test_a_device_that_does_not_exist_is_refused(hierarchy: Hierarchy, group: Cgroup) -> None:
    nowhere = Resources(io={Device(4000, 1): IoMax(wbps=1)})
    with pytest.raises(KernelError) as caught:
        group.configure(nowhere)
    assert caught.value.errno == errno.ENODEV
    assert "4000:1" in str(caught.value)
    assert [refusal.limit for refusal in hierarchy.refusals(nowhere)] == ["io"]


def test_errors_have_path_value_and_remedy_and_pickle(group: Cgroup) -> None:
    group.delete()
    with pytest.raises(KernelError) as caught:
        group.configure(Resources(pids_max=7))
    again = pickle.loads(pickle.dumps(caught.value))
    assert caught.value.errno == errno.ENOENT
    for error in (caught.value, again):
        assert error.path is not None
        assert error.path.endswith("/pids.max")
        assert error.value == "7"
        assert "7" in str(error)
        assert error.hint


@pytest.mark.layout("v1", "hybrid")
def test_limits_that_v1_cannot_enforce_are_refused(hierarchy: Hierarchy, group: Cgroup) -> None:
    for resources, limit in (
        (Resources(memory_high=MIB), "memory_high"),
        (Resources(swap_max=MIB), "swap_max"),
    ):
        assert [refusal.limit for refusal in hierarchy.refusals(resources)] == [limit]
        with pytest.raises(ControllerUnavailable):
            group.configure(resources)
    disk = {device_of(str(DISK)): IoMax(wbps=MIB)}
    refused = hierarchy.refusals(Resources(io=disk), within=Resources(io=disk))
    assert [refusal.limit for refusal in refused] == ["io"]
    assert hierarchy.refusals(Resources(io=disk)) == []
    assert [refusal.limit for refusal in hierarchy.refusals(Resources(swap_max=0))] == ["swap_max"]
    assert hierarchy.refusals(Resources(memory_max=MIB, swap_max=0)) == []  # there is no swap on this machine


@pytest.mark.layout("v2")
def test_v2_can_enforce_all_limits(hierarchy: Hierarchy) -> None:
    disk = {device_of(str(DISK)): IoMax(wbps=MIB)}
    everything = Resources(
        cpu_quota=0.1,
        cpu_weight=1,
        cpus="0",
        memory_max=MIB,
        memory_high=MIB,
        swap_max=MIB,
        io=disk,
        pids_max=1,
    )
    assert hierarchy.refusals(everything, within=everything) == []


def test_a_partition_gives_its_disk(hierarchy: Hierarchy) -> None:
    for entry in Path("/sys/dev/block").iterdir():
        if (entry / "partition").exists():
            partition = Device(*map(int, entry.name.split(":")))
            disk = device_of(str(partition))
            assert disk != partition
            (refusal,) = hierarchy.refusals(Resources(io={partition: IoMax(wbps=1)}))
            assert str(disk) in refusal.remedy
            break
    else:
        # This machine has whole disks only: the path on one is its own.
        assert device_of(str(DISK)) == device_of(str(device_of(str(DISK))))


def test_a_path_without_a_device_is_refused() -> None:
    with pytest.raises(KernelError, match="no block device"):
        device_of("/proc")
    with pytest.raises(KernelError, match="No such file"):
        device_of("/does/not/exist")


def test_usage_is_accounted_without_any_limit(group: Cgroup) -> None:
    with running(group, touch, 8 * MIB) as child:
        child.result()
    reading = group.read()
    assert reading.cpu_seconds is not None
    assert reading.cpu_seconds > 0
    assert reading.memory_peak is None or reading.memory_peak >= 8 * MIB
    assert reading.pids_current == 0
    assert None not in (reading.memory_current, reading.io_read_bytes, reading.io_write_bytes)
    assert (reading.oom_kills, reading.memory_limit_hits, reading.pids_limit_hits) == (0, 0, 0)


@pytest.mark.layout("v2")
def test_cpus_that_the_group_above_does_not_have_are_refused(group: Cgroup) -> None:
    """v2 accepts the list and keeps the other CPUs in force: that would be no limit."""
    group.configure(Resources(cpus="0"))
    leaf = group.child("leaf").create()
    with pytest.raises(ControllerUnavailable, match="none of the CPUs"):
        leaf.configure(Resources(cpus="1"))


def test_a_group_without_the_controller_refuses_the_limit(hierarchy: Hierarchy, group: Cgroup) -> None:
    some = hierarchy.cgroup(f"{group.path}/some", controllers=frozenset({"pids"})).create()
    some.configure(Resources(pids_max=3))
    with pytest.raises(ControllerUnavailable, match="no cpu controller"):
        some.configure(Resources(cpu_quota=0.5))
    assert some.delete()
