"""Controller memory: the most bytes, where the kernel begins to slow allocation down, and swap."""

from __future__ import annotations

from rcon_plugins.builtin import in_bytes
from rcon_plugins.hookspecs import hookimpl
from rcon_plugins.kernel.cgroup import Cgroup, Resources
from rcon_plugins.settings.limits import Limits
from rcon_plugins.settings.policy import Policy


@hookimpl
def rcon_configure_cgroup(cgroup: Cgroup, limits: Limits, policy: Policy) -> None:
    """Write the memory limits: of memory that expands, the most it grows to (see `rcon_plugins.confinement.expansion`).

    One executor process and what it started die together (v2 ``memory.oom.group``): half of a work is none.
    """
    dies_whole = limits is policy.each and (policy.memory is not None or limits.memory is not None)
    if dies_whole or any(limit is not None for limit in (limits.memory, limits.memory_high, limits.swap)):
        cgroup.configure(
            Resources(
                memory_max=in_bytes(limits.memory.most if limits.memory is not None else None),
                memory_high=in_bytes(limits.memory_high),
                swap_max=in_bytes(limits.swap),
                oom_group=dies_whole,
            )
        )
