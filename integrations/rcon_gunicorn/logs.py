"""Send the logger ``rcon`` to gunicorn's error log, and keep the server's log files from executor processes.

Source: gunicorn's ``glogging.py``.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from rcon_plugins.executors import log_files
from rcon_plugins.executors.output import Log, log_of

#: gunicorn's own loggers.
_ERROR_LOG = "gunicorn.error"
_ACCESS_LOG = "gunicorn.access"
#: The parent of all loggers of this project.
_OURS = "rcon"


class _ToErrorLog(logging.Handler):
    """Passes each record to the current handlers of gunicorn's error log.

    gunicorn replaces its handlers and reopens their files at a reload, so do not keep them.
    """

    def emit(self, record: logging.LogRecord) -> None:
        log = logging.getLogger(_ERROR_LOG)
        if log.isEnabledFor(record.levelno):
            log.handle(record)


def join_error_log() -> None:
    """Make the logger ``rcon`` write to gunicorn's error log, unless it has handlers of its own."""
    logger = logging.getLogger(_OURS)
    if logger.handlers:
        return
    logger.addHandler(_ToErrorLog())
    logger.propagate = False
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.INFO)


def error_log() -> Log:
    """Return gunicorn's error log, for the output of executor processes: its file, else standard error."""
    return log_of([logging.getLogger(_ERROR_LOG)])


def open_log_files(log: object) -> list[int]:
    """Return the descriptors of gunicorn's log files, which are open for writing. ``log`` is the worker's logger.

    Leave out standard output and standard error, which executor processes have too.
    """
    found = log_files.open_log_files(_loggers())
    captured = getattr(log, "logfile", None)  # opened by capture_output
    if captured is not None and not captured.closed:
        found.add(captured.fileno())
    return sorted(descriptor for descriptor in found if descriptor > 2)


def leaving_log_files() -> Callable[[], None]:
    """Return a function that makes gunicorn's loggers in an executor process write to standard error, not to files."""
    return log_files.leaving_log_files(_loggers())


def _loggers() -> list[logging.Logger]:
    return [logging.getLogger(name) for name in (_ERROR_LOG, _ACCESS_LOG)]
