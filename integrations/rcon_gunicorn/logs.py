"""The lines of the logger ``rcon`` go where gunicorn's errors go; executor processes have no log file of the server.

Source: gunicorn's ``glogging.py``.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from rcon_plugins.executors import fork_server

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
    descriptors = fork_server.open_log_files(_loggers())
    captured = getattr(log, "logfile", None)  # what capture_output has opened
    if captured is not None and not captured.closed:
        descriptors.add(captured.fileno())
    return sorted(descriptor for descriptor in descriptors if descriptor > 2)


def leaving_log_files() -> Callable[[], None]:
    """What, in an executor process, lets what is logged to gunicorn's logs go to standard error instead of files."""
    return fork_server.leaving_log_files(_loggers())


def _loggers() -> list[logging.Logger]:
    return [logging.getLogger(name) for name in (_ERROR_LOG, _ACCESS_LOG)]
