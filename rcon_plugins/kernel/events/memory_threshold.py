"""A mark of memory: told when what runs in a cgroup needs as much, and on v2 slowed down there."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from rcon_plugins.kernel import files
from rcon_plugins.kernel.cgroup.resources import MAX, Resources
from rcon_plugins.kernel.events.event import Event
from rcon_plugins.kernel.events.sources import need

if TYPE_CHECKING:
    from rcon_plugins.kernel.cgroup.cgroup import Cgroup
    from rcon_plugins.kernel.events.watcher import Watch, Watcher

#: Of the mark, what must be in use, and what of that must be more than page cache, for it to count as reached on v2: a
#: notice may be late, and of a mark that was lower.
_IN_USE = 0.97
_REALLY = 15 / 16


class MemoryThreshold:
    """Calls ``callback``, in the watcher's thread, when work in the cgroup needs as much memory as `move` said
    (on v2 also when it only seems to: ask `is_reached`).

    Page cache that no process has mapped, which the kernel takes back by itself, does not count as need. On v2 the mark
    is ``memory.high``: work above it is slowed down until it moves. On v1 it is a notice only, and work goes on: what
    v1 has to stop work with (``memory.oom_control``) makes system calls fail with ENOMEM or EFAULT instead. The bound
    that holds is the limit of the cgroup, which is not touched.
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
        places = zip(cgroup.mounts, cgroup.directories, strict=True)
        #: Where memory is accounted, and whether that is v2.
        self._place, self._slows = next(
            (
                (directory, mount.version == 2)
                for mount, directory in places
                if (mount.version == 2 and files.is_file(directory, "memory.high"))
                or "memory" in mount.controllers
            ),
            ("", False),
        )

    @property
    def is_current(self) -> bool:
        """Whether the cgroup is still the one that was there at the beginning, not another of its name."""
        return not self._closed and self._identity == files.identity(self.cgroup.directories[0])

    def move(self, at: int | None) -> None:
        """Set the mark, in bytes; None takes it away. Raises KernelError, ControllerUnavailable."""
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
        """Keep others, in this process and elsewhere, from moving the mark of this cgroup meanwhile. For moments.

        An advisory lock on its directory (flock(2)). Raises KernelError.
        """
        with files.locked(self.cgroup.directories[0]):
            yield

    def need(self) -> int:
        """What is needed now, in bytes. Raises KernelError."""
        name = "memory.current" if self._slows else "memory.usage_in_bytes"
        return need(self._place, int(files.read_if_there(self._place, name) or 0))

    def is_reached(self) -> bool:
        """Whether it really is, when the callback was called: on v2 a notice may be late, or of page cache."""
        if not self._slows:
            return True
        at = self.stands_at()
        if at is None:
            return False
        usage = int(files.read_if_there(self._place, "memory.current") or 0)
        return usage >= _IN_USE * at and need(self._place, usage) >= _REALLY * at

    def stands_at(self) -> int | None:
        """Where the mark is in the kernel, which another process may have moved; None where that cannot be told."""
        text = files.read_if_there(self._place, "memory.high") if self._slows else None
        return self._at if text is None else None if text == "max" else int(text)

    def close(self) -> None:
        """Hear no more of it. On v2 ``memory.high`` stays as it is."""
        self._closed = True
        if self._watch is not None:
            self._watch.close()

    def _slowed(self, event: Event) -> None:
        if self._at is not None:
            self._callback(event)
