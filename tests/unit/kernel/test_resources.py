"""Limits as data, and their (file, value) pairs in both versions."""

from __future__ import annotations

import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rcon_plugins.errors import ControllerUnavailable
from rcon_plugins.kernel.cgroup import MAX, Device, IoMax, Resources, v1, v2
from rcon_plugins.kernel.cgroup.resources import format_list, parse_list

DISK = Device(254, 0)
EVERYTHING = Resources(
    cpu_quota=0.3,
    cpu_burst=0.02,
    cpu_weight=200,
    cpus="0-1",
    memory_max=64 << 20,
    swap_max=0,
    io={DISK: IoMax(rbps=10, wbps=5 << 20, riops=MAX)},
    pids_max=16,
)


def test_v2_pairs() -> None:
    assert v2.pairs(EVERYTHING) == [
        ("cpu.max", "30000 100000"),
        ("cpu.max.burst", "20000"),
        ("cpu.weight", "200"),
        ("cpuset.cpus", "0-1"),
        ("memory.max", "67108864"),
        ("memory.swap.max", "0"),
        ("pids.max", "16"),
        ("io.max", "254:0 rbps=10 wbps=5242880 riops=max"),
    ]


def test_v1_pairs() -> None:
    assert v1.pairs(EVERYTHING) == [
        ("cpu.cfs_period_us", "100000"),
        ("cpu.cfs_quota_us", "30000"),
        ("cpu.cfs_burst_us", "20000"),
        ("cpu.shares", "2048"),
        ("cpuset.cpus", "0-1"),
        ("memory.limit_in_bytes", "67108864"),
        ("pids.max", "16"),
        ("memory.memsw.limit_in_bytes", "67108864"),
        ("blkio.throttle.read_bps_device", "254:0 10"),
        ("blkio.throttle.write_bps_device", "254:0 5242880"),
        ("blkio.throttle.read_iops_device", "254:0 0"),
    ]


def test_not_set_writes_nothing() -> None:
    assert v2.pairs(Resources()) == v1.pairs(Resources()) == []
    assert Resources().controllers() == frozenset()
    assert v2.pairs(Resources(io={DISK: IoMax()})) == []


def test_no_limit() -> None:
    unlimited = Resources(
        cpu_quota=MAX, memory_max=MAX, swap_max=MAX, pids_max=MAX, io={DISK: IoMax(wbps=MAX)}
    )
    assert v2.pairs(unlimited) == [
        ("cpu.max", "max 100000"),
        ("memory.max", "max"),
        ("memory.swap.max", "max"),
        ("pids.max", "max"),
        ("io.max", "254:0 wbps=max"),
    ]
    assert v1.pairs(unlimited) == [
        ("cpu.cfs_period_us", "100000"),
        ("cpu.cfs_quota_us", "-1"),
        ("memory.limit_in_bytes", "-1"),
        ("pids.max", "max"),
        ("memory.memsw.limit_in_bytes", "-1"),
        ("blkio.throttle.write_bps_device", "254:0 0"),
    ]


def test_memory_high_comes_before_memory_max() -> None:
    assert v2.pairs(Resources(memory_high=1, memory_max=2, oom_group=True)) == [
        ("memory.high", "1"),
        ("memory.max", "2"),
        ("memory.oom.group", "1"),
    ]


def test_v1_counts_swap_together_with_memory() -> None:
    assert ("memory.memsw.limit_in_bytes", "30") in v1.pairs(Resources(memory_max=20, swap_max=10))
    assert ("memory.memsw.limit_in_bytes", "-1") in v1.pairs(Resources(memory_max=MAX, swap_max=10))


@pytest.mark.parametrize("resources", [Resources(memory_high=1), Resources(swap_max=1)])
def test_limits_that_v1_does_not_have(resources: Resources) -> None:
    with pytest.raises(ControllerUnavailable) as caught:
        v1.pairs(resources)
    assert caught.value.hint


@pytest.mark.parametrize(("weight", "shares"), [(1, 10), (100, 1024), (10_000, 102_400)])
def test_shares(weight: int, shares: int) -> None:
    assert v1.shares_of(weight) == shares


@pytest.mark.parametrize(
    "wrong",
    [
        {"cpu_quota": 0.0},
        {"cpu_quota": -1.0},
        {"cpu_quota": float("nan")},
        {"cpu_quota": 0.001},
        {"cpu_burst": -0.01},
        {"cpu_weight": 0},
        {"cpu_weight": 10_001},
        {"cpus": ""},
        {"cpus": "1-0"},
        {"cpus": "a"},
        {"cpus": "0,"},
        {"cpus": "0-\n1"},
        {"cpus": "99999"},
        {"cpus": "²"},
        {"memory_max": -1},
        {"memory_max": 2**63},
        {"pids_max": -5},
        {"io": {DISK: IoMax(wbps=0)}},
        {"files": {"cgroup.procs": "0"}},
        {"files": {"../memory.max": "0"}},
        {"files": {"memory/x.max": "0"}},
        {"files": {"tasks": "0"}},
        {"files": {"hugetlb.": "0"}},
        {"files": {".max": "0"}},
        {"files": {"hugetlb.2MB.max": ""}},
        {"files": {"hugetlb.2MB.max": 0}},
    ],
)
def test_values_that_no_kernel_accepts(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r".+"):
        Resources(**wrong)  # type: ignore[arg-type]


def test_controllers() -> None:
    assert EVERYTHING.controllers() == {"cpu", "cpuset", "memory", "io", "pids"}
    assert Resources(oom_group=True).controllers() == {"memory"}
    assert Resources(cpu_weight=1).controllers() == {"cpu"}
    assert Resources(files={"blkio.weight": "9", "hugetlb.2MB.max": "0"}).controllers() == {"io"}


def test_several_are_merged_and_the_first_decides() -> None:
    first = Resources(pids_max=3, io={DISK: IoMax(rbps=1)}, files={"misc.max": "x 1"})
    second = Resources(pids_max=9, cpus="0", io={DISK: IoMax(rbps=2, wbps=MAX)}, files={"misc.max": "x 2"})
    assert Resources.merged([first, second]) == Resources(
        pids_max=3, cpus="0", io={DISK: IoMax(rbps=1, wbps=MAX)}, files={"misc.max": "x 1"}
    )
    assert Resources.merged([]) == Resources()


def test_max_stays_one_object_when_pickled() -> None:
    assert pickle.loads(pickle.dumps(MAX)) is MAX
    assert str(MAX) == "max"
    assert pickle.loads(pickle.dumps(Resources(pids_max=MAX))) == Resources(pids_max=MAX)


@given(st.sets(st.integers(0, 200), min_size=1))
def test_lists_round_trip(numbers: set[int]) -> None:
    assert parse_list(format_list(numbers)) == numbers


def test_list_format() -> None:
    assert format_list({0, 1, 2, 5, 7, 8}) == "0-2,5,7-8"
    assert parse_list(" 0-2,5, 7-8\n") == {0, 1, 2, 5, 7, 8}
