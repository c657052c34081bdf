"""Which outcomes are logged, and how often."""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Callable, Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rcon_plugins import Outcome, Usage, Work
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
        return [vars(record)["rcon"] for record in caplog.records]

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
    assert [vars(record)["rcon"]["work"] for record in caplog.records] == ["add", "sum"]


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


class Records(logging.Handler):
    """The records that the plugin makes."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.found.append(record)


def record_of(work: Work, outcome: Outcome) -> logging.LogRecord:
    handler = Records()
    log.LOGGER.addHandler(handler)
    try:
        Log().rcon_work_finished(work, outcome)
    finally:
        log.LOGGER.removeHandler(handler)
    (record,) = handler.found
    return record


REQUEST = {"host": "a.example", "remote_addr": "192.0.2.7", "request_id": "4bf92f3577b34da6"}
KILLED = Outcome(
    ending="memory",
    policy="tenant",
    key="a.example",
    limit="memory",
    detail="GET /report: memory limit 64M reached (peak 64.0 MiB)",
    usage=Usage(wall_seconds=0.21, cpu_seconds=0.17, memory_peak=67108864, oom_kills=1),
)


def test_a_line_is_for_people_and_the_fields_are_for_formatters() -> None:
    record = record_of(Work("request", "GET /report", REQUEST), KILLED)
    assert record.getMessage() == (
        "rcon: memory policy=tenant key=a.example limit=memory request_id=4bf92f3577b34da6 client=192.0.2.7: "
        "GET /report: memory limit 64M reached (peak 64.0 MiB)"
    )
    fields = vars(record)["rcon"]
    assert json.loads(json.dumps(fields)) == fields
    assert fields == {
        "event": "memory",
        "kind": "request",
        "work": "GET /report",
        "policy": "tenant",
        "key": "a.example",
        "limit": "memory",
        "signal": None,
        "needed_kill": None,
        "request_id": "4bf92f3577b34da6",
        "client": "192.0.2.7",
        "detail": "GET /report: memory limit 64M reached (peak 64.0 MiB)",
        "left_behind": 0,
        "count": 1,
        "usage": {
            "wall_seconds": 0.21,
            "cpu_seconds": 0.17,
            "memory_peak": 67108864,
            "rss_peak": None,
            "swap_peak": None,
            "io_read_bytes": None,
            "io_write_bytes": None,
            "oom_kills": 1,
        },
    }


def test_a_task_has_no_client_and_no_request_id() -> None:
    record = record_of(Work("task", "add", {"task": "add"}), Outcome(ending="timeout", detail="add: long"))
    assert record.getMessage() == "rcon: timeout: add: long"
    assert (vars(record)["rcon"]["client"], vars(record)["rcon"]["request_id"]) == (None, None)


ANY_TEXT = st.text(st.characters(codec=None, exclude_categories=()))  # lone surrogates, too


@given(ANY_TEXT, ANY_TEXT, ANY_TEXT, ANY_TEXT)
def test_clients_and_confined_code_forge_no_line_and_no_field(
    name: str, key: str, detail: str, client: str
) -> None:
    outcome = Outcome(ending="killed", policy="tenant", key=key, detail=detail)
    line = record_of(Work("request", name, {"remote_addr": client}), outcome).getMessage()
    assert line.isprintable()
    # Read from the left, what comes first is what the server says; a value of another form is a string of JSON.
    value = r'(?:"(?:[^"\\]|\\.)*"|[\w.~@/:+-]+)'
    found = re.match(rf"rcon: killed policy=tenant(?: key=({value}))?(?: client=({value}))?: ", line, re.A)
    assert found is not None
    for shown, real in zip(found.groups(), (key, client), strict=True):
        if real:
            assert shown is not None
            assert (json.loads(shown) if shown.startswith('"') else shown) == real


def test_long_values_are_cut() -> None:
    long = "x" * 100_000
    attributes: Mapping[str, str] = {"remote_addr": long, "request_id": "1"}
    outcome = Outcome(ending="killed", policy="tenant", key=long, detail=long)
    record = record_of(Work("request", long, attributes), outcome)
    assert len(record.getMessage()) < 4096
    assert len(json.dumps(vars(record)["rcon"])) < 8192


def test_what_work_left_behind_is_logged_once_for_each_key_and_minute(
    caplog: pytest.LogCaptureFixture, clock: Callable[[float], None]
) -> None:
    plugin, work = Log(), Work("request", "GET /", {})
    left = "GET /: 1 process that it left behind was ended; leave_children = true in the policy keeps them"

    def counts(*keys: str) -> list[int]:
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="rcon"):
            for key in keys:
                outcome = Outcome(ending="ok", policy="tenant", key=key, detail=left, left_behind=1)
                plugin.rcon_work_finished(work, outcome)
        return [vars(record)["rcon"]["count"] for record in caplog.records]

    assert counts("a", "b", "a", "a") == [1, 1]
    assert f"rcon: ok policy=tenant key=b: {left}" in caplog.text
    clock(61)
    assert counts("a", "b") == [3, 1]
    assert f"rcon: ok policy=tenant key=a count=3: {left}" in caplog.text
    assert counts("a") == []
    assert [vars(record)["rcon"]["event"] for record in caplog.records] == []


def test_an_id_is_made_only_for_a_line() -> None:
    """A request that ends well costs nothing of it."""

    class Attributes(dict[str, str]):
        def get(self, name: str, default: object = None) -> str:
            raise AssertionError(f"{name} was read")

    Log().rcon_work_finished(Work("request", "GET /", Attributes()), Outcome(ending="ok"))
