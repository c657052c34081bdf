"""Let threads enter a cgroup: files kept open, one write each."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable
from types import TracebackType

from rcon_plugins.errors import KernelError
from rcon_plugins.kernel import files


class Entrance:
    """Open fds of ``cgroup.threads`` (v2) or ``tasks`` (v1), to be written by the thread that enters.

    A thread that writes ``0`` moves itself without waiting for the kernel's other users (6 us; any other
    way costs milliseconds). The fds carry the authority of the one who opened them, are closed by ``exec``
    and inherited by ``fork``: close them in a process that may not enter. Source: ``cgroups(7)``.
    """

    def __init__(self, paths: Iterable[tuple[str, str]]) -> None:
        """``paths`` are (directory, file) pairs. Raises KernelError."""
        self._files: list[tuple[int, str]] = []
        self._fds: tuple[int, ...] | None = None
        try:
            for directory, name in paths:
                self._files.append((files.open_file(directory, name, os.O_WRONLY), f"{directory}/{name}"))
        except BaseException:
            self.close()
            raise
        self._fds = tuple(fd for fd, _ in self._files)

    def enter(self) -> None:
        """Move the calling thread in.

        Raises KernelError; the thread may then be in some hierarchies and not in others, and must not run
        what the limits are for.
        """
        fds = self._fds
        if fds is None:
            # To write nothing would mean to set no limits.
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
            os.close(self._files.pop()[0])

    def __enter__(self) -> Entrance:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
