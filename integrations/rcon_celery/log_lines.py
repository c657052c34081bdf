"""Write each line that a task brings into the worker's log under the name of its policy and key.

Celery logs how a task ended, with the message and traceback of its exception. A task chooses both, and so could write
lines that look like those of the worker.
"""

from __future__ import annotations

import logging
from typing import Final

from celery._state import get_current_task

from rcon_celery.results import recorded
from rcon_plugins.executors.output import escape_unprintable, log_prefix, prefix_lines

#: The logger of the lines about how tasks ended.
_LOGGER: Final = "celery.app.trace"
#: The most characters and lines of a message, and of a traceback, that are logged.
_MOST_CHARACTERS, _MOST_LINES = 64 * 1024, 2000
_CUT: Final = "[...]"


class NamedLines(logging.Filter):
    """Changes the records of confined tasks: prefixes each line but the first, and escapes control characters."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Change the record. Return True: all records are logged."""
        task = get_current_task()
        outcome = recorded(task) if task is not None else None
        if outcome is None:
            return True
        prefix = log_prefix(outcome.policy, outcome.key)
        message = record.getMessage()
        if not message.isprintable() or len(message) > _MOST_CHARACTERS:
            first, *others = _shortened(message).splitlines() or [""]
            further = prefix_lines("\n".join(others), prefix).rstrip("\n")
            record.msg = "\n".join([escape_unprintable(first), *([further] if further else [])])
            record.args = ()
        if record.exc_info:
            text = record.exc_text or logging.Formatter().formatException(record.exc_info)
            # A formatter uses the text if there is one.
            record.exc_text = prefix_lines(_shortened(text), prefix).rstrip("\n")
        return True


def name_lines() -> None:
    """Install the filter in this process. To install it again changes nothing."""
    logging.getLogger(_LOGGER).addFilter(_FILTER)


_FILTER: Final = NamedLines()


def _shortened(text: str) -> str:
    """Return the text without its middle if it has too many characters or lines."""
    if len(text) > _MOST_CHARACTERS:
        half = _MOST_CHARACTERS // 2
        text = f"{text[:half]}\n{_CUT}\n{text[-half:]}"
    lines = text.splitlines()
    if len(lines) > _MOST_LINES:
        half = _MOST_LINES // 2
        text = "\n".join([*lines[:half], _CUT, *lines[-half:]])
    return text
