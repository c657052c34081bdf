"""Read the log of a server: a traceback that no task explains is a problem."""

from __future__ import annotations

import re

_BEGIN = "Traceback (most recent call last):"
#: Celery logs the exception of each task that failed with its traceback. The judgement of its result has counted it.
_TASK_FAILED = re.compile(r"Task (\S+)\[\S+\] raised unexpected: |Task handler raised error: ")
#: What the worker puts before each line that a task brings into the log. Its own lines begin with the date.
_NAME = re.compile(r"^\[[a-z][^\]]*\] ")
#: Lines of Python that say that something went wrong without a traceback of its own.
_ALARMING = ("Exception ignored in", "Exception in thread", "Fatal Python error", "Segmentation fault")


def unexpected(log: str) -> list[str]:
    """Return each unexpected traceback, shortened, with the line before it."""
    found = []
    lines = log.splitlines()
    for index, line in enumerate(lines):
        text = _text(line)
        if text.startswith(_BEGIN) and not (text == _unnamed(line) and _is_explained(lines, index)):
            found.append(" | ".join([*lines[max(0, index - 1) : index], *_shortened(lines, index)]))
        elif text.startswith(_ALARMING):
            found.append(line)
    return found


def _text(line: str) -> str:
    """Return a line without what Celery, or rcon for an executor process, puts before a line of standard error."""
    return re.sub(r"^(\[[^\]]*\] )+", "", line)


def _unnamed(line: str) -> str:
    """Return a line of a task's traceback without the name of its policy and key, which the worker puts before it."""
    return _NAME.sub("", line)


def _is_explained(lines: list[str], index: int) -> bool:
    """Return whether the traceback at this index belongs to a task that failed, or to the cause of its exception."""
    for line in reversed(lines[:index]):
        if _TASK_FAILED.search(line):
            return True
        if re.match(r"[\[0-9]", _unnamed(line)):  # another line of the log
            return False
    return False


def _shortened(lines: list[str], index: int) -> list[str]:
    """Return the last lines of a traceback: where, and the exception."""
    end = index + 1
    while end < len(lines) and _text(lines[end]).startswith((" ", "\t")):
        end += 1
    return [_text(line).strip() for line in lines[max(index + 1, end - 4) : end + 1]]
