"""The runtime directory of an instance: files of a server that others read. It outlives the server for a while.

``/run/rcon/<instance>/`` for root, ``$XDG_RUNTIME_DIR/rcon/<instance>/`` for any other user; it does not survive a
reboot. It has the server's files and up to two empty ones that tell its state:

=========  ===================================================================================
``ended``  the server has ended, at the time of the file; made by the server, or by `collect`
``read``   a program that collects the figures of servers has read the last ones
=========  ===================================================================================
"""

from __future__ import annotations

import contextlib
import os
import posix
import stat
import time
from collections.abc import Iterator

from rcon_plugins.errors import KernelError
from rcon_plugins.tree.owner import Owner

ENDED, READ = "ended", "read"
#: How long the directory of a server that has ended stays unless it was read, seconds; and the most that stay.
KEEP_SECONDS = 3600.0
MOST_KEPT = 16
_ROOT_FOLDER = "/run/rcon"
_HINT = (
    "rcon writes there what other processes read about its servers; as an ordinary user, set XDG_RUNTIME_DIR to a "
    "directory of this user"
)


def folder() -> str:
    """Return the folder of the runtime directories of this user. It may not exist."""
    uid = os.geteuid()
    return _ROOT_FOLDER if uid == 0 else _folder_of(uid)


def folders(owner: int | None = None) -> list[str]:
    """Return the folders in which this user looks for runtime directories: root's, its own, and that of ``owner``.

    Root looks in ``$XDG_RUNTIME_DIR`` too, where a service with a user of its own may have its folder.
    """
    found = [_ROOT_FOLDER, _folder_of(os.geteuid())]
    if owner not in (None, 0, os.geteuid()):
        found.append(f"/run/user/{owner}/rcon")
    return found


def existing_folders() -> list[str]:
    """Return those of `folders` that exist, without links. Code of others must not write there."""
    return sorted({os.path.realpath(path) for path in folders() if os.path.isdir(path)})


def make_folder() -> str:
    """Make the folder, which everybody may enter, and return it. Raises `KernelError`."""
    path = folder()
    try:
        os.makedirs(path, 0o755, exist_ok=True)
        if stat.S_IMODE(os.stat(path).st_mode) != 0o755:
            os.chmod(path, 0o755)  # noqa: S103 - everybody may enter; each directory in it has its own mode
    except OSError as error:
        raise KernelError.from_oserror(error, path=path, hint=_HINT) from None
    return path


def make(instance: str, user: tuple[int, int] | None) -> str:
    """Make the runtime directory of an instance, or use that of an earlier one of the same name. Return its path.

    ``user`` is the (uid, gid) of the processes that write there, if it is not this user. Raises `KernelError`.
    """
    path = f"{make_folder()}/{instance}"
    try:
        os.makedirs(path, 0o750, exist_ok=True)
        os.chmod(path, 0o750)  # noqa: S103 - its group may read
        if user is not None:
            os.chown(path, *user)
        for name in (ENDED, READ):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(f"{path}/{name}")
    except OSError as error:
        raise KernelError.from_oserror(error, path=path, hint=_HINT) from None
    return path


def end(path: str) -> None:
    """Note that the server has ended. Remove its directory if it has no file. A failure is left to `collect`."""
    with contextlib.suppress(OSError):
        if not os.listdir(path):
            os.rmdir(path)
            return
        _touch(path, ENDED)


def has_ended(path: str) -> bool:
    """Return whether the server of a runtime directory is known to have ended."""
    return os.path.lexists(f"{path}/{ENDED}")


def collect() -> None:
    """Remove the runtime directories, in the folder of this user, of servers whose end was read or is long ago.

    At most `MOST_KEPT` of servers that have ended stay, the latest. One whose owner cannot be seen from this PID
    namespace stays. What cannot be removed now is left to the next call.
    """
    ended = []
    for path in _directories():
        with contextlib.suppress(OSError):
            when = _ended_at(path)
            if when is None:
                continue
            if os.path.lexists(f"{path}/{READ}") or time.time() - when > KEEP_SECONDS:
                _remove(path)
            else:
                ended.append((when, path))
    for _, path in sorted(ended)[: max(0, len(ended) - MOST_KEPT)]:
        with contextlib.suppress(OSError):
            _remove(path)


def _ended_at(path: str) -> float | None:
    """Return when the server of a directory ended, or when that was noticed first; None while it may live."""
    with contextlib.suppress(FileNotFoundError):
        return os.lstat(f"{path}/{ENDED}").st_mtime
    owner = Owner.of(os.path.basename(path))
    if owner is None or owner.is_alive() is not False:
        return None
    _touch(path, ENDED)
    return time.time()


def _directories() -> Iterator[str]:
    try:
        names = os.listdir(folder())
    except OSError:
        return  # there are none
    for name in names:
        path = f"{folder()}/{name}"
        with contextlib.suppress(OSError):
            if Owner.of(name) is not None and stat.S_ISDIR(os.lstat(path).st_mode):
                yield path


def _touch(path: str, name: str) -> None:
    posix.close(os.open(f"{path}/{name}", os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o640))


def _remove(path: str) -> None:
    """Remove a directory of files. Raises OSError."""
    # Another user may own the directory: follow no link in it, and remove nothing below it.
    directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        for name in os.listdir(directory):
            os.unlink(name, dir_fd=directory)
    finally:
        posix.close(directory)
    os.rmdir(path)


def _folder_of(uid: int) -> str:
    return f"{os.environ.get('XDG_RUNTIME_DIR') or f'/run/user/{uid}'}/rcon"
