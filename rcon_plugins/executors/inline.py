"""The ``inline`` executor: the thread that runs the work joins a cgroup, and leaves it afterwards.

It acts on the calling thread alone. A thread moves itself by writing ``0`` to a file that is already open. No other way
is cheap enough (docs/reference/kernel.md).
"""

from __future__ import annotations

import contextlib
import threading
from typing import TYPE_CHECKING

from rcon_plugins.errors import KernelError

if TYPE_CHECKING:
    from rcon_plugins.kernel.cgroup import Cgroup, Entrance


class _ThreadState(threading.local):
    """The cgroups that the current thread has entered, outermost first."""

    def __init__(self) -> None:
        self.entered: list[Entrance] = []
        #: The entrance that `InlineExecutor` could not take back; None if the thread is where it belongs.
        self.missed: Entrance | None = None


_thread = _ThreadState()


class InlineExecutor:
    """A threaded cgroup that any thread of this process may enter for a while. Thread-safe.

    Entering nests, also in different cgroups: `leave` returns to the cgroup entered before, and from the outermost one
    to ``home``. Call `enter` and `leave` in pairs, in one thread, as `InlineAdmission.entered` does.
    """

    def __init__(self, cgroup: Cgroup, entrance: Entrance, home: Entrance) -> None:
        self.cgroup = cgroup
        self.entrance = entrance
        self._home = home

    def enter(self) -> None:
        """Move the calling thread into the cgroup. Raises `KernelError`; the thread stays in its old cgroup then."""
        try:
            self.entrance.enter()
        except BaseException:
            self._return(_thread.entered)
            raise
        _thread.entered.append(self.entrance)

    def leave(self) -> None:
        """Move the calling thread back to the cgroup it was in before.

        Raises `KernelError`. The thread stays in the cgroup then, until it enters another, or `leave_missed` moves it.
        """
        entered = _thread.entered
        entered.pop()
        self._return(entered)

    def _return(self, entered: list[Entrance]) -> None:
        """Move the calling thread into the last cgroup that it has ``entered``, or to ``home``."""
        around = entered[-1] if entered else self._home
        try:
            around.enter()
        except BaseException:
            _thread.missed = around
            raise


def leave_missed() -> None:
    """Move the calling thread out of the cgroup that it could not leave, if it serves nothing now.

    Otherwise it would do the next work in the cgroup of another policy, which could not be removed either. If the
    kernel refuses it again, the next call tries again.
    """
    missed = _thread.missed
    if missed is None or _thread.entered:
        return
    with contextlib.suppress(KernelError):
        missed.enter()
        _thread.missed = None
