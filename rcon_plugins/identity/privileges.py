"""The capabilities that a server needs to run work as other users. Keep them when the server changes its own user.

All functions act on the calling thread. Call them while the process has no other thread. A server that starts as root
and changes to www-data, for example, loses all capabilities with the change (capabilities(7)). These functions keep the
capabilities that its policies need: permitted but not effective. Only a thread or process that is about to drop
privileges raises them.
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
    """Return the capabilities that the server needs to change users, and to pass on those that policies grant."""
    found = Capabilities.none()
    for policy in policies:
        found |= kept_capabilities(policy)
        if policy.user is not None:
            found |= _TO_BECOME_OTHERS
    return found


def keep(wanted: Capabilities) -> None:
    """Drop all capabilities except ``wanted`` and those that a change of user needs, and keep them across the change.

    Call it before the process changes its user. Do nothing if ``wanted`` is empty. Raises `CapabilityError`.
    """
    if not wanted:
        return
    held = read_state().permitted & (wanted | _TO_BECOME_OTHERS)
    set_capabilities(held, held, Capabilities.none())
    set_keep_capabilities(True)


def settle(wanted: Capabilities) -> None:
    """Reduce the capabilities to ``wanted``, none of them effective. Call it after the change of user.

    The process cannot regain others: the bounding set is reduced too. CAP_SETUID allows it to execute a program as uid
    0, but the program gains nothing by that (SECBIT_NOROOT, locked). Raises `CapabilityError`.
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
    """Return a refusal for each key of a policy's identity that needs a capability this process lacks."""
    held = read_state().permitted
    found = []
    lacking = Capabilities.of(CAP_SETUID, CAP_SETGID) - held
    if policy.user is not None and lacking:
        found.append(
            Refusal(
                "user",
                f"this process cannot change its user: it lacks {lacking}",
                "start the server as root (it may change to another user itself), or give it "
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
