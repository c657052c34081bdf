"""Which outcomes are logged, and how often."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable

import pytest

from rcon_plugins import Outcome, Work
from rcon_plugins.builtin import log
from rcon_plugins.builtin.log import Log

Tell = Callable[..., list[dict[str, object]]]


@pytest.fixture
def tell(caplog: pytest.LogCaptureFixture) -> Tell:
    """Tell a new plugin of refused requests of these hosts. Return the lines that it logs."""
    plugin = Log()

    def told(*hosts: str, ending: str = "unroutable") -> list[dict[str, object]]:
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="rcon"):
            for host in hosts:
                work = Work("request", f"GET {host}", {"host": host} if host else {})
                plugin.rcon_work_finished(work, Outcome(ending=ending))  # type: ignore[arg-type]
        return [json.loads(record.getMessage()) for record in caplog.records]

    return told


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Set the time."""
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def advance(seconds: float) -> None:
        now[0] += seconds

    return advance


def test_a_request_without_a_route_is_logged_once_for_each_host_and_minute(
    tell: Tell, clock: Callable[[float], None]
) -> None:
    assert [line["work"] for line in tell("a", "b", "a", "a")] == ["GET a", "GET b"]
    clock(59)
    assert tell("a", "b") == []
    clock(2)
    first, second = tell("a", "a", "b")
    assert (first["work"], first["count"]) == ("GET a", 4)
    assert (second["work"], second["count"]) == ("GET b", 2)


def test_hosts_that_clients_invent_share_one_line(tell: Tell, clock: Callable[[float], None]) -> None:
    hosts = [f"host{number}" for number in range(10 * log._MOST_HOSTS)]
    assert len(tell(*hosts)) == log._MOST_HOSTS + 1
    clock(61)
    assert [line["work"] for line in tell("one more", "yet one")] == ["GET one more", "GET yet one"]
    assert tell(*hosts)[-1]["count"] == 9 * log._MOST_HOSTS


def test_tasks_have_a_line_for_each_name(caplog: pytest.LogCaptureFixture) -> None:
    plugin = Log()
    with caplog.at_level(logging.WARNING, logger="rcon"):
        for name in ("add", "sum", "add"):
            plugin.rcon_work_finished(Work("task", name, {}), Outcome(ending="unroutable"))
    assert [json.loads(record.getMessage())["work"] for record in caplog.records] == ["add", "sum"]


def test_what_was_not_told_of_a_forgotten_host_counts_with_the_others(
    tell: Tell, clock: Callable[[float], None]
) -> None:
    first, *others = (f"host{number}" for number in range(log._MOST_HOSTS))
    assert len(tell(first, first, first, *others)) == log._MOST_HOSTS
    clock(61)
    tell("another")
    many = [f"more{number}" for number in range(log._MOST_HOSTS)]
    assert tell(*many)[-1]["count"] == 3


def test_what_ends_by_a_limit_is_always_logged(tell: Tell) -> None:
    assert [line["event"] for line in tell("a", "a", ending="memory")] == ["memory"] * 2
    assert tell("a", ending="ok") == []
