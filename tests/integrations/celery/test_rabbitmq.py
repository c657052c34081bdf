"""Another broker than Redis: RabbitMQ, which knows itself when a worker is gone and delivers again at once."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from celery.exceptions import TaskRevokedError

from rcon_celery import outcome_of
from rcon_plugins.errors import Killed, MemoryLimitExceeded, PidsLimitExceeded, TimeLimitExceeded
from tests.integrations.celery import limited
from tests.integrations.celery.rabbitmq_server import RabbitServer
from tests.integrations.celery.sessions import Maker, Session, Sessions
from tests.integrations.celery.test_deaths import Gate, begins, fork_server, never_two_at_once, nothing_runs
from tests.processes import alive, until

QUEUES = ("classic", "quorum")


@pytest.fixture
def open_session(sessions: Sessions, rabbitmq_server: RabbitServer) -> Maker:
    """Opens an `Session` whose tasks come by a virtual host of this test."""
    broker: dict[str, Any] = {limited.AMQP: rabbitmq_server.host()}
    return functools.partial(sessions, **broker)


@pytest.fixture
def gate(tmp_path: Path) -> Gate:
    return Gate(tmp_path / "gate")


def message(session: Session, queue: str) -> dict[str, Any] | None:
    """Take a message out of a queue and return its headers; None if the queue is empty."""
    with session.app.connection_for_read() as connection:
        found: Any = connection.default_channel.basic_get(queue, no_ack=True)
        return None if found is None else dict(found.headers)


def test_each_end_has_its_exception(open_session: Maker) -> None:
    with open_session(concurrency=1) as session:
        pool = session.worker.children()
        result = session.send("where")
        assert session.wait(result)["confined"]
        outcome = outcome_of(result)
        assert outcome is not None
        assert outcome.ending == "ok"
        assert str(session.error("hog", MemoryLimitExceeded)).startswith("hog: memory limit 64M reached")
        session.error("hang", TimeLimitExceeded)
        session.error("fork", PidsLimitExceeded)
        assert session.error("die", Killed, "kill").signal == signal.SIGKILL
        assert session.get("soft_time") == "cleaned up"
        # No connection to the broker is open in an executor process.
        assert not [name for name in session.get("files") if name.startswith("TCP")]
        assert session.worker.children() == pool
        assert "WorkerLostError" not in session.worker.log()


def test_results_over_the_broker(open_session: Maker) -> None:
    with open_session(concurrency=1, **{limited.BACKEND: "rpc://"}) as session:
        result = session.send("hog")
        with pytest.raises(MemoryLimitExceeded, match="memory limit 64M reached") as caught:
            session.wait(result)
        assert caught.value.usage is not None
        outcome = outcome_of(result)
        assert outcome is not None
        assert outcome.ending == "memory"


def test_revoked(open_session: Maker) -> None:
    with open_session(concurrency=1) as session:
        result = session.send("stay", "revoked")
        until(lambda: bool(session.log("revoked")))
        result.revoke(terminate=True, signal="SIGKILL")
        with pytest.raises(TaskRevokedError):
            session.wait(result)
        nothing_runs(session, "revoked")
        assert session.get("where")["confined"]


@pytest.mark.parametrize("queue", QUEUES)
def test_worker_killed(open_session: Maker, gate: Gate, queue: str) -> None:
    """Another worker gets the message at once, perhaps before the first run ended."""
    open_session = functools.partial(open_session, **{limited.QUEUE_TYPE: queue})
    with open_session(concurrency=1) as session:
        result = session.send("late", "worker", str(gate.path))
        until(lambda: len(begins(session, "worker")) == 1)
        everybody = session.worker.family()
        with open_session(concurrency=1, url=session.url, name="other") as other:
            os.kill(session.worker.pid, signal.SIGKILL)
            session.worker.process.wait()
            until(lambda: len(begins(other, "worker")) == 2)
            until(lambda: not any(map(alive, everybody)))
            gate.open()
            assert other.wait(result) == "done"
            never_two_at_once(other, "worker")
            assert [confined for _, confined in begins(other, "worker")] == ["True", "True"]
            assert sum(line.startswith("ends") for line in other.log("worker")) == 1


def test_second_run_waits_until_the_first_is_dead(open_session: Maker, gate: Gate) -> None:
    """Even where the fork server, which kills the first run, is late."""
    with open_session(concurrency=1) as session:
        result = session.send("late", "slow", str(gate.path))
        until(lambda: len(begins(session, "slow")) == 1)
        first = int(begins(session, "slow")[0][0])
        server = fork_server(session.worker.children()[0])
        with open_session(concurrency=1, url=session.url, name="other") as other:
            os.kill(server, signal.SIGSTOP)
            try:
                os.kill(session.worker.pid, signal.SIGKILL)
                session.worker.process.wait()
                until(lambda: len(begins(other, "slow")) == 2)
                assert not alive(first)
                assert alive(server)
            finally:
                os.kill(server, signal.SIGCONT)
            gate.open()
            assert other.wait(result) == "done"
            never_two_at_once(other, "slow")
            until(lambda: not alive(server))


def test_pool_process_killed(open_session: Maker, gate: Gate) -> None:
    with open_session(concurrency=1) as session:
        result = session.send("late", "pool", str(gate.path))
        until(lambda: len(begins(session, "pool")) == 1)
        (process,) = session.worker.children()
        os.kill(process, signal.SIGKILL)
        until(lambda: len(begins(session, "pool")) == 2)
        gate.open()
        assert session.wait(result) == "done"
        never_two_at_once(session, "pool")


@pytest.mark.parametrize("queue", QUEUES)
def test_no_endless_redelivery(open_session: Maker, queue: str, tmp_path: Path) -> None:
    """A message with which one worker after the other dies goes to the dead-letter queue."""
    open_session = functools.partial(open_session, concurrency=1, **{limited.QUEUE_TYPE: queue})
    with open_session() as session:
        result = session.send("retried_late", "counted", str(tmp_path / "gate"))
        for deaths in (1, 2):
            with open_session(url=session.url) if deaths > 1 else contextlib.nullcontext(session) as one:
                until(lambda deaths=deaths: len(session.log("counted")) == deaths)  # type: ignore[misc]
                os.kill(one.worker.pid, signal.SIGKILL)
                one.worker.process.wait()
        with open_session(url=session.url) as last:
            with pytest.raises(Killed, match="2 times"):
                last.wait(result)
            assert len(last.log("counted")) == 2
            letter = message(last, "dead")
            assert letter is not None
            assert (letter["id"], letter["rcon_deaths"], letter["rcon_lost"]) == (result.id, 0, 2)
            assert "2 times" in letter["rcon_reason"]


def test_each_retry_has_more_memory(open_session: Maker) -> None:
    with open_session(concurrency=1) as session:
        assert session.get("retried", 200 * 2**20) == 200 * 2**20
        assert len(session.log("retried")) == 3
        session.error("retried_in_vain", MemoryLimitExceeded, 900 * 2**20)
        letter = message(session, "dead")
        assert letter is not None
        assert letter["rcon_deaths"] == 2
        assert "memory limit 128M reached" in letter["rcon_reason"]
        assert message(session, "dead") is None
