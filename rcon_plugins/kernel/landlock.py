"""Restrict file access of the calling thread, and of everything it starts later, with Landlock (landlock(7)).

Landlock needs no privilege but no_new_privs. Each call adds a layer; no later layer allows what an earlier one forbids.
A layer holds for the calling thread and for the threads and processes that it starts later, also after execve(2). It
does not hold for threads that exist already. Open files stay open.

Any layer also forbids ptrace(2) of processes outside of it, whatever their uid and whatever capabilities the caller
has. With ptrace(2) it forbids ``/proc/PID/mem``, ``process_vm_writev`` and ``pidfd_getfd``. It also forbids mount(2)
and pivot_root(2).

ABI 1 is Linux 5.13, 2 is 5.19, 3 is 6.2, 5 is 6.10, 6 is 6.12. A kernel refuses rights that are newer than its ABI
(``linux/landlock.h``).
"""

from __future__ import annotations

import ctypes
import errno
import os
import posix
import stat
from collections.abc import Iterable, Iterator

from rcon_plugins.errors import CapabilityError, KernelError
from rcon_plugins.kernel.files import unanswered
from rcon_plugins.kernel.syscalls import syscall, unprivileged

_CREATE_RULESET_VERSION = 1
_RULE_PATH_BENEATH = 1

_EXECUTE = 1 << 0
_WRITE_FILE = 1 << 1
_READ_FILE = 1 << 2
_READ_DIR = 1 << 3
_REMOVE_DIR = 1 << 4
_REMOVE_FILE = 1 << 5
_MAKE_CHAR = 1 << 6
_MAKE_DIR = 1 << 7
_MAKE_REG = 1 << 8
_MAKE_SOCK = 1 << 9
_MAKE_FIFO = 1 << 10
_MAKE_BLOCK = 1 << 11
_MAKE_SYM = 1 << 12
_REFER = 1 << 13  # ABI 2
_TRUNCATE = 1 << 14  # ABI 3
_IOCTL_DEV = 1 << 15  # ABI 5
_SCOPE_SIGNAL = 1 << 1  # ABI 6, in the field `scoped`

_MAKE = _MAKE_CHAR | _MAKE_DIR | _MAKE_REG | _MAKE_SOCK | _MAKE_FIFO | _MAKE_BLOCK | _MAKE_SYM
_READ = _EXECUTE | _READ_FILE | _READ_DIR
_WRITE = _WRITE_FILE | _REMOVE_DIR | _REMOVE_FILE | _MAKE | _REFER | _TRUNCATE
# The rights that a rule on anything but a directory may name. The kernel refuses all others with EINVAL.
_OF_A_FILE = _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE | _IOCTL_DEV
_NEWER = ((2, _REFER), (3, _TRUNCATE), (5, _IOCTL_DEV))

_NONE_HERE = "Linux 5.13 or newer with CONFIG_SECURITY_LANDLOCK, and landlock in the boot parameter lsm="


class _RulesetAttr(ctypes.Structure):
    _fields_ = (
        ("handled_access_fs", ctypes.c_uint64),
        ("handled_access_net", ctypes.c_uint64),  # ABI 4
        ("scoped", ctypes.c_uint64),  # ABI 6
    )


class _PathBeneathAttr(ctypes.Structure):
    _pack_ = 1
    _layout_ = "ms"  # the layout that _pack_ implies; Python 3.14 requires it explicitly
    _fields_ = (("allowed_access", ctypes.c_uint64), ("parent_fd", ctypes.c_int32))


def abi() -> int:
    """Return the Landlock ABI of the running kernel; 0 if there is none, it is switched off, or a filter forbids it.

    Raises `KernelError` if the call fails for another reason, which says nothing about the kernel.
    """
    try:
        return syscall("landlock_create_ruleset", None, 0, _CREATE_RULESET_VERSION)
    except KernelError as error:
        if error.errno not in (
            errno.ENOSYS,
            errno.EOPNOTSUPP,
            errno.EPERM,
        ):  # EPERM: a container's seccomp filter
            raise
        return 0


