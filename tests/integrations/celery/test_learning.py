"""A task that dies of memory is tried again with more; one that dies too often is not; no redelivery is for ever."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import redis

from rcon_celery import confined, outcome_of
from rcon_celery.retry.attempt import RetryPolicy
from rcon_plugins.errors import Killed, MemoryLimitExceeded, SettingsError
from rcon_plugins.settings.policy import Policy
from tests.integrations.celery import limited
from tests.integrations.celery.office import Office, Offices
from tests.integrations.celery.redis_server import RedisServer
from tests.integrations.celery.test_deaths import begins, fork_server, never_two_at_once, restore
from tests.integrations.celery.test_start import refused
from tests.processes import family, until

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
        outcome = outcome_of(result)
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
        assert result.children == []  # or whoever walks through them never comes to an end
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
            restore(second)
            until(lambda: len(second.log("counted")) == 2)
            os.kill(second.worker.pid, signal.SIGKILL)
            second.worker.process.wait()
        with offices(concurrency=1, url=office.url) as third:
            restore(third)
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
                until(lambda: not client.keys("rcon-lease-*"))


def test_deaths_are_counted_without_a_backend(offices: Offices, tmp_path: Path) -> None:
    """Where only the broker says that it delivered a message before."""

    def open_another(url: str | None = None) -> Office:
        office = later.enter_context(offices(concurrency=1, url=url, RCON_TEST_NO_BACKEND="1"))
        restore(office)
        return office

    def die(office: Office, runs: int) -> None:
        until(lambda: len(office.log("unkept")) == runs)
        os.kill(office.worker.pid, signal.SIGKILL)
        office.worker.process.wait()

    with contextlib.ExitStack() as later:
        first = open_another()
        first.send("learning_late", "unkept", str(tmp_path / "gate"))
        die(first, 1)
        second = open_another(first.url)
        die(second, 2)
        third = open_another(first.url)
        until(lambda: bool(dead_letters(third)))
        (letter,) = dead_letters(third)
        assert (letter["rcon_deaths"], letter["rcon_lost"]) == (0, 2)
        assert "2 times the process that ran it ended" in letter["rcon_reason"]
        assert len(third.log("unkept")) == 2


def test_a_dead_letter_is_tried_anew_and_goes_there_once(offices: Offices) -> None:
    """By a worker that takes them: not for ever, even where it is the one that sends them there."""
    with offices("-Q", "celery,dead", concurrency=1) as office:
        office.send("learning_in_vain", 900 * MIB)
        until(lambda: "is not sent there again" in office.worker.log())
        assert len(office.log("learning_in_vain")) == 2 + 2
        assert office.get("where")["confined"]
        assert len(office.log("learning_in_vain")) == 2 + 2
        assert dead_letters(office) == []


def test_a_task_replaced_by_itself_is_no_death(offices: Offices) -> None:
    """The next one of the same id may begin before the one that sent it has ended."""
    with offices(concurrency=3) as office:
        results = [office.send("replacing_late", 12) for _ in range(6)]
        assert [office.wait(result) for result in results] == ["done"] * 6


@pytest.mark.parametrize("name", ["late", "learning_late"])
def test_redelivered_while_it_runs(offices: Offices, tmp_path: Path, name: str) -> None:
    """When the visibility timeout of Redis is over: that is no death, and nothing runs twice."""
    gate = tmp_path / "gate"
    with offices(concurrency=2, **{limited.VISIBILITY: "2"}) as office:
        result = office.send(name, "slow", str(gate))
        until(lambda: "was delivered again while it is running" in office.worker.log())
        gate.touch()
        assert office.wait(result) == "done"
        until(lambda: "was delivered again and is ignored: it was done before" in office.worker.log())
        assert len(begins(office, "slow")) == 1
        assert office.get("where")["confined"]


def notes(office: Office) -> dict[str, dict[str, Any]]:
    """What the backend knows of runs."""
    with contextlib.closing(redis.Redis.from_url(office.url)) as client:
        keys: Any = client.keys("rcon-lease-*-0-0-0")
        found: dict[str, Any] = {key: client.get(key) for key in keys}
        return {key: json.loads(note) for key, note in found.items() if note}


def change_notes(office: Office, **changes: Any) -> None:
    with contextlib.closing(redis.Redis.from_url(office.url)) as client:
        for key, note in notes(office).items():
            client.set(key, json.dumps({**note, **changes}))


def test_a_run_that_could_not_say_that_it_is_under_way(offices: Offices, tmp_path: Path) -> None:
    """The backend was gone, or a clock has changed: it is not lost for that."""
    gate = tmp_path / "gate"
    with offices(concurrency=2, RCON_TEST_VISIBILITY="2") as office:
        result = office.send("late", "late", str(gate))

        def is_heard_of() -> bool:
            change_notes(office, beat=time.time() - 1000)
            return len(begins(office, "late")) > 1 or "again while it is running" in office.worker.log()

        until(is_heard_of)
        gate.touch()
        assert office.wait(result) == "done"
        assert len(begins(office, "late")) == 1


def test_lost_on_another_machine(offices: Offices, tmp_path: Path) -> None:
    """Where nobody knows its process, it is lost when it was seen twice that nobody says anything of it."""
    gate = tmp_path / "gate"
    with offices(concurrency=1) as office:
        result = office.send("late", "far", str(gate))
        until(lambda: len(begins(office, "far")) == 1 and bool(notes(office)))
        os.kill(office.worker.pid, signal.SIGKILL)
        office.worker.process.wait()
        change_notes(office, beat=time.time() - 1000, by=["another machine", 1, 1])
        with offices(concurrency=1, url=office.url) as second:
            restore(second)
            until(lambda: len(begins(second, "far")) == 2)
            assert "was delivered again while it is running" in second.worker.log()
            gate.touch()
            assert second.wait(result) == "done"


def test_the_backend_is_gone_when_it_begins(offices: Offices, tmp_path: Path) -> None:
    """It waits for that, in its process and then in its queue."""
    gate = tmp_path / "gate"
    with (
        RedisServer(tmp_path) as backend,
        offices(concurrency=1, RCON_TEST_BACKEND=backend.database()) as office,
    ):
        backend.process.kill()
        backend.process.wait()
        office.send("learning_late", "begun", str(gate), ignore_result=True)
        until(lambda: "sent back to its queue" in office.worker.log())
        assert office.log("begun") == []
        backend.begin()
        until(lambda: len(office.log("begun")) == 1)
        gate.touch()
        until(lambda: " succeeded in " in office.worker.log())


def test_a_soft_time_limit_while_the_backend_is_gone(offices: Offices, tmp_path: Path) -> None:
    """Celery's own ends a task that waits for the backend, too."""
    with (
        RedisServer(tmp_path) as backend,
        offices(concurrency=1, RCON_TEST_BACKEND=backend.database()) as office,
    ):
        backend.process.kill()
        backend.process.wait()
        office.send("learning_late", "begun", "", ignore_result=True, soft_time_limit=2)
        until(lambda: "SoftTimeLimitExceeded" in office.worker.log())
        assert "sent back to its queue" not in office.worker.log()
        assert office.log("begun") == []


