"""Which tracebacks in a server's log the soak takes for a failure."""

from __future__ import annotations

import pytest

from tests.soak.logs import unexpected

TRACEBACK = """Traceback (most recent call last):
  File "a.py", line 1, in work
    raise ValueError(1)
ValueError: 1
"""
FAILED = (
    "[2026-11-30 22:18:50: ERROR/ForkPoolWorker-2] Task own.fail[1-fail] raised unexpected: ValueError(1)\n"
)
OTHER = "[2026-11-30 22:18:50: ERROR/ForkPoolWorker-2] the supervisor of executor processes failed in <x>\n"
PREFIX = "[tenant] [2026-11-30 22:18:50: WARNING/ForkPoolWorker-2] "


def named(text: str) -> str:
    return "".join(f"[own anna.example:80] {line}" for line in text.splitlines(True))


@pytest.mark.parametrize(
    ("log", "count"),
    [
        pytest.param(FAILED + TRACEBACK, 0, id="of-a-task"),
        pytest.param(
            FAILED + TRACEBACK + "\nThe above exception was …\n\n" + TRACEBACK, 0, id="with-its-cause"
        ),
        pytest.param(FAILED + named(TRACEBACK), 0, id="named"),
        pytest.param(OTHER + named(TRACEBACK), 1, id="named-of-a-server"),
        pytest.param(OTHER + TRACEBACK, 1, id="of-a-server"),
        pytest.param(FAILED + TRACEBACK + OTHER + TRACEBACK, 1, id="after-that-of-a-task"),
        pytest.param(TRACEBACK, 1, id="alone"),
        pytest.param(FAILED + "".join(PREFIX + line for line in TRACEBACK.splitlines(True)), 1, id="printed"),
        pytest.param("Exception ignored in: <function f>\n", 1, id="ignored"),
        pytest.param(OTHER, 0, id="no-traceback"),
    ],
)
def test_tracebacks_that_no_task_explains(log: str, count: int) -> None:
    assert len(unexpected(log)) == count


def test_the_line_before_and_the_exception_are_shown() -> None:
    (shown,) = unexpected(OTHER + TRACEBACK)
    assert "failed in <x>" in shown
    assert "ValueError: 1" in shown
