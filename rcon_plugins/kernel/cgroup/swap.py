"""Swap: whether this machine has any, and how much a cgroup had where the kernel keeps no peak of it."""

from __future__ import annotations

import os

from rcon_plugins.kernel import files

#: The kernel charges up to 64 pages at once on each CPU, before it knows whether the limit allows them
#: (MEMCG_CHARGE_BATCH). A peak may be so much above what was used.
CHARGED_AHEAD = 64 * os.sysconf("SC_PAGE_SIZE") * (os.cpu_count() or 1)
#: One line for each swap area, below a heading: proc(5).
AREAS = "/proc/swaps"


def present() -> bool:
    """Return whether this machine uses any swap area."""
    return any_area(files.read(*os.path.split(AREAS)).encode())


def any_area(areas: bytes) -> bool:
    """Return whether the content of `AREAS` names a swap area."""
    return b"\n" in areas.rstrip()


def least_peak(memory_and_swap: int, memory: int) -> int:
    """Return how much swap a v1 cgroup had at least, from its peaks of memory and swap together and of memory alone.

    When both together were at their peak, memory was at most at its own.
    """
    return max(0, memory_and_swap - memory - CHARGED_AHEAD)
