"""What is left of the budget of the machine: an account that all servers of one user on it share.

A mebibyte is one byte of a file, locked (fcntl(2), POSIX record locks) by the process that was promised it. The kernel
releases the locks of a process that ends, however it ends, so nothing is ever lost. Nothing is in the file.

The file is ``/run/rcon/budget`` for root, else ``rcon/budget`` in the user's runtime directory: whoever may open it can
lock all of it, so it belongs to one user, and nobody else may open it. A server that becomes another user opens it
before (`ledger_of_machine`), and its processes inherit it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
import struct
import threading
from collections.abc import Iterator

from rcon_plugins.errors import KernelError

UNIT = 2**20
#: The byte that is locked by who takes some: one at a time. Far beyond all that is counted.
_TURN = 1 << 61
#: struct flock, native: type, whence, start, length, pid.
_FLOCK = "hhqqi"


class Allocation:
    """Some of the budget, in bytes of the file: from, and up to but not."""

    __slots__ = ("ranges",)

    def __init__(self) -> None:
        self.ranges: list[tuple[int, int]] = []


class Ledger:
    """The account, seen from one process. Thread-safe; a fork goes on with its own, in which nothing is held.

    POSIX locks belong to the process: what its threads hold is told apart here, processes by the kernel. So a process
    has one `Ledger` for one file, and never closes a descriptor of it, which would release its locks.
    """

    def __init__(self, file: int) -> None:
        self.file = file
        self._lock = threading.Lock()
        self._held: list[Allocation] = []
        os.register_at_fork(after_in_child=self._begin_anew)

    def _begin_anew(self) -> None:
        self._lock = threading.Lock()
        self._held = []

    def take(self, size: int, whole: int) -> Allocation | None:
        """``size`` bytes of a budget of ``whole``, both in whole mebibytes; None where not so much is left."""
        wanted = -(-size // UNIT)
        share = Allocation()
        with self._lock, self._turn():
            free = []
            for start, end in self._free(whole // UNIT):
                end = min(end, start + wanted)
                free.append((start, end))
                wanted -= end - start
                if not wanted:
                    break
            else:
                return None
            self._held.append(share)
            try:
                for start, end in free:
                    share.ranges.append((start, end))
                    fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB, end - start, start, os.SEEK_SET)
            except BaseException as error:
                self._release(share)
                if isinstance(error, (BlockingIOError, PermissionError)):
                    return None  # by somebody who did not wait for a turn
                raise
        return share

    def give_back(self, share: Allocation) -> None:
        """Give it back; what was given back before, or belongs to the process that this is a fork of, is left alone."""
        with self._lock:
            if share in self._held:
                self._release(share)

    def _release(self, share: Allocation) -> None:
        for start, end in share.ranges:
            fcntl.lockf(self.file, fcntl.LOCK_UN, end - start, start, os.SEEK_SET)
        self._held.remove(share)

    @contextlib.contextmanager
    def _turn(self) -> Iterator[None]:
        fcntl.lockf(self.file, fcntl.LOCK_EX, 1, _TURN, os.SEEK_SET)
        try:
            yield
        finally:
            fcntl.lockf(self.file, fcntl.LOCK_UN, 1, _TURN, os.SEEK_SET)

    def _free(self, units: int) -> list[tuple[int, int]]:
        """What nobody holds, in order: a question to the kernel for each lock that there is."""
        own = sorted(held for share in self._held for held in share.ranges)
        asked, begin = [], 0
        for start, end in [*own, (units, units)]:
            if begin < min(start, units):
                asked.append((begin, min(start, units)))
            begin = max(begin, end)
        free = []
        while asked:
            begin, bound = asked.pop()
            question = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, begin, bound - begin, 0)
            kind, _, start, length, _ = struct.unpack(_FLOCK, fcntl.fcntl(self.file, fcntl.F_GETLK, question))
            if kind == fcntl.F_UNLCK:
                free.append((begin, bound))
                continue
            end = start + length if length else bound
            asked += [(a, b) for a, b in ((begin, start), (end, bound)) if a < b]
        return sorted(free)


class _OfProcess:
    """The one that the managers of a process share."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.ledger: Ledger | None = None

    def after_fork(self) -> None:
        """Another thread may have held the lock. The file stays: by now it could be another user's."""
        self.lock = threading.Lock()


_of_process = _OfProcess()
os.register_at_fork(after_in_child=_of_process.after_fork)


def ledger_of_machine() -> Ledger:
    """The ledger of this machine and user, opened when it is first asked for, and then open until the process ends.

    Raises KernelError where the file cannot be had, or is another's, with the remedy.
    """
    with _of_process.lock:
        if _of_process.ledger is None:
            _of_process.ledger = Ledger(open_account(_folder()))
        return _of_process.ledger


def open_account(folder: str) -> int:
    """Open, or make, the file ``budget`` in a folder; no link is followed. Raises KernelError."""
    path = f"{folder}/budget"
    try:
        with contextlib.suppress(FileExistsError):
            os.mkdir(folder, 0o700)
        directory = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            _check(os.fstat(directory), folder, 0o022)
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
            file = os.open("budget", flags, 0o600, dir_fd=directory)
        finally:
            os.close(directory)
    except KernelError:
        raise
    except OSError as error:
        raise KernelError.from_oserror(
            error,
            path=path,
            hint="the budget of the machine is kept there: as an ordinary user, set XDG_RUNTIME_DIR to a directory of "
            "this user's own (RuntimeDirectory= of a unit); or leave [budget] out",
        ) from None
    try:
        status = os.fstat(file)
        if not stat.S_ISREG(status.st_mode) or status.st_nlink != 1:
            raise KernelError(f"{path} is no file of its own", path=path, hint="remove it")
        _check(status, path, 0o077)
    except BaseException:
        os.close(file)
        raise
    return file


def _check(status: os.stat_result, path: str, forbidden: int) -> None:
    if status.st_uid != os.geteuid():
        problem = f"belongs to the user {status.st_uid}, not to {os.geteuid()}"
    elif status.st_mode & forbidden:
        problem = f"is open to others (mode {stat.S_IMODE(status.st_mode):04o})"
    else:
        return
    raise KernelError(f"{path} {problem}, who could take all of the budget", path=path, hint="remove it")


def _folder() -> str:
    uid = os.geteuid()
    if uid == 0:
        return "/run/rcon"
    return f"{os.environ.get('XDG_RUNTIME_DIR') or f'/run/user/{uid}'}/rcon"
