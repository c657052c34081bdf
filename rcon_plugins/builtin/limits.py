"""Translate the limits of a policy into `Resources`, which name the kernel's limits."""

from __future__ import annotations

from typing import Any

from rcon_plugins.hookspecs import hookimpl
from rcon_plugins.kernel.cgroup import IoMax, Resources, device_of
from rcon_plugins.settings.limit_table import CGROUP_LIMITS, IO_LIMITS
from rcon_plugins.settings.limits import Limits
from rcon_plugins.settings.memory import Memory
from rcon_plugins.settings.policy import Policy


@hookimpl(trylast=True)
def rcon_resources(limits: Limits, policy: Policy) -> Resources:
    """Return the kernel limits of a policy, by the table of limits. A path under ``io`` means the disk that holds it.

    A memory limit that expands is set to its upper bound (see `rcon_plugins.confinement.expansion`). On v2 an OOM kill
    ends the executor process and everything it started, unless ``oom`` says otherwise; v1 has no such limit
    (see `rcon_plugins.executors.oom`).
    """
    is_limited = policy.memory is not None or limits.memory is not None
    kills_all = limits is policy.each and is_limited and policy.oom_group
    fields = {row.field: _value(getattr(limits, row.key)) for row in CGROUP_LIMITS}
    io = {
        device_of(device): IoMax(**{row.field: getattr(rates, row.key) for row in IO_LIMITS})
        for device, rates in limits.io.items()
    }
    return Resources(**fields, oom_group=kills_all, io=io)


def _value(value: Any) -> Any:
    return value.most if isinstance(value, Memory) else value
