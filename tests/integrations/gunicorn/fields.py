"""A logger of gunicorn that writes the fields of each record of rcon behind its line, as JSON."""

from __future__ import annotations

import json
import logging
from typing import Any

from gunicorn.glogging import Logger  # type: ignore[import-untyped]

MARK = " fields="


class FieldsFormatter(logging.Formatter):
    """The formatter that it replaces, and the fields."""

    def format(self, record: logging.LogRecord) -> str:
        fields = getattr(record, "rcon", None)
        return super().format(record) + ("" if fields is None else MARK + json.dumps(fields))


class FieldsLogger(Logger):  # type: ignore[misc]
    """gunicorn's own logger, with that formatter in its error log."""

    def setup(self, cfg: Any) -> None:
        super().setup(cfg)
        for handler in self.error_log.handlers:
            handler.setFormatter(FieldsFormatter(self.error_fmt, self.datefmt))


def fields_in(log: str) -> list[dict[str, Any]]:
    """Return the fields of the lines of a log, in their order."""
    return [json.loads(line.rpartition(MARK)[2]) for line in log.splitlines() if MARK in line]
