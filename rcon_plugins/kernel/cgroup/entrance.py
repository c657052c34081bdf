"""Let threads enter a cgroup with one write to an open file per hierarchy."""

from __future__ import annotations

import errno
import os
import posix
from collections.abc import Iterable
from types import TracebackType

from rcon_plugins.errors import KernelError
from rcon_plugins.kernel import files


class Entrance:
    """Open fds of ``cgroup.threads`` (v2) or ``tasks`` (v1); the thread that enters writes to them.

    A thread that writes ``0`` moves itself, without waiting for other users of the kernel: this takes 6 us, any other
    way milliseconds. The kernel checks a write against the process that opened the fd. ``exec`` closes the fds, and
    ``fork`` inherits them: close them in a process that must not enter. Source: ``cgroups(7)``.

    An entrance that nobody refers to closes itself. So no thread that is about to write can meet another file under the
    number of a closed descriptor.
    """

    def __init__(self, paths: Iterable[tuple[str, str]]) -> None:
        """Open ``paths``, which are (directory, file) pairs. Raises KernelError."""
        self._files: list[tuple[int, str]] = []
        self._fds: tuple[int, ...] | None = None
        self._pid = os.getpid()
        try:
            for directory, name in paths:
                self._files.append((files.open_file(directory, name, os.O_WRONLY), f"{directory}/{name}"))
        except BaseException:
            self.close()
            raise
        self._fds = tuple(fd for fd, _ in self._files)

    def enter(self) -> None:
        """Move the calling thread into the cgroup.

        Raises KernelError. The thread may then have entered only some of the hierarchies, and must not run the code
        that the limits are for.
        """
        fds = self._fds
        if fds is None:
            # Without a write the thread would run without limits.
            raise KernelError("this entrance of a cgroup is closed", errno=errno.EBADF, path="cgroup.threads")
        try:
            for fd in fds:
                os.write(fd, b"0")
        except OSError as error:
            path = next((path for known, path in self._files if known == fd), "cgroup.threads")
            hint = (
                "the process has to be inside of the threaded domain first: adopt() it"
                if path.endswith("/cgroup.threads")
                else None
            )
            raise files.failure(error, path, "0", hint) from None

    def close(self) -> None:
        """Close the fds. Calling it again does nothing."""
        self._fds = None
        while self._files:
            posix.close(self._files.pop()[0])  # gevent's os.close() may wait for its event loop

    def __del__(self) -> None:
        # In a fork the numbers may belong to other files.
        if self._files and self._pid == os.getpid():
            self.close()

    def __enter__(self) -> Entrance:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
