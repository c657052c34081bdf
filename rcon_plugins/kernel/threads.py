"""Start threads. A thread counts as a process, so clone(2) fails at a limit on processes, and where memory is out."""

from __future__ import annotations

import threading

from rcon_plugins.errors import thread_not_started


def start(thread: threading.Thread) -> None:
    """Start a thread of this process. Raises `KernelError` (EAGAIN) if there is no room for it.

    It may be started later.
    """
    try:
        threading.Thread.start(thread)
    except RuntimeError as error:
        raise thread_not_started(thread.name, error) from None
