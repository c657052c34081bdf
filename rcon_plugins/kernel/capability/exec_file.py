"""What execve(2) looks at in a file when it decides on identity and capabilities."""

from __future__ import annotations

import errno
import os
import stat
from typing import NamedTuple

from rcon_plugins.errors import KernelError
from rcon_plugins.kernel.capability.files import FileCapabilities, read_file_capabilities
from rcon_plugins.kernel.capability.sets import Capabilities

_FIRST_BYTES = 256  # what the kernel reads of a file to see what it is (BINPRM_BUF_SIZE)
_MOST_SCRIPTS = 5  # interpreters that are scripts themselves; then ELOOP


class File(NamedTuple):
    """A file that execve(2) is called with; for a script, its interpreter in the end, since only that counts.

    ``mode`` has the permission bits of stat(2); ``uid`` and ``gid`` are the owner; ``nosuid`` is of its mount.
    ``scripts`` are those that led here by their ``#!``, the first as it was called.
    """

    path: str
    mode: int = 0o755
    uid: int = 0
    gid: int = 0
    capabilities: FileCapabilities | None = None
    nosuid: bool = False
    scripts: tuple[File, ...] = ()

    @classmethod
    def of(cls, path: str) -> File:
        """Read it from disk, by way of the interpreters of scripts. Links are followed; PATH is not searched.

        A file that cannot be read is taken for a binary. Raises `KernelError` where it, or an interpreter, is missing
        or malformed as execve(2) would say: ENOENT, ENOEXEC, ELOOP.
        """
        scripts: list[File] = []
        while True:
            file = cls._alone(path)
            interpreter = _interpreter(path)
            if interpreter is None:
                return file._replace(scripts=tuple(scripts))
            scripts.append(file)
            if len(scripts) > _MOST_SCRIPTS:
                raise KernelError(
                    f"{scripts[0].path}: more than {_MOST_SCRIPTS} interpreters are scripts themselves",
                    errno=errno.ELOOP,
                    path=scripts[0].path,
                    hint="name a program after #!",
                )
            path = interpreter

    @classmethod
    def _alone(cls, path: str) -> File:
        try:
            status = os.stat(path)
            flags = os.statvfs(path).f_flag
        except OSError as error:
            raise KernelError.from_oserror(error, path=path) from None
        capabilities = read_file_capabilities(path)
        if capabilities is not None:
            known = Capabilities.known()  # the kernel takes no notice of others
            capabilities = capabilities._replace(
                permitted=capabilities.permitted & known, inheritable=capabilities.inheritable & known
            )
        return cls(
            path=path,
            mode=stat.S_IMODE(status.st_mode),
            uid=status.st_uid,
            gid=status.st_gid,
            capabilities=capabilities,
            nosuid=bool(flags & os.ST_NOSUID),
        )

    @property
    def sets_uid(self) -> bool:
        """Whether its mode has the set-user-ID bit."""
        return bool(self.mode & stat.S_ISUID)

    @property
    def sets_gid(self) -> bool:
        """Whether its mode has the set-group-ID bit, whatever that means."""
        return bool(self.mode & stat.S_ISGID)

    @property
    def privileged(self) -> bool:
        """Whether there is anything about it that could change what a process is."""
        return self.sets_uid or self.sets_gid or self.capabilities is not None


def _interpreter(path: str) -> str | None:
    """The path after ``#!``, as the kernel reads it; None where the file is no script, or cannot be read."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return None
    try:
        start = os.read(descriptor, _FIRST_BYTES)
    except OSError:
        return None
    finally:
        os.close(descriptor)
    if not start.startswith(b"#!"):
        return None
    line, newline, _ = start[2:].partition(b"\n")
    words = line.replace(b"\t", b" ").split(b"\0")[0].strip(b" ")
    name, more, _ = words.partition(b" ")
    whole = newline or len(start) < _FIRST_BYTES  # else there may be more of it
    if not name or not (whole or more):
        # A file that ends there has the empty path for an interpreter, which is a directory.
        number = errno.ENOEXEC if newline or not whole else errno.EACCES
        raise KernelError(
            f"{path}: no whole path after #! in the first {_FIRST_BYTES} bytes",
            errno=number,
            path=path,
            hint="name an interpreter there",
        )
    return os.fsdecode(name)
