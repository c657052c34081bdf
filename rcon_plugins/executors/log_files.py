"""The log files of a server, which executor processes must not have: who has one open for writing may empty it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from functools import partial

#: Kept, since a file object that nobody has closes its descriptor, and Python may warn of it.
_left: list[logging.Handler] = []


def open_log_files(loggers: Iterable[logging.Logger]) -> set[int]:
    """The descriptors of the files that these loggers write to, in this process."""
    streams = [handler.stream for _, handler in _file_handlers(loggers)]
    return {stream.fileno() for stream in streams if stream is not None and not stream.closed}


def leaving_log_files(loggers: Iterable[logging.Logger]) -> Callable[[], None]:
    """What, in an executor process, lets what these loggers write to files go to standard error.

    A handler would write to what is in the place of its file, or open the file again as whoever the work is. Which
    there are is seen here: to look at each logger there is takes a new process a while.
    """
    return partial(_leave, list(_file_handlers(loggers)))


def _leave(found: Iterable[tuple[logging.Logger, logging.FileHandler]]) -> None:
    for logger, handler in found:
        substitute = logging.StreamHandler()
        substitute.setLevel(handler.level)
        substitute.setFormatter(handler.formatter)
        for condition in handler.filters:
            substitute.addFilter(condition)
        logger.removeHandler(handler)
        logger.addHandler(substitute)
        _left.append(handler)


def _file_handlers(loggers: Iterable[logging.Logger]) -> Iterator[tuple[logging.Logger, logging.FileHandler]]:
    for logger in loggers:
        for handler in logger.handlers:
            if isinstance(handler, logging.FileHandler):
                yield logger, handler
