"""What a server must hold so that its work can become other users, and how it keeps that when it becomes one itself.

All of it acts on the calling thread; call it while the process has no other. A server that was started as root and
becomes, say, www-data would lose all capabilities with the change (capabilities(7)). It keeps those that its policies
need, permitted but not effective: only a thread or process that is about to drop raises them.
"""

from __future__ import annotations

from collections.abc import Iterable

from rcon_plugins.identity.resolution import kept_capabilities
from rcon_plugins.kernel.capability import (
    CAP_SETGID,
    CAP_SETPCAP,
    CAP_SETUID,
    SECBIT_KEEP_CAPS,
    SECBIT_NOROOT,
    SECBIT_NOROOT_LOCKED,
    Capabilities,
    drop_bounding,
    read_state,
    set_capabilities,
    set_keep_capabilities,
    set_securebits,
)
from rcon_plugins.kernel.cgroup import Refusal
from rcon_plugins.settings.policy import Policy

_TO_CHANGE_BITS = Capabilities.of(CAP_SETPCAP)
_TO_BECOME_OTHERS = Capabilities.of(CAP_SETUID, CAP_SETGID, CAP_SETPCAP)


def needed(policies: Iterable[Policy]) -> Capabilities:
    """What the server must hold: to become other users, and to leave work the capabilities that policies grant."""
    found = Capabilities.none()
    for policy in policies:
        found |= kept_capabilities(policy)
        if policy.user is not None:
            found |= _TO_BECOME_OTHERS
    return found


def keep(wanted: Capabilities) -> None:
    """Before the process becomes another user: give up all but ``wanted`` and what the change takes, and keep that.

    Does nothing where nothing is wanted. Raises `CapabilityError`.
    """
    if not wanted:
        return
    held = read_state().permitted & (wanted | _TO_BECOME_OTHERS)
    set_capabilities(held, held, Capabilities.none())
    set_keep_capabilities(True)


def settle(wanted: Capabilities) -> None:
    """After the change: hold ``wanted`` and no more, and none of it effective. Raises `CapabilityError`.

    Nor can it be more again: the bounding set has no more either, and a program that is executed as uid 0, as who may
    become anybody may do, is given nothing for that (SECBIT_NOROOT, locked).
    """
    if not wanted:
        return
    set_keep_capabilities(False)
    state = read_state()
    if CAP_SETPCAP in state.permitted:
        set_capabilities(state.permitted, state.effective | _TO_CHANGE_BITS, Capabilities.none())
        drop_bounding(wanted)
        set_securebits((state.securebits or 0) & ~SECBIT_KEEP_CAPS | SECBIT_NOROOT | SECBIT_NOROOT_LOCKED)
    set_capabilities(state.permitted & wanted, Capabilities.none(), Capabilities.none())


def refusals(policy: Policy) -> list[Refusal]:
    """What of a policy's identity this process cannot give, holding what it holds."""
    held = read_state().permitted
    found = []
    lacking = Capabilities.of(CAP_SETUID, CAP_SETGID) - held
    if policy.user is not None and lacking:
        found.append(
            Refusal(
                "user",
                f"this process may not become another user: it lacks {lacking}",
                "start the server as root (it may become another user itself), or give it "
                "CAP_SETUID, CAP_SETGID and CAP_SETPCAP (systemd: AmbientCapabilities=)",
            )
        )
    lacking = kept_capabilities(policy) - held
    if lacking:
        found.append(
            Refusal(
                "capabilities", f"this process lacks {lacking} itself", "leave them out, or start it as root"
            )
        )
    return found
