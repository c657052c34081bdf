"""Notify when a cgroup needs a given amount of memory, and on v2 throttle it there."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from rcon_plugins.kernel import files
from rcon_plugins.kernel.cgroup.need import need
from rcon_plugins.kernel.cgroup.resources import MAX, Resources
from rcon_plugins.kernel.events.event import Event

if TYPE_CHECKING:
    from rcon_plugins.kernel.cgroup.cgroup import Cgroup
    from rcon_plugins.kernel.events.watcher import Watch, Watcher

#: On v2 a threshold counts as reached if these shares of it are in use, and in use beyond page cache. An event alone
#: does not suffice: it may be late, and belong to a lower threshold.
_IN_USE = 0.97
_REALLY = 15 / 16


class MemoryThreshold:
    """Call ``callback`` in the watcher's thread when the cgroup needs the memory given to `move`.

    Unmapped page cache does not count: the kernel reclaims it by itself. The memory limit of the cgroup stays as it is.

    On v2 the threshold is ``memory.high``, which throttles processes above it until it moves. The callback may come
    early there: check `is_reached`. On v1 the threshold only notifies. Stopping processes there
    (``memory.oom_control``) would make system calls fail with ENOMEM or EFAULT.
    """

    def __init__(
        self,
        watcher: Watcher,
        cgroup: Cgroup,
        callback: Callable[[Event], object],
        on_gone: Callable[[], object] | None = None,
    ) -> None:
        self.cgroup = cgroup
        self._watcher = watcher
        self._callback = callback
        self._on_gone = on_gone
        self._at: int | None = None
        self._watch: Watch | None = None
        self._closed = False
        self._identity = files.identity(cgroup.directories[0])
        branches = zip(cgroup.mounts, cgroup.directories, strict=True)
        #: The directory in which memory is accounted, and whether it is on v2.
        self._directory, self._slows = next(
            (
                (directory, mount.version == 2)
                for mount, directory in branches
                if (mount.version == 2 and files.is_file(directory, "memory.high"))
                or "memory" in mount.controllers
            ),
            ("", False),
        )

    @property
    def is_current(self) -> bool:
        """Whether the cgroup is still the same one, not a later one of that name."""
        return not self._closed and self._identity == files.identity(self.cgroup.directories[0])

    def move(self, at: int | None) -> None:
        """Set the threshold in bytes; None removes it. Raises KernelError, ControllerUnavailable."""
        if self._closed:
            return
        if self._slows:
            if self._watch is None:
                self._watch = self._watcher.add(
                    self.cgroup, self._slowed, kinds=("memory_high",), on_gone=self._on_gone
                )
            self._at = at
            self.cgroup.configure(Resources(memory_high=MAX if at is None else at))
            return
        self._at = at
        former, self._watch = self._watch, None
        if at is not None:
            self._watch = self._watcher.add(
                self.cgroup, self._callback, kinds=(), needs=(at,), on_gone=self._on_gone
            )
        if former is not None:
            former.close()

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other threads and processes that use this lock from moving the threshold. Hold it only briefly.

        Takes an advisory lock on the cgroup's directory (flock(2)). Raises KernelError.
        """
        with files.locked(self.cgroup.directories[0]):
            yield

    def need(self) -> int:
        """Return the memory needed now, in bytes. Raises KernelError."""
        name = "memory.current" if self._slows else "memory.usage_in_bytes"
        return need(self._directory, int(files.read_if_there(self._directory, name) or 0))

    def is_reached(self) -> bool:
        """Return whether the threshold is reached: on v2 an event may be late, or caused by page cache."""
        if not self._slows:
            return True
        at = self.stands_at()
        if at is None:
            return False
        usage = int(files.read_if_there(self._directory, "memory.current") or 0)
        return usage >= _IN_USE * at and need(self._directory, usage) >= _REALLY * at

    def stands_at(self) -> int | None:
        """Return the threshold in the kernel, which another process may have moved; None if there is none."""
        text = files.read_if_there(self._directory, "memory.high") if self._slows else None
        return self._at if text is None else None if text == "max" else int(text)

    def close(self) -> None:
        """Stop watching. On v2 ``memory.high`` stays as it is."""
        self._closed = True
        if self._watch is not None:
            self._watch.close()

    def _slowed(self, event: Event) -> None:
        if self._at is not None:
            self._callback(event)
