"""The memory budget in force: how much of this machine's memory running work may still reserve.

All servers of one user on a machine share the budget. Each byte of a ledger file stands for one mebibyte. The process
that reserved a mebibyte holds a lock on its byte (see `rcon_plugins.tree.locks`). The file is ``/run/rcon/budget`` for
root, else ``rcon/budget`` in the user's runtime directory. A process that can open the file can lock all of it, so
only its owner may open it. A server that changes its user opens the file before (`machine_ledger`), and its processes
inherit it.
"""

from __future__ import annotations

import contextlib
import os
import posix
import stat
import threading
from typing import NamedTuple

from rcon_plugins.errors import KernelError
from rcon_plugins.tree.locks import Allocation, ByteLocks

#: The number of bytes of memory for each byte of the ledger.
UNIT = 2**20


class MemoryBudget(NamedTuple):
    """The ledger, the size of the whole budget in bytes, and how long work waits for its share, in seconds."""

    ledger: ByteLocks
    whole: int
    wait: float

    def reserve(self, size: int) -> Allocation | None:
        """Reserve ``size`` bytes, rounded up to whole mebibytes; None when less is left."""
        return self.ledger.reserve(-(-size // UNIT), self.whole // UNIT)

    def release(self, allocation: Allocation) -> None:
        """Release a reservation."""
        self.ledger.release(allocation)


class _MachineLedger:
    """The one ledger of this process, shared by its managers."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.ledger: ByteLocks | None = None

    def after_fork(self) -> None:
        """Replace the lock in a new child: another thread may have held it. Keep the file, as the user may change."""
        self.lock = threading.Lock()


_machine_ledger = _MachineLedger()
os.register_at_fork(after_in_child=_machine_ledger.after_fork)


def machine_ledger() -> ByteLocks:
    """Return the ledger of this machine and user. The first call opens it; it stays open until the process ends.

    Raises `KernelError`, with the remedy, if the file cannot be opened or another user could open it.
    """
    with _machine_ledger.lock:
        if _machine_ledger.ledger is None:
            _machine_ledger.ledger = ByteLocks(open_ledger(_folder()))
        return _machine_ledger.ledger


def open_ledger(folder: str) -> int:
    """Open the file ``budget`` in a folder, or create it. Do not follow links. Raises `KernelError`."""
    path = f"{folder}/budget"
    try:
        with contextlib.suppress(FileExistsError):
            os.mkdir(folder, 0o700)  # noqa: PTH102 - one of several os calls on this folder
        directory = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            _check(os.fstat(directory), folder, 0o022)
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
            file = os.open("budget", flags, 0o600, dir_fd=directory)
        finally:
            posix.close(directory)
    except KernelError:
        raise
    except OSError as error:
        raise KernelError.from_oserror(
            error,
            path=path,
            hint="the memory budget of the machine needs this file: as an ordinary user, set XDG_RUNTIME_DIR to a "
            "directory that belongs to this user (RuntimeDirectory= of a unit), or remove [budget] from the settings",
        ) from None
    try:
        try:
            status = os.fstat(file)
        except OSError as error:
            raise KernelError.from_oserror(error, path=path) from None
        if not stat.S_ISREG(status.st_mode) or status.st_nlink != 1:
            raise KernelError(f"{path} is not a regular file with one name", path=path, hint="remove it")
        _check(status, path, 0o077)
    except BaseException:
        posix.close(file)
        raise
    return file


def _check(status: os.stat_result, path: str, forbidden: int) -> None:
    if status.st_uid != os.geteuid():
        problem = f"belongs to the user {status.st_uid}, not to {os.geteuid()}"
    elif status.st_mode & forbidden:
        problem = f"is open to other users (mode {stat.S_IMODE(status.st_mode):04o})"
    else:
        return
    raise KernelError(f"{path} {problem}; they could lock the whole budget", path=path, hint="remove it")


def _folder() -> str:
    uid = os.geteuid()
    if uid == 0:
        return "/run/rcon"
    return f"{os.environ.get('XDG_RUNTIME_DIR') or f'/run/user/{uid}'}/rcon"
