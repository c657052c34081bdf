"""Descriptors of no path."""

from __future__ import annotations

import errno
import threading

import pytest

from rcon_plugins.errors import KernelError
from rcon_plugins.kernel import descriptors


def test_a_number_without_a_process_is_that_of_one_that_is_gone() -> None:
    """A thread's number is answered like that of a process that the kernel takes apart: it has no leader."""
    gate = threading.Event()
    thread = threading.Thread(target=gate.wait)
    thread.start()
    try:
        assert thread.native_id is not None
        with pytest.raises(KernelError) as caught:
            descriptors.of_process(thread.native_id)
    finally:
        gate.set()
        thread.join()
    assert caught.value.errno == errno.ESRCH
