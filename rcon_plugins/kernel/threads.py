"""Start threads. A thread counts as a process, so clone(2) fails at a limit on processes, and where memory is out."""

from __future__ import annotations

import errno
import threading

from rcon_plugins.errors import KernelError


def start(thread: threading.Thread) -> None:
    """Start a thread of this process. Raises `KernelError` (EAGAIN) if there is no room for it.

    It may be started later. `threading` itself raises RuntimeError, which nobody expects of the kernel.
    """
    try:
        threading.Thread.start(thread)
    except RuntimeError as error:
        raise KernelError(
            f"the thread {thread.name} could not be started: {error}",
            errno=errno.EAGAIN,
            path="clone",
            hint="raise the limit on processes of this service: pids.max of its cgroups, `ulimit -u`",
        ) from None
