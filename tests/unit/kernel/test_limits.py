"""Limits are read back from the files of both versions."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from rcon_plugins.kernel.cgroup import MAX, Device, IoMax, Resources, v1, v2
from rcon_plugins.kernel.cgroup.v1 import weight_of

V2 = {
    "cpu.max": "30000 100000",
    "cpu.max.burst": "20000",
    "cpu.weight": "200",
    "cpuset.cpus": "0-1",
    "memory.max": "67108864",
    "memory.high": "max",
    "memory.swap.max": "0",
    "memory.oom.group": "1",
    "io.max": "254:0 rbps=10 wbps=5242880 riops=max wiops=max\n8:0 rbps=max wbps=max riops=7 wiops=max",
    "pids.max": "16",
}
V1 = {
    "cpu.cfs_period_us": "100000",
    "cpu.cfs_quota_us": "30000",
    "cpu.cfs_burst_us": "20000",
    "cpu.shares": "2048",
    "cpuset.cpus": "0-1",
    "memory.limit_in_bytes": "67108864",
    "memory.memsw.limit_in_bytes": "67108864",
    "blkio.throttle.read_bps_device": "254:0 10",
    "blkio.throttle.write_bps_device": "254:0 5242880",
    "blkio.throttle.read_iops_device": "8:0 7",
    "blkio.throttle.write_iops_device": "",
    "pids.max": "16",
}
IO = {
    Device(254, 0): IoMax(10, 5 << 20, MAX, MAX),
    Device(8, 0): IoMax(MAX, MAX, 7, MAX),
}
SAID = {
    "cpu_quota": 0.3,
    "cpu_burst": 0.02,
    "cpu_weight": 200,
    "cpus": "0-1",
    "memory_max": 64 << 20,
    "swap_max": 0,
    "pids_max": 16,
}


def test_v2_files_are_read() -> None:
    assert v2.limits_of(V2.get) == {**SAID, "memory_high": MAX, "oom_group": True, "io": IO}


def test_v1_files_are_read() -> None:
    assert v1.limits_of(V1.get) == {**SAID, "io": IO}


def test_no_limit() -> None:
    none = {
        "cpu.max": "max 100000",
        "cpu.weight": "100",
        "cpuset.cpus": "",
        "memory.max": "max",
        "memory.high": "max",
        "memory.swap.max": "max",
        "memory.oom.group": "0",
        "io.max": "",
        "pids.max": "max",
    }
    unlimited = {"cpu_quota": MAX, "cpu_weight": 100, "memory_max": MAX, "swap_max": MAX, "pids_max": MAX}
    assert v2.limits_of(none.get) == {**unlimited, "memory_high": MAX}
    none = {
        "cpu.cfs_quota_us": "-1",
        "cpu.shares": "1024",
        "memory.limit_in_bytes": "9223372036854771712",
        "memory.memsw.limit_in_bytes": "9223372036854771712",
        "pids.max": "max",
    }
    assert v1.limits_of(none.get) == unlimited
    assert v1.limits_of({**none, "memory.limit_in_bytes": "4096"}.get)["swap_max"] is MAX


def test_without_a_controller_nothing_is_read() -> None:
    assert v2.limits_of(lambda _: None) == v1.limits_of(lambda _: None) == {}
    assert "swap_max" not in v1.limits_of({"memory.limit_in_bytes": "4096"}.get)


def test_periods_that_others_chose() -> None:
    assert v2.limits_of({"cpu.max": "50000 1000000"}.get) == {"cpu_quota": 0.05}
    assert v1.limits_of({"cpu.cfs_quota_us": "500000", "cpu.cfs_period_us": "250000"}.get) == {
        "cpu_quota": 2.0
    }
    # So little cannot be asked for here, nor be written back.
    assert Resources(**v2.limits_of({"cpu.max": "1000 1000000"}.get)).cpu_quota == 0.01


@given(st.integers(1, 10_000))
def test_weights_round_trip(weight: int) -> None:
    assert weight_of(v1.shares_of(weight)) == weight


counts = st.one_of(st.integers(1 << 12, 1 << 50).map(lambda number: number & ~4095), st.just(MAX))
limits = st.builds(
    lambda **given: Resources(**given),  # of a named tuple all fields would be made up
    cpu_quota=st.one_of(st.integers(1000, 10_000_000).map(lambda micros: micros / 100_000), st.just(MAX)),
    cpu_weight=st.integers(1, 10_000),
    cpus=st.sampled_from(["0", "0-1", "1,3-5"]),
    memory_max=counts,
    swap_max=st.one_of(st.just(0), counts),
    pids_max=st.one_of(st.integers(0, 1 << 22), st.just(MAX)),
)


@given(limits)
def test_written_limits_are_read_back(resources: Resources) -> None:
    """With a kernel that returns what was written, for both versions."""
    assert Resources(**v2.limits_of(dict(v2.pairs(resources)).get)) == resources
    told = {name: value if value != "-1" else str(2**63 - 4096) for name, value in v1.pairs(resources)}
    told["cpu.cfs_quota_us"] = dict(v1.pairs(resources))["cpu.cfs_quota_us"]
    back = Resources(**v1.limits_of(told.get))
    assert back.cpu_quota == resources.cpu_quota
    assert (back.memory_max, back.pids_max, back.cpus) == (
        resources.memory_max,
        resources.pids_max,
        resources.cpus,
    )
    if resources.memory_max is not MAX:
        assert back.swap_max == resources.swap_max
