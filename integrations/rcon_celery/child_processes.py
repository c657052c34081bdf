"""Let the code of a task start processes, with the standard library's multiprocessing and with billiard.

Celery's prefork pool makes its processes with billiard. Each is daemonic, also for the standard library, and a daemonic
process must not have children: they could become orphans. The processes of a confined task end with it, so its executor
process need not be daemonic.
"""

from __future__ import annotations

import itertools
import multiprocessing.process
import multiprocessing.util
import os
import shutil
from typing import Any, Final

import billiard.process

#: The key of the folder for sockets that both packages make when they need it.
_FOLDER: Final = "tempdir"

# No public function sets the current process, and private names have no types.
_module: Any = multiprocessing.process


class _ThisProcess(multiprocessing.process.BaseProcess):
    """Stands for this process in multiprocessing, as its own class does for the first process of a program."""

    def __init__(self, name: str, identity: tuple[int, ...]) -> None:
        self._identity = identity
        self._name = name
        self._parent_pid = None
        self._popen = None
        self._closed = False
        key = multiprocessing.process.AuthenticationString(os.urandom(32))  # type: ignore[attr-defined]
        self._config = {"authkey": key, "semprefix": "/mp"}


def allow() -> None:
    """Let this process have children, as if multiprocessing had made it.

    Call it in an executor process before its first task. The process keeps the name and the number that it has in the
    pool. It gets keys of its own: those of the pool's process are known to the tasks of all policies. Functions that
    libraries registered with ``register_after_fork`` run, as they do in a process that the pool makes: Celery's own
    make this process forget connections of the process that it was forked from.
    """
    here: Any = billiard.process.current_process()
    here.daemon = False
    here.authkey = os.urandom(32)
    _module._current_process = _ThisProcess(here.name, here._identity)  # noqa: SLF001 - no public name
    for each in (_module, billiard.process):
        each._children = set()  # noqa: SLF001 - children of the process that this one was forked from
        each._process_counter = itertools.count(1)  # noqa: SLF001
    multiprocessing.util._run_after_forkers()  # type: ignore[attr-defined]  # noqa: SLF001 - billiard has the same


def remove_folders() -> None:
    """Remove the folders that a task made for sockets of its processes. Multiprocessing does so at the exit of Python.

    An executor process does not come there.
    """
    for module in (_module, billiard.process):
        folder = module.current_process()._config.pop(_FOLDER, None)  # noqa: SLF001 - no public name
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
