"""mountinfo and /proc/PID/cgroup, captured on real machines."""

from __future__ import annotations

from pathlib import Path

import pytest

from rcon_plugins.errors import ControllerUnavailable
from rcon_plugins.kernel.cgroup import Hierarchy, Resources, swap
from rcon_plugins.kernel.cgroup.mounts import (
    Mount,
    cgroup_mounts,
    membership,
    parse_membership,
    parse_mountinfo,
)

HYBRID = """\
31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
32 31 0:29 / /sys/fs/cgroup/cpu rw,relatime - cgroup cgroup rw,cpu
33 31 0:30 / /sys/fs/cgroup/cpuacct rw,relatime - cgroup cgroup rw,cpuacct
35 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory
38 31 0:35 / /sys/fs/cgroup/blkio rw,relatime - cgroup cgroup rw,blkio
37 31 0:34 / /sys/fs/cgroup/freezer rw,relatime - cgroup cgroup rw,freezer
40 31 0:37 / /sys/fs/cgroup/systemd rw,relatime - cgroup cgroup rw,name=systemd
41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw
"""
CO_MOUNTED = """\
30 24 0:26 / /sys/fs/cgroup ro,nosuid,nodev,noexec shared:9 - tmpfs tmpfs ro,mode=755
34 30 0:30 / /sys/fs/cgroup/cpu,cpuacct rw,nosuid,nodev,noexec,relatime shared:15 - cgroup cgroup rw,cpu,cpuacct
36 30 0:32 / /sys/fs/cgroup/pids rw,nosuid,nodev,noexec,relatime shared:17 - cgroup cgroup rw,pids
37 30 0:33 / /sys/fs/cgroup/freezer rw,nosuid,nodev,noexec,relatime shared:18 - cgroup cgroup rw,freezer
"""
CONTAINER = """\
1085 1084 0:26 /docker/4fa2 /sys/fs/cgroup/memory ro,nosuid master:19 - cgroup cgroup rw,memory
1090 1084 8:1 /a\\040b /mnt/with\\040space rw - ext4 /dev/sda1 rw
"""
UNIFIED = (
    "25 30 0:23 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate,memory_recursiveprot\n"
)


def test_a_hybrid() -> None:
    found = cgroup_mounts(parse_mountinfo(HYBRID))
    assert [mount.path.rpartition("/")[2] for mount in found] == [
        "cpu", "cpuacct", "blkio", "memory", "freezer", "unified",
    ]  # fmt: skip
    hierarchy = Hierarchy.of(found)
    assert hierarchy.layout == "hybrid"
    assert hierarchy.controllers == {"cpu", "memory", "io"}
    # The v2 side freezes and kills; the freezer is not needed.
    assert [d.rpartition("/x")[0] for d in hierarchy.cgroup("/x").directories] == [
        f"/sys/fs/cgroup/{name}" for name in ("cpu", "cpuacct", "blkio", "memory", "unified")
    ]


def test_co_mounted_controllers_are_one_directory() -> None:
    hierarchy = Hierarchy.of(cgroup_mounts(parse_mountinfo(CO_MOUNTED)))
    assert hierarchy.layout == "v1"
    assert hierarchy.cgroup("/x").directories == [
        "/sys/fs/cgroup/cpu,cpuacct/x",
        "/sys/fs/cgroup/pids/x",
        "/sys/fs/cgroup/freezer/x",
    ]
    threaded = hierarchy.cgroup("/x")
    threaded.become_threaded()
    assert threaded.directories == ["/sys/fs/cgroup/cpu,cpuacct/x", "/sys/fs/cgroup/pids/x"]


def test_v2() -> None:
    (mount,) = cgroup_mounts(parse_mountinfo(UNIFIED))
    assert (mount.version, mount.path, mount.read_only) == (2, "/sys/fs/cgroup", False)


def test_v2_with_only_systemds_own_v1_hierarchy_is_v2() -> None:
    found = cgroup_mounts(parse_mountinfo(UNIFIED + HYBRID.splitlines()[6] + "\n"))
    assert Hierarchy.of(found).layout == "v2"


def test_a_container() -> None:
    entries = parse_mountinfo(CONTAINER)
    assert entries[1].path == "/mnt/with space"
    assert entries[1].root == "/a b"
    (mount,) = cgroup_mounts(entries)
    assert mount.read_only
    assert membership(mount, parse_membership("4:memory:/docker/4fa2/in\n")) == "/in"
    assert membership(mount, parse_membership("4:memory:/docker/4fa2\n")) == "/"
    assert membership(mount, parse_membership("4:memory:/docker/4fa2b\n")) is None
    (refusal,) = Hierarchy.of([mount]).refusals(Resources(memory_max=1))
    assert "read-only" in refusal.reason
    assert "podman run --cgroupns=private --security-opt unmask=/sys/fs/cgroup" in refusal.remedy


def test_the_widest_writable_mount_wins() -> None:
    text = CONTAINER + "1 1 0:26 / /cg rw - cgroup cgroup rw,memory\n"
    assert [mount.path for mount in cgroup_mounts(parse_mountinfo(text))] == ["/cg"]
    text = "1 1 0:26 / /ro ro - cgroup2 c rw\n" + UNIFIED + "1 1 0:26 / /ro2 ro - cgroup2 c rw\n"
    assert [mount.path for mount in cgroup_mounts(parse_mountinfo(text))] == ["/sys/fs/cgroup"]