def forbid_writing_below(paths: Iterable[str], *, signals: bool = False) -> None:
    """Forbid the calling thread irreversibly to change anything below ``paths``. Everything else stays as it is.

    The thread can no longer open a file to write, truncate (from ABI 3), make, remove, rename or link. A path may be a
    directory or a file; this follows links in it now. If a file system is mounted twice, name both mount points.

    The rules allow all that exists beside the paths, up to the root directory. In the directories that lead to a path,
    including ``/``, the thread can make or remove no name, and cannot write files that other processes make there
    later. On ABI 1 it can move or link nothing from one directory to another.

    ``signals``: the thread can then signal only itself and processes that it starts later. No effect before ABI 6.

    Raises `CapabilityError` if the kernel has no Landlock, if the thread has neither no_new_privs nor CAP_SYS_ADMIN, or
    if it has sixteen layers already. Raises `KernelError` if a path cannot be read. After an error nothing has changed.
    """
    wall = Wall(paths, signals=signals)
    try:
        wall.put_up()
    finally:
        wall.close()


class Wall:
    """The rules of `forbid_writing_below`, prepared in advance for any number of threads, including those of forks.

    The object keeps a file open. Close it before untrusted code runs, which could add rules for later users.
    """

    def __init__(self, paths: Iterable[str], *, signals: bool = False) -> None:
        """Prepare the rules. Raises as `forbid_writing_below`."""
        version = _need()
        handled = _known(_WRITE, version)
        scoped = _SCOPE_SIGNAL if signals and version >= 6 else 0
        self._handled = handled
        self._looked_into: dict[str, tuple[int, int]] = {}
        self._ruleset = _create(handled, scoped, version)
        try:
            forbidden = [_parts(path) for path in paths]
            for path in _beside("/", forbidden, self._looked_into):
                _allow_if_there(self._ruleset, path, handled)
        except BaseException:
            self.close()
            raise

    @property
    def is_current(self) -> bool:
        """Whether the directories that lead to the paths are unchanged. Later mounts are not detected."""
        return all(_state(path) == state for path, state in self._looked_into.items())

    def allow_beside(self, paths: Iterable[str]) -> None:
        """Allow what has been mounted at ``paths`` since, in directories that lead to a forbidden path.

        Elsewhere the rule of the directory holds for what is mounted in it. Raises `KernelError`.
        """
        for path in paths:
            if os.path.dirname(path) in self._looked_into:
                _allow(self._ruleset, path, self._handled)

    def put_up(self) -> None:
        """Apply the rules to the calling thread, irreversibly. Raises as `forbid_writing_below`."""
        _restrict_self(self._ruleset)

    def close(self) -> None:
        """Close the file; the rules stay in force. Calling it again does nothing."""
        ruleset, self._ruleset = self._ruleset, -1
        if ruleset >= 0:
            posix.close(ruleset)


def restrict(read: Iterable[str], write: Iterable[str]) -> None:
    """Allow the calling thread only to read and execute below ``read``, and everything below ``write``. Irreversible.

    The identity and the capabilities of the thread must allow the same. A path may be a directory or a file; this
    follows links in it now. Landlock does not forbid connecting to a socket, changing modes, owners and times, or
    testing whether a file exists. From ABI 5 it allows ioctl(2) on devices only below ``write``. On ABI 1 the thread
    can move or link nothing from one directory to another.

    Raises as `forbid_writing_below`.
    """
    version = _need()
    handled = _known(_READ | _WRITE | _IOCTL_DEV, version)
    ruleset = _create(handled, 0, version)
    try:
        for paths, access in ((read, _READ), (write, handled)):
            for path in paths:
                _allow(ruleset, path, access)
        _restrict_self(ruleset)
    finally:
        posix.close(ruleset)


