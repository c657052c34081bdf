"""Start threads and see them end. A thread counts as a process, so clone(2) fails at a limit on processes."""

from __future__ import annotations

import os
import threading
import time

from rcon_plugins.errors import thread_not_started

#: How long to wait until the kernel has ended a thread that Python calls dead, before looking again, seconds.
_PAUSE = 0.0005


def start(thread: threading.Thread) -> None:
    """Start a thread of this process. Raises `KernelError` (EAGAIN) if there is no room for it.

    It may be started later.
    """
    try:
        threading.Thread.start(thread)
    except RuntimeError as error:
        raise thread_not_started(thread.name, error) from None


def has_ended(thread: threading.Thread) -> bool:
    """Return whether a thread of this process runs no more and has left its cgroups.

    Before Python 3.13 a thread is not alive any more a moment before the kernel ends it. On a busy machine that moment
    can be long.
    """
    return not thread.is_alive() and not os.path.exists(f"/proc/self/task/{thread.native_id}")


def join(thread: threading.Thread, timeout: float) -> bool:
    """Wait for so many seconds at most until a thread has ended: see `has_ended`. Return whether it has."""
    deadline = time.monotonic() + timeout
    thread.join(max(0.0, timeout))
    while not (ended := has_ended(thread)) and time.monotonic() < deadline:
        time.sleep(_PAUSE)
    return ended
