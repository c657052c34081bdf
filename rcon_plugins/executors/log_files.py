"""The files that loggers of the host write to. Executor processes must not have them."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial

from rcon_plugins.kernel import process

#: Keeps the removed handlers, because an unreferenced file object would close its descriptor and warn.
_removed_handlers: list[logging.Handler] = []


def open_log_files(loggers: Iterable[logging.Logger]) -> set[int]:
    """Return the descriptors of the files that these loggers write to, in this process.

    Executor processes must not have them: a process with a file open for writing may truncate it.
    """
    streams = [handler.stream for _, handler in _file_handlers(loggers)]
    return {stream.fileno() for stream in streams if stream is not None and not stream.closed}


def open_files_named(part: str) -> set[int]:
    """Return the descriptors of the files of this process that have ``part`` in their path. Raises OSError."""
    return {file.descriptor for file in process.open_files() if part in file.path}


def leaving_log_files(loggers: Iterable[logging.Logger]) -> Callable[[], None]:
    """Return a function for ``after_fork`` that makes these loggers write to standard error instead of files.

    In an executor process the handler's descriptor may belong to another file, or the handler may open its file again
    as the user of the work. The handlers are looked up here, because visiting every logger takes a new process a while.
    """
    return partial(_replace_handlers, list(_file_handlers(loggers)))


def _replace_handlers(found: Iterable[tuple[logging.Logger, logging.FileHandler]]) -> None:
    for logger, handler in found:
        # Not sys.stderr, which Celery replaces with a stream that writes to these loggers.
        substitute = logging.StreamHandler(sys.__stderr__)
        substitute.setLevel(handler.level)
        substitute.setFormatter(handler.formatter)
        for condition in handler.filters:
            substitute.addFilter(condition)
        logger.removeHandler(handler)
        logger.addHandler(substitute)
        _removed_handlers.append(handler)


def _file_handlers(loggers: Iterable[logging.Logger]) -> Iterator[tuple[logging.Logger, logging.FileHandler]]:
    for logger in loggers:
        for handler in logger.handlers:
            if isinstance(handler, logging.FileHandler):
                yield logger, handler