def _need() -> int:
    version = abi()
    if version == 0:
        raise CapabilityError(
            "this kernel has no Landlock",
            errno=errno.EOPNOTSUPP,
            path="landlock_create_ruleset",
            hint=_NONE_HERE,
        )
    return version


def _known(access: int, version: int) -> int:
    for since, right in _NEWER:
        if version < since:
            access &= ~right
    return access


def _create(handled: int, scoped: int, version: int) -> int:
    attributes = _RulesetAttr(handled, 0, scoped)
    # An older kernel accepts a longer structure only if the rest of it is zero. This size is never too long.
    size = ctypes.sizeof(attributes) if version >= 6 else 8
    return syscall("landlock_create_ruleset", ctypes.byref(attributes), size, 0)


def _parts(path: str) -> tuple[str, ...]:
    try:
        real = os.path.realpath(path, strict=True)
    except OSError as error:
        raise KernelError.from_oserror(error, path=path) from None
    return tuple(part for part in real.split("/") if part)


def _state(directory: str) -> tuple[int, int] | None:
    try:
        status = os.lstat(directory)
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns


def _beside(
    directory: str, forbidden: list[tuple[str, ...]], looked_into: dict[str, tuple[int, int]]
) -> Iterator[str]:
    """Yield the paths in ``directory`` that are not among ``forbidden`` (relative to it) and do not lead to them.

    Record in ``looked_into`` the state of each directory on the way to a forbidden path.
    """
    if () in forbidden:
        return
    inside: dict[str, list[tuple[str, ...]]] = {}
    for first, *rest in forbidden:
        inside.setdefault(first, []).append(tuple(rest))
    if not inside:
        yield directory
        return
    try:
        looked_into[directory] = _state(directory) or (0, 0)
        names = os.listdir(directory)
    except OSError as error:
        raise KernelError.from_oserror(
            error, path=directory, hint="each directory that leads to a forbidden path must be readable"
        ) from None
    for name in names:
        path = os.path.join(directory, name)
        if name in inside:
            yield from _beside(path, inside[name], looked_into)
        else:
            yield path


def _allow_if_there(ruleset: int, path: str, access: int) -> None:
    """Add a rule for a path unless it is a link: the target has its own rule, or none."""
    try:
        descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError as error:
        if unanswered(error):
            raise KernelError.from_oserror(error, path=path) from None
        return  # gone, or not accessible: then less is allowed, not more
    try:
        if not stat.S_ISLNK(os.fstat(descriptor).st_mode):
            _add(ruleset, descriptor, path, access)
    except KernelError as error:
        if (
            error.errno != errno.EBADFD
        ):  # a mounted namespace, for example: Landlock neither accepts nor needs a rule for it
            raise
    finally:
        posix.close(descriptor)


def _allow(ruleset: int, path: str, access: int) -> None:
    try:
        descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError as error:
        raise KernelError.from_oserror(error, path=path) from None
    try:
        _add(ruleset, descriptor, path, access)
    finally:
        posix.close(descriptor)


def _add(ruleset: int, descriptor: int, path: str, access: int) -> None:
    if not stat.S_ISDIR(os.fstat(descriptor).st_mode):
        access &= _OF_A_FILE
    rule = _PathBeneathAttr(access, descriptor)
    try:
        syscall("landlock_add_rule", ruleset, _RULE_PATH_BENEATH, ctypes.byref(rule), 0)
    except KernelError as error:
        raise KernelError.from_oserror(error, path=f"{path}: landlock_add_rule") from None


def _restrict_self(ruleset: int) -> None:
    try:
        syscall("landlock_restrict_self", ruleset, 0)
    except KernelError as error:
        if error.errno == errno.EPERM:
            raise unprivileged(error, "Landlock rules") from None
        if error.errno == errno.E2BIG:
            raise CapabilityError(
                "this thread already has 16 layers of Landlock rules, the most that the kernel allows",
                errno=errno.E2BIG,
                path="landlock_restrict_self",
                hint="nest fewer confined programs",
            ) from None
        raise
