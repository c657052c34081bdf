"""The worker's own files, which executor processes must not have: its log, and what its pool shares among processes.

Who has a log file open for writing may empty it. Sockets and pipes they never have.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

#: In the name of the files that billiard's shared memory lies in.
_SHARED_BY_POOL = "/pymp-"
#: Kept, since a file object that nobody has closes its descriptor, and Python may warn of it.
_left: list[logging.Handler] = []


def server_files() -> list[int]:
    """The descriptors of such files in this process. Not standard output and standard error."""
    logs = {handler.stream.fileno() for _, handler in _file_handlers() if handler.stream is not None}
    return sorted({number for number in {*logs, *_shared_by_pool()} if number > 2})


def leave_log_files() -> None:
    """In an executor process: let what is logged to files go to standard error."""
    for logger, handler in list(_file_handlers()):
        substitute = logging.StreamHandler()
        substitute.setLevel(handler.level)
        substitute.setFormatter(handler.formatter)
        for condition in handler.filters:
            substitute.addFilter(condition)
        logger.removeHandler(handler)
        logger.addHandler(substitute)
        _left.append(handler)


def _shared_by_pool() -> Iterator[int]:
    for entry in Path("/dev/fd").iterdir():
        try:
            if _SHARED_BY_POOL in str(entry.readlink()):
                yield int(entry.name)
        except OSError:
            continue  # the descriptor of the listing itself


def _file_handlers() -> Iterator[tuple[logging.Logger, logging.FileHandler]]:
    known = logging.Logger.manager.loggerDict.values()
    for logger in (logging.getLogger(), *(each for each in known if isinstance(each, logging.Logger))):
        for handler in logger.handlers:
            if isinstance(handler, logging.FileHandler):
                yield logger, handler
