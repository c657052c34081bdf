"""Whether this process is an executor process."""

from __future__ import annotations

import os

_executor = 0


def become_executor() -> None:
    """Note that this process is an executor process: what runs here is confined already."""
    global _executor
    _executor = os.getpid()


def is_executor() -> bool:
    """Whether this process is an executor process, or was forked from one."""
    return _executor != 0
