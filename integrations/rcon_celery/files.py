"""The worker's own files, which executor processes must not have: its logs, and what its pool shares among processes.

Sockets and pipes they never have.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path

from rcon_plugins.executors import log_files

#: In the name of the files that billiard's shared memory lies in.
_SHARED_BY_POOL = "/pymp-"


def server_files() -> list[int]:
    """The descriptors of such files in this process. Not standard output and standard error."""
    logs = log_files.open_log_files(_loggers())
    return sorted({number for number in {*logs, *_shared_by_pool()} if number > 2})


def leaving_log_files() -> Callable[[], None]:
    """What, in an executor process, lets what is logged to files go to standard error."""
    return log_files.leaving_log_files(_loggers())


def _shared_by_pool() -> Iterator[int]:
    for entry in Path("/dev/fd").iterdir():
        try:
            if _SHARED_BY_POOL in str(entry.readlink()):
                yield int(entry.name)
        except OSError:
            continue  # the descriptor of the listing itself


def _loggers() -> list[logging.Logger]:
    """All that there are: Celery writes the lines of any of them to its log."""
    known = logging.Logger.manager.loggerDict.values()
    return [logging.getLogger(), *(each for each in known if isinstance(each, logging.Logger))]
