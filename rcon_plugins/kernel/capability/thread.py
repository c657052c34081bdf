"""Set the identity and the capabilities of the calling thread **alone**.

The functions make the system calls themselves. The C library's functions of the same names, and with them
`os.setresuid` and the like, change every thread of the process.

Every error is a `CapabilityError` that names what the kernel requires (capabilities(7), capset(2), credentials(7),
prctl(2)). A call that fails changes nothing. The exceptions are `set_ambient` and `drop_bounding`, which make several
system calls.
"""

from __future__ import annotations

import ctypes
import errno
import struct
from collections.abc import Iterable
from typing import NoReturn

from rcon_plugins.errors import CapabilityError, KernelError
from rcon_plugins.kernel.capability.sets import CAP_SETGID, CAP_SETPCAP, CAP_SETUID, Capabilities
from rcon_plugins.kernel.capability.state import (
    SECBIT_KEEP_CAPS_LOCKED,
    SECBIT_NO_CAP_AMBIENT_RAISE,
    read_state,
)
from rcon_plugins.kernel.syscalls import (
    PR_CAP_AMBIENT,
    PR_CAP_AMBIENT_LOWER,
    PR_CAP_AMBIENT_RAISE,
    PR_CAPBSET_DROP,
    PR_GET_SECUREBITS,
    PR_SET_KEEPCAPS,
    PR_SET_NO_NEW_PRIVS,
    PR_SET_SECUREBITS,
    prctl,
    syscall,
)

#: struct __user_cap_header_struct (version, pid) and two of struct __user_cap_data_struct: capset(2).
_HEADER, _DATA = struct.Struct("Ii"), struct.Struct("6I")
_VERSION_3 = 0x20080522
_NO_ID = 0xFFFFFFFF  # -1: the kernel leaves the id as it is
_MOST_GROUPS = 65536
_LOCKS = 0xAA  # every second bit of securebits locks the one below it
_BITS = 0xFF


def set_capabilities(permitted: Capabilities, effective: Capabilities, inheritable: Capabilities) -> None:
    """Set the three sets of the calling thread: capset(2).

    The kernel allows a permitted set within the current one, and an effective set within the new permitted one. The
    inheritable set must be within the current inheritable and permitted sets together; with CAP_SETPCAP effective,
    within the current inheritable and bounding sets together. The ambient set loses the capabilities that are no longer
    both permitted and inheritable. Raises `CapabilityError`.
    """
    sets = (effective.mask, permitted.mask, inheritable.mask)
    data = _DATA.pack(*[mask & 0xFFFFFFFF for mask in sets], *[mask >> 32 for mask in sets])
    try:
        syscall("capset", _HEADER.pack(_VERSION_3, 0), data)
    except KernelError as error:
        _refuse_sets(error, permitted, effective, inheritable)


def raise_capability(number: int) -> None:
    """Make a capability effective for the calling thread if it is permitted. Otherwise do nothing.

    A server that changed its user holds its capabilities permitted, not effective. Raises `CapabilityError`.
    """
    now = read_state()
    if number in now.permitted and number not in now.effective:
        set_capabilities(now.permitted, now.effective | Capabilities.of(number), now.inheritable)


def set_ambient(capabilities: Capabilities) -> None:
    """Set the ambient set of the calling thread: the capabilities kept by execve(2) of an ordinary file (Linux 4.3).

    Each must be permitted and inheritable. Capabilities outside of ``capabilities`` are lowered first. Raises
    `CapabilityError`.
    """
    now = read_state().ambient
    for number in now - capabilities:
        _prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_LOWER, number)
    for number in capabilities - now:
        try:
            syscall("prctl", PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, number)
        except KernelError as error:
            _refuse_ambient(error, number)


def drop_bounding(keep: Capabilities, held: Capabilities | None = None) -> None:
    """Drop all but ``keep`` from the bounding set of the calling thread, irreversibly.

    ``held`` is the current bounding set; None reads it. Needs CAP_SETPCAP effective if there is anything to drop.
    Raises `CapabilityError`.
    """
    for number in (read_state().bounding if held is None else held) - keep:
        try:
            prctl(PR_CAPBSET_DROP, number)
        except KernelError as error:
            _refuse(
                error,
                f"cannot drop {Capabilities.of(number)} from the bounding set: cap_setpcap is not effective",
                "keep the bounding set, or drop from it in a parent process that holds cap_setpcap",
            )


