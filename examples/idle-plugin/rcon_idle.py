"""A third-party plugin for rcon-plugins: policies whose requests or tasks run only while the CPUs are otherwise idle.

Install it beside rcon-plugins, name it in the settings, ``plugins = ["idle"]``, and name the policies in the
environment variable ``RCON_IDLE``, with commas between them: ``RCON_IDLE=reports,thumbnails``.

It sets ``cpu.idle`` (Linux 5.15, cgroup v1 and v2), a file of the kernel that rcon-plugins itself does not set. Any
other file of a controller can be set in the same way, as ``Resources(files={"hugetlb.2MB.max": "0"})``.
"""

from __future__ import annotations

import os

from rcon_plugins import Limits, Policy, Resources, hookimpl
from rcon_plugins.errors import SettingsError


@hookimpl
def rcon_resources(limits: Limits, policy: Policy) -> Resources | None:
    """Make the cgroup of an idle policy idle. The executor processes in it need no setting of their own."""
    if limits is policy.each or policy.name not in os.environ.get("RCON_IDLE", "").split(","):
        return None
    if policy.cpu_weight is not None:
        raise SettingsError(
            "an idle group has no weight",
            key=f"policy.{policy.name}.cpu_weight",
            value=policy.cpu_weight,
            hint="leave cpu_weight out, or remove the policy from RCON_IDLE",
        )
    return Resources(files={"cpu.idle": "1"})