def test_the_broker_is_gone_when_it_died(offices: Offices, redis_server: RedisServer, tmp_path: Path) -> None:
    """It cannot be tried again, and ends by what it died of."""
    gate = tmp_path / "gate"
    with RedisServer(tmp_path) as broker:
        results = redis_server.database()
        with offices(url=broker.database(), RCON_TEST_BACKEND=results) as office:
            result = office.send("learning", 200 * MIB, 0, str(gate))
            until(lambda: len(office.log("learning")) == 1)
            broker.process.kill()
            broker.process.wait()
            gate.touch()
            with pytest.raises(MemoryLimitExceeded, match="64M"):
                office.wait(result)


@pytest.mark.parametrize("backend", ["redis", "files"])
def test_lost_after_it_was_redelivered(offices: Offices, tmp_path: Path, backend: str) -> None:
    """The message that waits is the only one there is, if as several copies by then, of which one is run."""
    gate, results = tmp_path / "gate", tmp_path / "results"
    results.mkdir()
    environ = {limited.VISIBILITY: "2"} | (
        {limited.BACKEND: f"file://{results}"} if backend == "files" else {}
    )
    with offices(concurrency=2, **environ) as office:
        result = office.send("late", "slow", str(gate))
        until(lambda: "was delivered again while it is running" in office.worker.log())
        ((executor, _),) = begins(office, "slow")
        (process,) = [pid for pid in office.worker.children() if int(executor) in family(pid)]
        os.kill(process, signal.SIGKILL)
        until(lambda: len(begins(office, "slow")) >= 2)
        until(
            lambda: office.worker.log().count("it is running, and another duplicate waits for its end") >= 3
        )
        gate.touch()
        assert office.wait(result) == "done"
        assert len(begins(office, "slow")) == 2
        never_two_at_once(office, "slow")


def test_rejected_by_itself_is_no_death(offices: Offices) -> None:
    """A task that puts itself back into the queue, as often as it likes, has its turn each time at once."""
    with offices(concurrency=1) as office:
        result = office.send("rejecting_late", 6)
        assert office.wait(result) == "done"
        assert len(office.log("rejecting_late")) == 6
        assert "waits" not in office.worker.log()


