"""What kind of process this is: no worker at all, a worker that runs tasks, or an executor process of one."""

from __future__ import annotations

import os

from celery import current_task

_executor = 0


def become_executor() -> None:
    """Note that this process is an executor process: what runs here is confined already."""
    global _executor
    _executor = os.getpid()


def is_executor() -> bool:
    """Whether this process is an executor process, or was forked from one."""
    return _executor != 0


def is_unguarded() -> bool:
    """Whether a worker runs this here and now as a task, and not in an executor process."""
    if is_executor() or not current_task:
        return False
    request = current_task.request
    if request.called_directly or request.is_eager:
        return False
    return not getattr(request, "rcon_may_run", False)
