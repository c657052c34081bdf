"""Change the identity of the calling thread and drop its capabilities, irreversibly."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from typing import NamedTuple

from rcon_plugins.errors import CapabilityError
from rcon_plugins.kernel.capability.sets import CAP_SETGID, CAP_SETPCAP, CAP_SETUID, Capabilities
from rcon_plugins.kernel.capability.state import (
    SECBIT_KEEP_CAPS,
    SECBIT_KEEP_CAPS_LOCKED,
    SECBIT_NO_CAP_AMBIENT_RAISE,
    SECBIT_NO_SETUID_FIXUP,
    Ids,
    State,
    read_securebits,
    read_state,
)
from rcon_plugins.kernel.capability.thread import (
    check_id,
    drop_bounding,
    set_ambient,
    set_capabilities,
    set_gids,
    set_groups,
    set_keep_capabilities,
    set_no_new_privs,
    set_uids,
)

_NEEDED = Capabilities.of(CAP_SETUID, CAP_SETGID, CAP_SETPCAP)


class Identity(NamedTuple):
    """The uid, the gid and the supplementary groups to switch to.

    ``uid`` and ``gid`` each set four ids of the thread: real, effective, saved and file system id.
    """

    uid: int
    gid: int
    groups: tuple[int, ...] = ()


def drop(
    identity: Identity | None,
    keep: Capabilities = Capabilities.none(),  # noqa: B008 - a constant: it is immutable
    *,
    no_new_privs: bool = True,
    ambient: bool = False,
) -> None:
    """Switch the calling thread alone to ``identity`` and drop all capabilities but ``keep``, irreversibly.

    Sets, reads back and compares:

    - All four uids, all four gids and the groups become those of ``identity``. With None they stay as they are; a saved
      uid of 0 stays, too.
    - The permitted and the effective set become ``keep``.
    - The inheritable and the ambient set become empty. With ``ambient`` they become ``keep``, which then survives
      execve(2).
    - The bounding set loses all but ``keep`` if CAP_SETPCAP is permitted. Without CAP_SETPCAP it stays as it is.
    - PR_SET_KEEPCAPS is switched off, unless it is locked.
    - no_new_privs is set, with the argument ``no_new_privs``.

    Nothing else changes: open files, directories and rlimits stay.

    Changing a uid needs CAP_SETUID, and changing a gid or the groups needs CAP_SETGID. Both must be permitted; they
    need not be effective. ``keep`` must be permitted.

    Raises `CapabilityError`. A missing capability is reported before anything changes. After any other error the thread
    may be changed in part, and must not continue.

    A thread does not contain malicious native code: that code shares the memory of threads that have not dropped.
    """
    before = read_state()
    _check(before, identity, keep, ambient)
    helping = before.permitted & _NEEDED
    if not helping <= before.effective:
        set_capabilities(before.permitted, before.effective | helping, before.inheritable)
    if identity is not None:
        if set(before.groups) != set(identity.groups):
            set_groups(identity.groups)
        if before.gids != Ids.all(identity.gid):
            set_gids(identity.gid, identity.gid, identity.gid)
    if CAP_SETPCAP in before.permitted:
        drop_bounding(keep, before.bounding)
    if identity is not None and before.uids != Ids.all(identity.uid):
        if _would_lose(before, identity, keep):
            set_keep_capabilities(True)
        set_uids(identity.uid, identity.uid, identity.uid)
    set_capabilities(keep, keep, keep if ambient else Capabilities.none())
    _forget_keeping()
    if ambient:
        set_ambient(keep)
    if no_new_privs:
        set_no_new_privs()
    after = read_state()
    wrong = list(_differences(before, after, identity, keep, no_new_privs, ambient))
    if wrong:
        raise CapabilityError(
            f"the thread still differs from the request: {'; '.join(wrong)}",
            errno=errno.EPERM,
            path="drop",
            hint="end the thread, and check the rules of the security module",
        )


def _check(now: State, identity: Identity | None, keep: Capabilities, ambient: bool) -> None:
    """Raise `CapabilityError` for a missing capability, before anything changes."""
    if missing := keep - now.permitted:
        raise CapabilityError(
            f"cannot keep {missing}: this thread does not hold it",
            errno=errno.EPERM,
            path="drop",
            hint="start as root, or with it in the permitted set",
        )
    if identity is not None:
        _check_identity(now, identity, keep)
    if not (ambient and keep):
        return
    if missing := keep - now.inheritable - now.bounding:
        raise CapabilityError(
            f"{missing} cannot become ambient: it is neither inheritable nor in the bounding set of this thread",
            errno=errno.EPERM,
            path="drop",
            hint="start from a process with it in the bounding set",
        )
    if (now.securebits or 0) & SECBIT_NO_CAP_AMBIENT_RAISE and not keep <= now.ambient:
        raise CapabilityError(
            f"{keep - now.ambient} cannot become ambient: SECBIT_NO_CAP_AMBIENT_RAISE is set",
            errno=errno.EPERM,
            path="drop",
            hint="clear that securebit; if it is locked, start from a process without it",
        )


def _check_identity(now: State, identity: Identity, keep: Capabilities) -> None:
    check_id(identity.uid, "drop", "uid")
    check_id(identity.gid, "drop", "gid")
    for group in identity.groups:
        check_id(group, "drop", "group")
    uids, gids = now.uids, now.gids
    missing = []
    if CAP_SETUID not in now.permitted and identity.uid not in uids[:3]:
        missing.append(f"cap_setuid, to change the uid from {uids.effective} to {identity.uid}")
    if CAP_SETGID not in now.permitted:
        if identity.gid not in gids[:3]:
            missing.append(f"cap_setgid, to change the gid from {gids.effective} to {identity.gid}")
        if set(now.groups) != set(identity.groups):
            missing.append(
                f"cap_setgid, to change the groups from {list(now.groups)} to {sorted(identity.groups)}"
            )
    if missing:
        raise CapabilityError(
            f"this thread lacks {' and '.join(missing)}",
            errno=errno.EPERM,
            path="drop",
            hint="start as root, or with cap_setuid and cap_setgid in the permitted set",
        )
    if _would_lose(now, identity, keep) and (now.securebits or 0) & SECBIT_KEEP_CAPS_LOCKED:
        raise CapabilityError(
            f"cannot keep {keep} when the uid leaves 0: SECBIT_KEEP_CAPS is off and locked",
            errno=errno.EPERM,
            path="drop",
            hint="start from a process without this lock; a lock cannot be undone",
        )


def _would_lose(now: State, identity: Identity, keep: Capabilities) -> bool:
    """Return whether the change of uid would clear the permitted set while ``keep`` needs it."""
    kept = (now.securebits or 0) & (SECBIT_KEEP_CAPS | SECBIT_NO_SETUID_FIXUP)
    return bool(keep) and not kept and 0 in now.uids[:3] and identity.uid != 0


def _forget_keeping() -> None:
    """Switch PR_SET_KEEPCAPS off, unless it is locked.

    A locked flag stays set. It acts only when a uid leaves 0.
    """
    securebits = read_securebits()
    if securebits & SECBIT_KEEP_CAPS and not securebits & SECBIT_KEEP_CAPS_LOCKED:
        set_keep_capabilities(False)


def _differences(
    before: State,
    after: State,
    identity: Identity | None,
    keep: Capabilities,
    no_new_privs: bool,
    ambient: bool,
) -> Iterator[str]:
    handed_down = keep if ambient else Capabilities.none()
    bounding = before.bounding & keep if CAP_SETPCAP in before.permitted else before.bounding
    expected: list[tuple[str, object, object]] = [
        ("permitted", after.permitted, keep),
        ("effective", after.effective, keep),
        ("inheritable", after.inheritable, handed_down),
        ("ambient", after.ambient, handed_down),
        ("bounding", after.bounding, bounding),
        ("no_new_privs", after.no_new_privs, no_new_privs or before.no_new_privs),
    ]
    if identity is None:
        expected += [("uids", after.uids, before.uids), ("gids", after.gids, before.gids)]
        expected += [("groups", after.groups, before.groups)]
    else:
        expected += [("uids", after.uids, Ids.all(identity.uid)), ("gids", after.gids, Ids.all(identity.gid))]
        expected += [("groups", tuple(sorted(set(after.groups))), tuple(sorted(set(identity.groups))))]
    for name, found, wanted in expected:
        if found != wanted:
            yield f"{name} is {found}, not {wanted}"