@pytest.mark.parametrize(("name", "most"), [("learning_late", 2), ("late", 10)])
def test_fork_server_killed_at_each_delivery(offices: Offices, tmp_path: Path, name: str, most: int) -> None:
    with offices(concurrency=1) as office:
        result = office.send(name, "poison", str(tmp_path / "gate"))
        (process,) = office.worker.children()

        def kill(runs: int) -> None:
            until(lambda: len(begins(office, "poison")) == runs)
            os.kill(fork_server(process), signal.SIGKILL)

        for runs in range(1, most + 1):
            kill(runs)
        with pytest.raises(Killed, match=f"the process that ran it ended {most} times; not retried"):
            office.wait(result)
        assert len(begins(office, "poison")) == most
        assert len(dead_letters(office)) == (name == "learning_late")
        assert office.get("where")["confined"]
        assert office.worker.children() == [process]


TRIES = """
unmatched = "allow"

[policy.small]
each = { memory = "64M", timeout = "60s" }
on_memory = { expand = "2x", up_to = "512M" }
max_deaths = 4
dead_letter = "dead"

[[route]]
task = "eat"
policy = "small"
"""


def test_a_policy_says_it(offices: Offices) -> None:
    """For tasks whose code knows nothing of it."""
    with offices(settings=TRIES) as office:
        assert office.get("eat", 200 * MIB) == 200 * MIB
        assert len(office.log("eat")) == 3  # with 64, 128 and 256 MiB
        error = office.error("eat", MemoryLimitExceeded, 2000 * MIB)
        assert "memory limit 512M reached" in str(error)
        assert len(office.log("eat")) == 3 + 4
        (letter,) = dead_letters(office)
        assert (letter["task"], letter["rcon_deaths"]) == ("eat", 4)
        (answer,) = office.app.control.broadcast("rcon", reply=True, timeout=10, limit=1)
        told = answer["w@test"]["policies"]["small"]
        assert told["on_memory"] == {"expand": "2x", "up_to": "512M"}
        assert (told["max_deaths"], told["dead_letter"]) == (4, "dead")


def test_a_task_says_otherwise_than_its_policy(offices: Offices) -> None:
    with offices(settings=TRIES) as office:
        assert "memory limit 128M" in str(office.error("eat_twice", MemoryLimitExceeded, 2000 * MIB))
        assert len(office.log("eat_twice")) == 2
        assert [letter["task"] for letter in dead_letters(office)] == ["eat_twice"]


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ('"512M"', '"512MB"', "policy.small.on_memory.up_to: '512MB' is not a size"),
        (
            '"64M"',
            '"512M"',
            "policy.small.on_memory.up_to: 512M is not above each.memory = 512M (name more, or leave on_memory out)",
        ),
    ],
)
def test_a_policy_says_it_wrongly(offices: Offices, old: str, new: str, told: str) -> None:
    assert told in refused(offices, settings=TRIES.replace(old, new))


def test_what_it_gets() -> None:
    policy = Policy.make("small", each={"memory": "64M"}, on_memory={"expand": "2x", "up_to": "300M"})
    learning = RetryPolicy.of(policy, None)
    assert learning is not None
    assert learning.most_deaths == 3
    given = [learning.memory(policy, deaths) for deaths in range(5)]
    assert given == [None, 128 * MIB, 256 * MIB, 300 * MIB, 300 * MIB]
    assert learning.memory(Policy.make("free", pids=1), 2) is None
    assert RetryPolicy.of(Policy.make("free", pids=1), None) is None


def test_what_a_task_says_goes_before_its_policy() -> None:
    policy = Policy.make("small", max_deaths=5, dead_letter="dead")
    own = RetryPolicy.make({"max_deaths": 2, "on_memory": {"expand": "2x", "up_to": "300M"}})
    learning = RetryPolicy.of(policy, own)
    assert learning is not None
    assert (learning.most_deaths, learning.dead_letter) == (2, "dead")
    assert learning.on_memory is not None
    assert RetryPolicy.of(Policy.make("free", pids=1), own) == own


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"max_deaths": 0}, "max_deaths"),
        ({"max_deaths": "many"}, "max_deaths"),
        ({"on_memory": {"expand": "0.5x", "up_to": "1G"}}, "on_memory.expand"),
        ({"on_memory": {"expand": "2x"}}, "on_memory: the key 'up_to' is missing"),
        ({"on_memory": {"expand": "2x", "up_to": "1GB"}}, "on_memory.up_to"),
    ],
)
def test_faults(keywords: dict[str, Any], message: str) -> None:
    """Of a task that names a policy, and of one that says its limits itself."""
    with pytest.raises(SettingsError, match=f"^@confined.*{message}"):
        confined("small", **keywords)
    with pytest.raises(SettingsError, match=f"^@confined: {message}"):
        confined(memory="64M", **keywords)