def set_securebits(bits: int) -> None:
    """Set the securebits of the calling thread, as ``SECBIT_*`` flags: prctl(PR_SET_SECUREBITS).

    Needs CAP_SETPCAP effective. A locked flag cannot change. Raises `CapabilityError`.
    """
    try:
        syscall("prctl", PR_SET_SECUREBITS, bits)
    except KernelError as error:
        now = _prctl(PR_GET_SECUREBITS)
        locked = ((now & _LOCKS) >> 1 & (now ^ bits)) | (now & _LOCKS & ~bits)
        if locked:
            reason = (
                f"cannot change the securebits from {now:#x} to {bits:#x}: the kernel has locked some of them"
            )
            hint = "start from a process without these locks; a lock cannot be undone"
        elif bits & ~_BITS:
            reason, hint = f"{bits:#x} has unknown securebits", "capabilities(7) lists the securebits"
        elif CAP_SETPCAP not in read_state().effective:
            reason = "cannot set the securebits: cap_setpcap is not effective"
            hint = "raise cap_setpcap, or set the securebits in a parent process"
        else:  # SECBIT_EXEC_* (Linux 6.14) follow other rules
            reason, hint = f"the kernel refuses the securebits {bits:#x}", "see capabilities(7)"
        _refuse(error, reason, hint)


def set_keep_capabilities(on: bool) -> None:
    """Set whether the calling thread keeps its permitted set when the last of its uids leaves 0: PR_SET_KEEPCAPS.

    The kernel clears the effective set in either case. execve(2) switches the flag off. Raises `CapabilityError` if the
    flag is locked.
    """
    try:
        syscall("prctl", PR_SET_KEEPCAPS, int(on))
    except KernelError as error:
        locked = _prctl(PR_GET_SECUREBITS) & SECBIT_KEEP_CAPS_LOCKED
        _refuse(
            error,
            f"cannot switch PR_SET_KEEPCAPS {'on' if on else 'off'}"
            + (": SECBIT_KEEP_CAPS_LOCKED is set" if locked else ""),
            "start from a process without this lock; a lock cannot be undone",
        )


def set_no_new_privs() -> None:
    """Set no_new_privs irreversibly: no execve(2) of the calling thread or its children gains privileges.

    Raises `CapabilityError` before Linux 3.5.
    """
    try:
        syscall("prctl", PR_SET_NO_NEW_PRIVS, 1)
    except KernelError as error:
        _refuse(error, "cannot set no_new_privs", "boot Linux 3.5 or newer")


def set_uids(real: int, effective: int, saved: int) -> None:
    """Set the uids of the calling thread: setresuid(2). -1 leaves a uid as it is; the fs uid becomes the effective one.

    Without CAP_SETUID effective, each new uid must be one of the current three. When the last of the three leaves 0,
    the kernel clears all capabilities. When the effective uid leaves 0, it clears the effective set. Exceptions:
    `set_keep_capabilities`, SECBIT_NO_SETUID_FIXUP. Raises `CapabilityError`.
    """
    _set_ids("setresuid", "uids", "cap_setuid", CAP_SETUID, (real, effective, saved))


def set_gids(real: int, effective: int, saved: int) -> None:
    """Set the gids of the calling thread: setresgid(2). -1 leaves a gid as it is; the fs gid becomes the effective one.

    Without CAP_SETGID effective, each new gid must be one of the current three. Raises `CapabilityError`.
    """
    _set_ids("setresgid", "gids", "cap_setgid", CAP_SETGID, (real, effective, saved))


def set_groups(groups: Iterable[int]) -> None:
    """Set the supplementary groups of the calling thread: setgroups(2). Needs CAP_SETGID effective.

    Raises `CapabilityError`.
    """
    wanted = tuple(groups)
    for group in wanted:
        check_id(group, "setgroups", "group")
    if len(wanted) > _MOST_GROUPS:
        raise CapabilityError(
            f"{len(wanted)} supplementary groups are too many",
            errno=errno.EINVAL,
            path="setgroups",
            hint=f"set at most {_MOST_GROUPS}",
        )
    array = (ctypes.c_uint32 * len(wanted))(*wanted)
    try:
        syscall("setgroups", len(wanted), array)
    except KernelError as error:
        if error.errno == errno.EPERM and CAP_SETGID in read_state().effective:
            _refuse(
                error,
                "this user namespace forbids setgroups",
                "see /proc/PID/setgroups in user_namespaces(7)",
            )
        _refuse_ids(error, "supplementary groups", "cap_setgid", str(list(wanted)))


