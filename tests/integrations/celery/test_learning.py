"""A task that dies of memory is tried again with more; one that dies too often is not; no redelivery is for ever."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import redis

from rcon_celery import told
from rcon_celery.learning import Learning
from rcon_plugins.errors import Killed, MemoryLimitExceeded, SettingsError
from rcon_plugins.policy import Policy
from tests.integrations.celery.office import Office, Offices
from tests.integrations.celery.test_deaths import put_back
from tests.processes import until

MIB = 2**20


def dead_letters(office: Office) -> list[dict[str, Any]]:
    """The headers of what lies in the queue ``dead``."""
    with contextlib.closing(redis.Redis.from_url(office.url)) as client:
        messages: Any = client.lrange("dead", 0, -1)
        return [json.loads(message)["headers"] for message in messages]


def test_more_each_time(offices: Offices) -> None:
    with offices() as office:
        result = office.send("learning", 200 * MIB)
        assert office.wait(result) == 200 * MIB
        assert len(office.log("learning")) == 3  # with 64, 128 and 256 MiB
        outcome = told(result)
        assert outcome is not None
        assert 200 * MIB < (outcome.usage.memory_peak or 0) <= 256 * MIB
        # What it was given was for itself: the next begins with what its policy says.
        assert office.get("learning", MIB) == MIB
        assert office.get("learning", 100 * MIB) == 100 * MIB
        assert len(office.log("learning")) == 3 + 1 + 2


def test_its_answer_may_be_as_long_as_its_own_memory(offices: Offices) -> None:
    with offices() as office:
        assert len(office.get("learning", 0, 70 * MIB)) == 70 * MIB


def test_a_retry_is_no_death(offices: Offices) -> None:
    """The next try may begin before the one that sent it has ended."""
    with offices(concurrency=3) as office:
        results = [office.send("retrying_late") for _ in range(6)]
        assert [office.wait(result) for result in results] == [20] * 6


def test_no_more_than_up_to(offices: Offices) -> None:
    with offices() as office:
        error = office.error("learning", MemoryLimitExceeded, 2000 * MIB)
        assert "memory limit 512M reached" in str(error)
        assert len(office.log("learning")) == 4  # 64, 128, 256, 512
        assert dead_letters(office) == []


def test_too_many_deaths(offices: Offices) -> None:
    """Across the restart of a worker too: the count is in the message."""
    with offices() as office:
        result = office.send("learning_in_vain", 900 * MIB)
        with pytest.raises(MemoryLimitExceeded, match="128M"):
            office.wait(result)
        assert len(office.log("learning_in_vain")) == 2
        (letter,) = dead_letters(office)
        assert letter["id"] == result.id
        assert letter["task"] == "learning_in_vain"
        assert letter["rcon_deaths"] == 2
        assert "memory limit 128M reached" in letter["rcon_reason"]


def test_deaths_of_workers_are_counted(offices: Offices, tmp_path: Path) -> None:
    """No endless redelivery of a message under which one worker after the other dies."""
    with offices(concurrency=1) as office:
        result = office.send("learning_late", "counted", str(tmp_path / "gate"))
        until(lambda: len(office.log("counted")) == 1)
        os.kill(office.worker.pid, signal.SIGKILL)
        office.worker.process.wait()
        with offices(concurrency=1, url=office.url) as second:
            put_back(second)
            until(lambda: len(second.log("counted")) == 2)
            os.kill(second.worker.pid, signal.SIGKILL)
            second.worker.process.wait()
        with offices(concurrency=1, url=office.url) as third:
            put_back(third)
            with pytest.raises(Killed, match="2 times"):
                office.wait(result)
            assert len(third.log("counted")) == 2
            (letter,) = dead_letters(third)
            assert letter["id"] == result.id
            # An end of the usual kind leaves no count.
            gate = tmp_path / "open"
            gate.touch()
            assert third.get("learning_late", "well", str(gate)) == "done"
            with contextlib.closing(redis.Redis.from_url(office.url)) as client:
                until(lambda: not client.keys("rcon-runs-*"))


def test_what_it_gets() -> None:
    learning = Learning.make({"on_memory": {"expand": "2x", "up_to": "300M"}, "timeout": "1s"})
    assert learning is not None
    policy = Policy.make("small", each={"memory": "64M"})
    given = [learning.memory(policy, deaths) for deaths in range(5)]
    assert given == [None, 128 * MIB, 256 * MIB, 300 * MIB, 300 * MIB]
    assert learning.memory(Policy.make("free", pids=1), 2) is None
    assert Learning.make({"memory": "64M"}) is None


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"max_deaths": 0}, "max_deaths"),
        ({"max_deaths": "many"}, "max_deaths"),
        ({"on_memory": {"expand": "0.5x", "up_to": "1G"}}, "on_memory.expand"),
        ({"on_memory": {"expand": "2x"}}, "up_to="),
        ({"on_memory": {"expand": "2x", "up_to": "1GB"}}, "on_memory.up_to"),
    ],
)
def test_faults(keywords: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        Learning.make(keywords)
