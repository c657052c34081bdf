"""The lines of the logger ``rcon`` go where gunicorn's errors go."""

from __future__ import annotations

import logging

#: gunicorn's own logger of errors and events.
_ERROR_LOG = "gunicorn.error"
#: Ours: the structured lines and the core, and the middleware's own.
_LOGGERS = ("rcon", "rcon_wsgi")


class _ToErrorLog(logging.Handler):
    """Hand each record to gunicorn's error log, to whatever handlers that has by then.

    gunicorn replaces its handlers at a reload and reopens their files, so they are not to be kept.
    """

    def emit(self, record: logging.LogRecord) -> None:
        log = logging.getLogger(_ERROR_LOG)
        if log.isEnabledFor(record.levelno):
            log.handle(record)


def join_error_log() -> None:
    """Let our loggers write to gunicorn's error log, except those that were given handlers of their own."""
    for name in _LOGGERS:
        logger = logging.getLogger(name)
        if logger.handlers:
            continue
        logger.addHandler(_ToErrorLog())
        logger.propagate = False
        if logger.level == logging.NOTSET:
            logger.setLevel(logging.INFO)
