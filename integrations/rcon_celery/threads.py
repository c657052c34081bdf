"""The threads of an executor process that a task has started, and that go on when it has ended."""

from __future__ import annotations

import concurrent.futures.thread
import sys
import threading
from typing import Final

_POOL: Final = concurrent.futures.thread.__file__


def alive() -> set[threading.Thread]:
    """The threads that there are."""
    return set(threading.enumerate())


def go_on(before: set[threading.Thread]) -> bool:
    """Whether threads go on which were not there before, and for which Python would wait at its exit.

    Not those of a `ThreadPoolExecutor` that wait for something to do, nor daemons: libraries keep both for the next
    task.
    """
    if threading.active_count() == 1:
        return False
    new = [thread for thread in alive() - before if not thread.daemon]
    if not new:
        return False
    frames = sys._current_frames()  # noqa: SLF001 - documented
    return any(not _waits(frames.get(thread.ident or 0)) for thread in new)


def _waits(frame: object) -> bool:
    """Whether the innermost code that a thread runs is that of the standard library's pool of threads itself."""
    code = getattr(frame, "f_code", None)
    return code is not None and code.co_filename == _POOL
