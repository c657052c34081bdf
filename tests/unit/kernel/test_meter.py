"""Reading the kernel's text: captured from Linux 6.18 (v1) and 6.1 (v2)."""

from __future__ import annotations

from pathlib import Path

import pytest

from rcon_plugins.errors import KernelError
from rcon_plugins.kernel.cgroup import swap
from rcon_plugins.kernel.cgroup.meter import (
    V1_FILES,
    V2_FILES,
    Meter,
    Parser,
    Reading,
    blkio_totals,
    io_stat_totals,
    value_of,
)

V2 = {
    "cpu.stat": b"usage_usec 317488\nuser_usec 300000\nsystem_usec 17488\nnr_periods 10\nnr_throttled 9\n"
    b"throttled_usec 812345\nnr_bursts 0\nburst_usec 0\n",
    "memory.current": b"10928128\n",
    "memory.peak": b"10940416\n",
    "memory.swap.peak": b"5242880\n",
    "memory.swap.current": b"1048576\n",
    "memory.events": b"low 0\nhigh 3\nmax 17\noom 2\noom_kill 1\noom_group_kill 4\n",
    "io.stat": b"254:0 rbytes=4096 wbytes=20971520 rios=1 wios=80 dbytes=0 dios=0\n"
    b"7:0 rbytes=512 wbytes=0 rios=1 wios=0 dbytes=0 dios=0\n",
    "pids.current": b"3\n",
    "pids.events": b"max 12\n",
}
V1 = {
    "cpuacct.usage": b"317488144\n",
    "memory.usage_in_bytes": b"10928128\n",
    "memory.max_usage_in_bytes": b"10940416\n",
    "memory.memsw.max_usage_in_bytes": b"16183296\n",  # 5 MiB more
    "memory.oom_control": b"oom_kill_disable 0\nunder_oom 0\noom_kill 1\n",
    "memory.failcnt": b"5\n",
    "memory.memsw.failcnt": b"12\n",
    "blkio.throttle.io_service_bytes_recursive": b"254:0 Read 4608\n254:0 Write 20971520\n254:0 Sync 20971520\n"
    b"254:0 Async 4608\n254:0 Discard 0\n254:0 Total 20976128\nTotal 20976128\n",
    "pids.current": b"3\n",
    "pids.events": b"max 12\n",
}


def write(directory: Path, contents: dict[str, bytes]) -> None:
    for name, data in contents.items():
        (directory / name).write_bytes(data)


@pytest.mark.parametrize(("contents", "table"), [(V2, V2_FILES), (V1, V1_FILES)])
def test_everything_is_read(
    tmp_path: Path,
    contents: dict[str, bytes],
    table: dict[str, tuple[str, Parser]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(swap, "CHARGED_AHEAD", 0)
    write(tmp_path, contents)
    with Meter([(str(tmp_path), name, parser) for name, (_, parser) in table.items()]) as meter:
        reading = meter.read()
        assert reading == meter.read()
    assert reading.cpu_seconds == pytest.approx(0.317488, abs=1e-6)
    assert reading == Reading(
        cpu_seconds=reading.cpu_seconds,
        memory_current=10928128,
        memory_peak=10940416,
        swap_peak=5242880,
        io_read_bytes=4608,
        io_write_bytes=20971520,
        pids_current=3,
        oom_kills=1,
        memory_limit_hits=17,
        pids_limit_hits=12,
    )


def test_a_missing_value_is_none_and_not_zero(tmp_path: Path) -> None:
    write(tmp_path, {"pids.current": b"0\n", "memory.events": b"low 0\nhigh 0\n"})
    with Meter([(str(tmp_path), name, parser) for name, (_, parser) in V2_FILES.items()]) as meter:
        assert meter.read() == Reading(pids_current=0)
        assert meter.reset_peak() is False


@pytest.mark.parametrize(
    ("contents", "without_swap", "with_swap"),
    [
        ({"memory.swap.peak": b"0\n", "memory.swap.current": b"0\n"}, 0, 0),
        ({"memory.swap.current": b"0\n"}, 0, None),
        ({"memory.swap.current": b"8192\n"}, 8192, 8192),
        ({"memory.max_usage_in_bytes": b"4096\n", "memory.memsw.max_usage_in_bytes": b"4096\n"}, 0, None),
        # What one CPU has charged ahead is not swap.
        ({"memory.max_usage_in_bytes": b"4096\n", "memory.memsw.max_usage_in_bytes": b"266240\n"}, 0, None),
        ({"memory.max_usage_in_bytes": b"4096\n"}, None, None),
    ],
)
def test_no_swap_that_is_known_of_is_0_only_where_there_is_none(
    contents: dict[str, bytes],
    without_swap: int | None,
    with_swap: int | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write(tmp_path, contents)
    table = V1_FILES if "memory.max_usage_in_bytes" in contents else V2_FILES
    areas = tmp_path / "swaps"
    areas.write_text("Filename Type Size Used Priority\n")
    monkeypatch.setattr(swap, "AREAS", str(areas))
    with Meter([(str(tmp_path), name, parser) for name, (_, parser) in table.items()]) as meter:
        assert meter.read().swap_peak == without_swap
        with areas.open("a") as file:
            file.write("/swap file 131068 0 -2\n")
        assert meter.read().swap_peak == with_swap


def test_a_directory_that_is_gone_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(KernelError):
        Meter([(str(tmp_path / "gone"), "pids.current", V2_FILES["pids.current"][1])])


def test_closing_twice_is_harmless(tmp_path: Path) -> None:
    write(tmp_path, V2)
    before = len(list(Path("/proc/self/fd").iterdir()))
    meter = Meter([(str(tmp_path), name, parser) for name, (_, parser) in V2_FILES.items()])
    meter.close()
    meter.close()
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_keys_are_whole_words() -> None:
    assert value_of(b"oom 2\noom_kill 1\n", b"oom") == 2
    assert value_of(b"oom 2\noom_kill 1\n", b"oom_kill") == 1
    assert value_of(b"oom 2\noom_kill 1\n", b"kill") is None
    assert value_of(b"oom 2\noom_kill 1", b"oom_kill") == 1
    assert value_of(b"", b"max") is None


def test_io_without_any() -> None:
    assert io_stat_totals(b"") == (0, 0)
    # A device that has only been asked, as the kernel prints it.
    assert io_stat_totals(b"254:0 \n") == (0, 0)
    assert blkio_totals(b"Total 0\n") == (0, 0)