def _set_ids(call: str, what: str, name: str, capability: int, ids: tuple[int, int, int]) -> None:
    for number in ids:
        if number != -1:
            check_id(number, call, what.removesuffix("s"))
    try:
        syscall(call, *ids)
    except KernelError as error:
        if error.errno == errno.EPERM and capability in read_state().effective:
            _refuse(error, f"the kernel refuses the {what} {ids}", "check the rules of the security module")
        _refuse_ids(error, what, name, "(" + ", ".join("unchanged" if n == -1 else str(n) for n in ids) + ")")


def check_id(number: int, call: str, what: str) -> None:
    """Raise `CapabilityError` if ``number`` is not an id. -1 is not: the system calls would change nothing."""
    if not 0 <= number < _NO_ID:
        raise CapabilityError(
            f"{number} is not a {what}",
            errno=errno.EINVAL,
            path=call,
            hint=f"use a number from 0 to {_NO_ID - 1}",
        )


def _prctl(option: int, *arguments: int) -> int:
    """Call prctl with an option that needs no privilege."""
    try:
        return syscall("prctl", option, *arguments)
    except KernelError as error:
        _refuse(
            error,
            f"prctl({option}): {error.problem}",
            "capabilities(7) gives the first Linux version with it",
        )


def _refuse(error: KernelError, reason: str, hint: str) -> NoReturn:
    raise CapabilityError(reason, errno=error.errno or 0, path=error.path, hint=hint) from None


def _refuse_ids(error: KernelError, what: str, name: str, value: str) -> NoReturn:
    if error.errno == errno.EPERM:
        _refuse(
            error,
            f"cannot change the {what} to {value}: {name} is not effective in this thread",
            f"start as root, or with {name}",
        )
    if error.errno == errno.EINVAL:
        _refuse(
            error,
            f"cannot change the {what} to {value}: this user namespace has no such id",
            "/proc/self/uid_map and gid_map list the ids of the namespace",
        )
    _refuse(error, f"cannot change the {what} to {value}: {error.problem}", "try again")


def _refuse_sets(
    error: KernelError, permitted: Capabilities, effective: Capabilities, inheritable: Capabilities
) -> NoReturn:
    now = read_state()
    if above := permitted - now.permitted:
        reason = f"{above} cannot become permitted: this thread does not hold it"
        hint = "a dropped capability returns only with execve of a file that grants it"
    elif above := effective - permitted:
        reason = f"{above} cannot be effective without being permitted"
        hint = "add it to both sets"
    elif above := inheritable - now.inheritable - now.bounding:
        reason = f"{above} cannot become inheritable: it is not in the bounding set of this thread"
        hint = "start from a process with it in the bounding set"
    elif above := inheritable - now.inheritable - now.permitted:
        reason = f"{above} cannot become inheritable: it is not permitted, and cap_setpcap is not effective"
        hint = "make it permitted, or raise cap_setpcap"
    else:
        reason, hint = f"capset: {error.problem}", "check the rules of the security module"
    _refuse(error, reason, hint)


def _refuse_ambient(error: KernelError, number: int) -> NoReturn:
    now = read_state()
    name = Capabilities.of(number)
    if number not in now.permitted & now.inheritable:
        missing = "permitted" if number not in now.permitted else "inheritable"
        reason = f"{name} cannot become ambient: it is not {missing}"
        hint = "make it permitted and inheritable first"
    elif (now.securebits or 0) & SECBIT_NO_CAP_AMBIENT_RAISE:
        reason = f"{name} cannot become ambient: SECBIT_NO_CAP_AMBIENT_RAISE is set"
        hint = "clear that securebit; if it is locked, start from a process without it"
    else:
        reason, hint = f"{name} cannot become ambient: {error.problem}", "boot Linux 4.3 or newer"
    _refuse(error, reason, hint)
