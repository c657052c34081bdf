"""Events as data, and the queue of a loop over them; what is told is in tests/kernel."""

from __future__ import annotations

import json
import threading
import time

import pytest

from rcon_plugins import Event, Pressure
from rcon_plugins.groups import events
from rcon_plugins.groups.events import Events
from rcon_plugins.kernel.events import Event as KernelEvent


def event(number: int = 1) -> Event:
    return Event(kind="oom_kill", group="g", cgroup="/rcon/g", count=number)


def told(*numbers: int) -> Events:
    queue = Events(None)
    for number in numbers:
        queue._add(event(number))
    return queue


def test_events_are_returned_in_order() -> None:
    queue = told(1, 2, 3)
    queue.close()
    assert [one.count for one in queue] == [1, 2, 3]
    assert queue.ended
    assert queue.get() is None


def test_waiting_for_one() -> None:
    queue = told()
    assert queue.get(0.01) is None
    assert not queue.ended
    threading.Timer(0.05, queue._add, (event(7),)).start()
    found = queue.get(20)
    assert found is not None
    assert found.count == 7


def test_another_thread_ends_the_loop() -> None:
    queue = told(1)
    threading.Timer(0.05, queue.close).start()
    assert [one.count for one in queue] == [1]


def test_the_oldest_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "_MOST_WAITING", 3)
    queue = told(1, 2, 3, 4, 5)
    queue.close()
    assert [one.count for one in queue] == [3, 4, 5]
    assert queue.dropped == 2


def test_closing_a_context_closes_the_watch() -> None:
    closed = []
    queue = told()
    queue._begin(lambda: closed.append(True))
    with queue:
        pass
    assert closed
    assert queue.ended


def test_from_the_kernel_to_a_policy() -> None:
    about = Event(kind="empty", group="p~k", cgroup="/rcon/p~k/1", policy="p", key="k", limit="each.")
    kernel = KernelEvent("memory_limit", "/rcon/p~k/1", time.monotonic(), 2, 5, 64.0, 63.0)
    own = about.replaced(kernel)
    assert (own.kind, own.group, own.policy, own.key, own.limit) == (
        "memory_limit",
        "p~k",
        "p",
        "k",
        "each.memory",
    )
    assert (own.count, own.total, own.bound, own.usage) == (2, 5, 64.0, 63.0)
    assert abs(own.time - time.time()) < 60
    assert about.replaced(KernelEvent("empty", "/rcon/p~k/1", 0.0)).limit == ""
    assert (
        about.replaced(KernelEvent("pressure", "/rcon/p~k/1", 0.0, resource="io", share="full")).resource
        == "io"
    )


def test_as_json() -> None:
    line = event().to_json()
    assert b"\n" not in line
    keys = json.loads(line)
    assert (keys["kind"], keys["group"], keys["key"], keys["count"]) == ("oom_kill", "g", None, 1)
    assert set(keys) == set(Event.__struct_fields__)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"resource": "disk"}, "not for 'disk'"),
        ({"resource": "io", "share": "half"}, '"some" or "full"'),
        ({"resource": "io", "window": 0.1, "stall": 0.1}, "between 0.5 s and 10 s"),
        ({"resource": "io", "window": 20.0}, "between 0.5 s and 10 s"),
        ({"resource": "io", "window": 2.0, "stall": 3.0}, "not within a window"),
        ({"resource": "io", "stall": 0.0}, "not within a window"),
    ],
)
def test_pressure_that_no_kernel_takes(arguments: dict[str, object], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        Pressure(**arguments)  # type: ignore[arg-type]


def test_pressure_as_the_kernel_reads_it() -> None:
    assert Pressure("memory", stall=0.15, window=1.0, share="full").trigger == "full 150000 1000000"