def test_nothing_mounted() -> None:
    with pytest.raises(ControllerUnavailable, match="no cgroup file system"):
        Hierarchy.of([])


def test_membership() -> None:
    own = parse_membership("9:name=systemd:/\n4:memory:/a\n2:cpu,cpuacct:/b:c\n0::/d\n")
    assert membership(Mount(1, "/m", controllers=frozenset({"memory"})), own) == "/a"
    assert membership(Mount(1, "/c", controllers=frozenset({"cpu", "cpuacct"})), own) == "/b:c"
    assert membership(Mount(2, "/u"), own) == "/d"
    assert membership(Mount(1, "/p", controllers=frozenset({"pids"})), own) is None
    assert membership(Mount(2, "/u"), parse_membership("0::/../outside\n")) is None


V2 = Hierarchy.of([Mount(2, "/nowhere", controllers=frozenset({"cpu", "cpuset", "memory", "pids"}))])
V1 = Hierarchy.of(
    [Mount(1, f"/nowhere/{name}", controllers=frozenset({name})) for name in ("cpu", "memory", "blkio")]
)


@pytest.mark.parametrize(
    ("hierarchy", "resources", "threaded", "limits"),
    [
        (V2, Resources(cpu_quota=1, memory_max=1, pids_max=1), False, []),
        (V2, Resources(cpu_quota=1, memory_max=1, pids_max=1), True, ["memory_max"]),
        (V2, Resources(memory_high=1, memory_max=2), False, []),
        (V1, Resources(memory_high=1, memory_max=2), False, ["memory_high"]),
        (V1, Resources(memory_max=2), True, ["memory_max"]),
        (V1, Resources(pids_max=1, cpus="0", cpu_quota=1), False, ["cpus", "pids_max"]),
        (V1, Resources(swap_max=1), False, ["swap_max"]),
        (V2, Resources(cpus="60000"), False, ["cpus"]),
        (V2, Resources(), True, []),
    ],
)  # fmt: skip
def test_refusals(hierarchy: Hierarchy, resources: Resources, threaded: bool, limits: list[str]) -> None:
    refusals = hierarchy.refusals(resources, threaded=threaded)
    assert [refusal.limit for refusal in refusals] == limits
    assert all(refusal.reason and refusal.remedy for refusal in refusals)


@pytest.mark.parametrize(
    ("version", "limit", "accounts"),
    [
        (2, "memory.max", "memory.swap.max"),
        (1, "memory.limit_in_bytes", "memory.memsw.limit_in_bytes"),
    ],
)
def test_a_limit_of_memory_that_does_not_bound_swap(
    version: int, limit: str, accounts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hierarchy = Hierarchy.of([Mount(version, str(tmp_path), controllers=frozenset({"memory"}))])
    (tmp_path / limit).touch()
    monkeypatch.setattr(swap, "present", lambda: False)
    assert hierarchy.swap_gap() is None
    monkeypatch.setattr(swap, "present", lambda: True)
    gap = hierarchy.swap_gap()
    assert gap is not None
    assert (gap.reason, gap.limit) == ("swap is not accounted for", "swap_max")
    (tmp_path / accounts).touch()
    assert hierarchy.swap_gap() is None


@pytest.mark.parametrize(
    ("version", "quota", "burst"),
    [(2, "cpu.max", "cpu.max.burst"), (1, "cpu.cfs_quota_us", "cpu.cfs_burst_us")],
)
def test_a_kernel_without_cpu_burst_is_refused(tmp_path: Path, version: int, quota: str, burst: str) -> None:
    hierarchy = Hierarchy.of([Mount(version, str(tmp_path), controllers=frozenset({"cpu"}))])
    (tmp_path / "system.slice").mkdir()
    (tmp_path / "system.slice" / quota).touch()
    resources = Resources(cpu_quota=0.3, cpu_burst=0.02)
    (refusal,) = hierarchy.refusals(resources)
    assert refusal == (
        "cpu_burst",
        "this kernel has no CPU burst",
        "leave cpu_burst out, or boot Linux 5.14 or newer",
    )
    assert hierarchy.refusals(resources.replaced(cpu_burst=0.0)) == []
    (tmp_path / "system.slice" / burst).touch()
    assert hierarchy.refusals(resources) == []


@pytest.mark.parametrize("version", [1, 2])
def test_a_missing_file_of_a_controller_is_refused(tmp_path: Path, version: int) -> None:
    hierarchy = Hierarchy.of([Mount(version, str(tmp_path), controllers=frozenset({"cpu", "hugetlb"}))])
    child = tmp_path / "system.slice"
    child.mkdir()
    (child / "cgroup.controllers").write_text("cpu hugetlb")
    resources = Resources(files={"cpu.idle": "1"})
    (refusal,) = hierarchy.refusals(resources)
    assert (refusal.limit, refusal.reason) == ("files.cpu.idle", f"there is no {child}/cpu.idle")
    (child / "cpu.idle").touch()
    assert hierarchy.refusals(resources) == []
    huge = Resources(files={"hugetlb.2MB.max": "0"})
    (child / "hugetlb.2MB.max").touch()
    assert bool(hierarchy.refusals(huge)) == (version == 1)
    assert hierarchy.refusals(huge, threaded=True)
