"""The lines of the logger ``rcon`` go where gunicorn's errors go."""

from __future__ import annotations

import logging

#: gunicorn's own logger of errors and events.
_ERROR_LOG = "gunicorn.error"
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
