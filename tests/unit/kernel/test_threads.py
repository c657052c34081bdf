"""Threads end in the kernel a moment after Python calls them dead."""

from __future__ import annotations

import threading
from pathlib import Path

from rcon_plugins.kernel.threads import has_ended, join, start


def test_a_thread_that_was_joined_is_gone() -> None:
    for _ in range(300):
        thread = threading.Thread(target=int)
        start(thread)
        assert join(thread, 10)
        assert not Path(f"/proc/self/task/{thread.native_id}").exists()


def test_a_thread_that_does_not_end_in_time() -> None:
    over = threading.Event()
    thread = threading.Thread(target=over.wait)
    start(thread)
    assert not has_ended(thread)
    assert not join(thread, 0.01)
    over.set()
    assert join(thread, 10)
    assert has_ended(thread)
