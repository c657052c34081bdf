"""Judging a measured CPU quota on a machine that may have something else to do."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import pytest

PERIOD = 0.1  # seconds, of the kernel
#: Seconds to measure for, at least.
SHORTEST = 10.0 if "RCON_TEST_LONG" in os.environ else 3.0


def tolerance(quota: float) -> float:
    """One percentage point; above 50 %, five per cent of the quota."""
    return 0.01 if quota <= 0.5 else quota * 0.05


def window(*quotas: float) -> float:
    """Seconds to measure these quotas for.

    A measurement may begin at the start of a period and end just after that of another, and so have the use of one
    period more. That is at most 80 % of the tolerance: 3 s for 20 %, 6.25 s for 50 %.
    """
    return max(SHORTEST, *(PERIOD * quota / (0.8 * tolerance(quota)) for quota in quotas))


def judge(measure: Callable[[], Mapping[float, float] | Iterable[tuple[float, float]]]) -> None:
    """`measure` gives by quota the CPUs used, in one window. Use above it fails at once; below it is measured again.

    It gives pairs where several groups have the same quota. Measure together what leaves some CPU time idle.

    After three times too little is only forgiven where less than what was missing was idle: then it was not the quota
    that held it back.
    """
    for _ in range(3):
        began, idle = time.monotonic(), _idle_seconds()
        measured = measure()
        found = list(measured.items() if isinstance(measured, Mapping) else measured)
        left = (_idle_seconds() - idle) / (time.monotonic() - began)
        print([(quota, round(used, 4)) for quota, used in found], f"{left:.2f} CPUs idle")
        for quota, used in found:
            assert used <= quota + tolerance(quota), f"{used:.4f} CPUs under a quota of {quota}"
        missing = sum(max(0.0, quota - tolerance(quota) - used) for quota, used in found)
        if not missing:
            return
    if left >= missing:
        pytest.fail(f"too little, three times: {found}, and {left:.2f} CPUs were idle")


def quota_in_force() -> float | None:
    """The quota that the kernel's own files give the calling thread, in CPUs: that of the nearest cgroup with one."""
    for line in Path("/proc/thread-self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        mount = Path("/sys/fs/cgroup", controllers)
        for cgroup in (mount / path.lstrip("/"), *(mount / path.lstrip("/")).parents):
            for name in ("cpu.max", "cpu.cfs_quota_us"):
                text = (
                    cgroup.joinpath(name).read_text().split()[0] if cgroup.joinpath(name).exists() else "max"
                )
                if text not in ("max", "-1"):
                    return int(text) / 100_000
    return None


def _idle_seconds() -> float:
    """CPU seconds that nobody used, since boot (proc(5), stat), of CPUs to which the scheduler moves tasks."""
    isolated = Path("/sys/devices/system/cpu/isolated").read_text()  # one at most: tests/vm.py
    _, *lines = Path("/proc/stat").read_text().splitlines()
    counted = [line.split() for line in lines if line.startswith("cpu")]
    ticks = sum(
        int(idle) + int(waiting)
        for name, _, _, _, idle, waiting, *_ in counted
        if name != f"cpu{isolated.strip()}"
    )
    return ticks / os.sysconf("SC_CLK_TCK")
