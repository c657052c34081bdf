"""Seccomp: keep executor processes in their cgroups where Landlock does not, whatever their user."""

from __future__ import annotations

from rcon_plugins.hookspecs import hookimpl
from rcon_plugins.kernel import seccomp
from rcon_plugins.kernel.capability import CAP_SYS_ADMIN, Identity, raise_capability, set_no_new_privs
from rcon_plugins.settings.policy import Policy


@hookimpl(trylast=True)
def rcon_drop(policy: Policy, target: str, identity: Identity | None) -> None:
    """Refuse the process the system calls that start a child in another cgroup, or mount the cgroups anew.

    The process is in its own cgroup already. Do nothing if the kernel has no filters: the policy's `Verdict` has a
    caveat then. Do nothing in a thread, whose memory other threads can write. A command of another user shares the
    terminal of the caller, and must not type there.
    """
    if target == "thread" or not seccomp.is_available():
        return
    if policy.no_new_privs:
        set_no_new_privs()  # users other than root need it for a filter; source: seccomp(2)
    else:
        raise_capability(CAP_SYS_ADMIN)
    seccomp.forbid_leaving_cgroups()
    if target == "command" and identity is not None:
        seccomp.forbid_typing()
