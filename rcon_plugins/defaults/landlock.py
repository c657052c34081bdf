"""Landlock: a wall around an executor process that holds whatever its user, root too."""

from __future__ import annotations

from rcon_plugins.hookspecs import hookimpl
from rcon_plugins.kernel import landlock
from rcon_plugins.kernel.capability import set_no_new_privs
from rcon_plugins.kernel.cgroup import mount_points
from rcon_plugins.policy import Policy


@hookimpl(trylast=True)
def rcon_drop(policy: Policy, place: str) -> None:
    """Forbid a process to write below the cgroup mounts, and to reach into processes that are not its own.

    Work that keeps the server's user could otherwise write the files that bind it. Nothing where the kernel has no
    Landlock: the policy's `Verdict` has the caveat then. A thread shares all with its process, and gets none.
    """
    if place == "thread" or not landlock.abi():
        return
    if policy.no_new_privs:
        set_no_new_privs()  # which a user other than root needs for it; source: landlock(7)
    landlock.forbid_writing_below(mount_points(), signals=True)
