"""A task cannot forge lines of the worker's log by what it raises."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator
from typing import Any

import celery
import pytest
from celery._state import _task_stack

from rcon_celery.log_lines import NamedLines
from rcon_celery.results import record
from rcon_plugins.outcome import Outcome
from rcon_plugins.work import Usage

FORGED = "x\n[12:00: CRITICAL/MainProcess] forged \x1b[31mred\rover"


@pytest.fixture
def task() -> Iterator[Any]:
    app = celery.Celery("lines", broker="memory://", backend="cache+memory://", set_as_current=False)
    made: Any = app.task(nothing, name="t")
    _task_stack.push(made)
    made.push_request()
    yield made
    made.pop_request()
    _task_stack.pop()


@pytest.fixture
def log() -> tuple[logging.Logger, io.StringIO]:
    logger, text = logging.Logger("test"), io.StringIO()
    handler = logging.StreamHandler(text)
    handler.setFormatter(logging.Formatter("[worker] %(message)s"))
    logger.addHandler(handler)
    logger.addFilter(NamedLines())
    return logger, text


def nothing() -> None:
    """Do nothing."""


def ended(task: Any) -> None:
    outcome = Outcome(ending="error", policy="tenant", key="a b", usage=Usage(wall_seconds=0.1))
    record(task, outcome, send_event=False)


def raised(error: Exception) -> Any:
    try:
        raise error
    except Exception as caught:
        return (type(caught), caught, caught.__traceback__)


def test_each_line_of_a_failed_task_is_named(task: Any, log: tuple[logging.Logger, io.StringIO]) -> None:
    ended(task)
    log[0].error(
        "Task %(name)s retry: %(exc)s", {"name": "t", "exc": FORGED}, exc_info=raised(ValueError(FORGED))
    )
    first, *others = log[1].getvalue().splitlines()
    assert first == "[worker] Task t retry: x"
    assert others[:2] == [
        "[tenant a%20b] [12:00: CRITICAL/MainProcess] forged \\x1b[31mred",
        "[tenant a%20b] over",
    ]
    assert others[2] == "[tenant a%20b] Traceback (most recent call last):"
    assert others[4] == "[tenant a%20b]     raise error"
    assert all(line.startswith("[tenant a%20b] ") and line.isprintable() for line in others)


def test_a_message_of_one_line_stays(task: Any, log: tuple[logging.Logger, io.StringIO]) -> None:
    ended(task)
    log[0].info("Task %(name)s succeeded: 100%%", {"name": "t"})
    assert log[1].getvalue() == "[worker] Task t succeeded: 100%\n"


def test_a_flood_is_cut(task: Any, log: tuple[logging.Logger, io.StringIO]) -> None:
    ended(task)
    log[0].error("%s", "A" * 10**6, exc_info=raised(ValueError("\n" * 10**6)))
    assert len(log[1].getvalue()) < 2**17 + 2000 * 20
    assert log[1].getvalue().count("[...]") == 2


def test_lines_of_other_tasks_stay(task: Any, log: tuple[logging.Logger, io.StringIO]) -> None:
    log[0].error(FORGED)
    task.request.rcon_outcome = "from a message"
    log[0].error(FORGED)
    _task_stack.push(None)
    log[0].error(FORGED)
    _task_stack.pop()
    assert log[1].getvalue() == f"[worker] {FORGED}\n" * 3
