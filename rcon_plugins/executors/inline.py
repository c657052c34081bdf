"""The ``inline`` executor: the thread that runs the work joins a cgroup, and leaves it after.

It acts on the calling thread alone. A thread moves itself by writing ``0`` to a file that is already open, which is
the only cheap way (docs/reference/kernel.md).
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rcon_plugins.kernel.cgroup import Cgroup, Entrance


class _Places(threading.local):
    """Where this thread is, outermost first: like the kernel, which keeps one place for each thread."""

    def __init__(self) -> None:
        self.entered: list[Entrance] = []


_places = _Places()


class InlineExecutor:
    """A threaded cgroup that any thread of this process may be in for a while. Thread-safe.

    Stays nest, also in different cgroups: leaving one goes back to the one around it, and to ``home`` from the
    outermost. `enter` and `leave` come in pairs, in one thread; `Admission.entered` sees to that.
    """

    def __init__(self, cgroup: Cgroup, entrance: Entrance, home: Entrance) -> None:
        self.cgroup = cgroup
        self.entrance = entrance
        self._home = home

    def enter(self) -> None:
        """Move the calling thread in. Raises `KernelError`; the thread is where it was then."""
        try:
            self.entrance.enter()
        except BaseException:
            self._around().enter()
            raise
        _places.entered.append(self.entrance)

    def leave(self) -> None:
        """Move the calling thread back to where it was. Raises `KernelError`."""
        _places.entered.pop()
        self._around().enter()

    def close(self) -> None:
        """Close the way in, and remove the cgroup unless somebody is in it."""
        self.entrance.close()
        self.cgroup.delete()

    def _around(self) -> Entrance:
        return _places.entered[-1] if _places.entered else self._home
