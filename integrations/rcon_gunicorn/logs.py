"""The lines of the logger ``rcon`` go where gunicorn's errors go; executor processes have no log file of the server.

Source: gunicorn's ``glogging.py``.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator

#: gunicorn's own logger of errors and events.
_ERROR_LOG = "gunicorn.error"
_ACCESS_LOG = "gunicorn.access"
#: The parent of all loggers of this project.
_OURS = "rcon"


class _ToErrorLog(logging.Handler):
    """Hand each record to gunicorn's error log, to whatever handlers that has by then.

    gunicorn replaces its handlers at a reload and reopens their files, so they are not to be kept.
    """

    def emit(self, record: logging.LogRecord) -> None:
        log = logging.getLogger(_ERROR_LOG)
        if log.isEnabledFor(record.levelno):
            log.handle(record)


def join_error_log() -> None:
    """Let our logger write to gunicorn's error log, unless it was given handlers of its own."""
    logger = logging.getLogger(_OURS)
    if logger.handlers:
        return
    logger.addHandler(_ToErrorLog())
    logger.propagate = False
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.INFO)


def log_files(log: object) -> list[int]:
    """The descriptors of the files that gunicorn's logs go to, open for writing; ``log`` is the worker's logger.

    Not standard output and standard error, which executor processes have too.
    """
    streams = [handler.stream for _, handler in _file_handlers()]
    streams.append(getattr(log, "logfile", None))  # what capture_output has opened
    descriptors = {stream.fileno() for stream in streams if stream is not None and not stream.closed}
    return sorted(descriptor for descriptor in descriptors if descriptor > 2)


def leave_log_files() -> None:
    """In an executor process: let what is logged to gunicorn's logs go to standard error instead of their files.

    A handler would write to what is in the place of its file, or open the file again as whoever the work is.
    """
    for logger, handler in list(_file_handlers()):
        substitute = logging.StreamHandler()
        substitute.setLevel(handler.level)
        substitute.setFormatter(handler.formatter)
        for condition in handler.filters:
            substitute.addFilter(condition)
        logger.removeHandler(handler)
        logger.addHandler(substitute)
        _left.append(handler)


#: Kept, since a file object that nobody has closes its descriptor, and Python may warn of it.
_left: list[logging.Handler] = []


def _file_handlers() -> Iterator[tuple[logging.Logger, logging.FileHandler]]:
    for name in (_ERROR_LOG, _ACCESS_LOG):
        logger = logging.getLogger(name)
        for handler in logger.handlers:
            if isinstance(handler, logging.FileHandler):
                yield logger, handler
