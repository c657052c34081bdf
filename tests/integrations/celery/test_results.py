"""The outcome of a task is stored with its result and sent as an event."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
from celery import Celery

from rcon_celery import outcome_of
from rcon_celery.results import add_to_backend
from rcon_plugins.errors import MemoryLimitExceeded
from tests.integrations.celery import limited
from tests.integrations.celery.redis_server import RedisServer
from tests.integrations.celery.sessions import SETTINGS, Sessions
from tests.processes import until


def test_in_the_metadata(sessions: Sessions) -> None:
    with sessions() as session:
        result = session.send("where")
        session.wait(result)
        outcome = outcome_of(result)
        assert outcome is not None
        assert (outcome.ending, outcome.policy) == ("ok", "where")
        assert outcome.usage.wall_seconds > 0
        assert outcome.usage.cpu_seconds is not None
        assert 0 < (outcome.usage.memory_peak or 0) < 128 * 2**20
        assert outcome.usage.oom_kills == 0

        result = session.send("hog")
        with pytest.raises(MemoryLimitExceeded):
            session.wait(result)
        outcome = outcome_of(result)
        assert outcome is not None
        assert (outcome.ending, outcome.limit) == ("memory", "each.memory")
        assert (outcome.usage.memory_peak or 0) > 60 * 2**20
        assert outcome.usage.oom_kills == 1

        result = session.send("plain")
        session.wait(result)
        assert outcome_of(result) is None


def test_a_backend_that_the_user_of_the_policy_cannot_use(sessions: Sessions, tmp_path: Path) -> None:
    """The executor process makes no backend. Only the pool's process stores results."""
    tmp_path.chmod(0o700)
    policy = '[policy.user]\nuser = "nobody"\n[[route]]\ntask = "plain"\npolicy = "user"\n'
    settings = SETTINGS + policy
    with sessions(settings=settings, concurrency=1, **{limited.BACKEND: f"file://{tmp_path}"}) as session:
        assert "/work/user/" in session.get("plain")["cgroup"]


def test_in_an_event(sessions: Sessions) -> None:
    with sessions("-E") as session:
        events: list[dict[str, Any]] = []

        def listen() -> None:
            with session.app.connection_for_read() as connection:

                def take(event: dict[str, Any]) -> None:
                    events.append(event)
                    receiver.should_stop = True

                receiver = session.app.events.Receiver(connection, handlers={"rcon-task": take})
                receiver.capture(limit=None, timeout=None, wakeup=False)

        thread = threading.Thread(target=listen, daemon=True)
        thread.start()
        until(lambda: bool(events) or not session.get("where"))  # until the listener is connected
        thread.join(10)
        event = events[0]
        assert (event["name"], event["ending"], event["policy"]) == ("where", "ok", "where")
        assert event["wall_seconds"] > 0


@pytest.mark.parametrize(
    ("setting", "backend"),
    [
        ("redis://127.0.0.1:1/3", "celery.backends.redis:RedisBackend"),
        ("cache+memory://", "celery.backends.cache:CacheBackend"),
        ("file:///tmp", "celery.backends.filesystem:FilesystemBackend"),
        ("celery.backends.redis:RedisBackend+redis://127.0.0.1:1/3", "celery.backends.redis:RedisBackend"),
        ("rpc://", "celery.backends.rpc:RPCBackend"),
    ],
)
def test_every_backend(setting: str, backend: str) -> None:
    app = Celery("any", backend=setting, set_as_current=False)
    plain = app.backend
    assert f"{type(plain).__module__}:{type(plain).__qualname__}" == backend
    app = Celery("any", backend=setting, set_as_current=False)
    add_to_backend(app)
    add_to_backend(app)  # a second call changes nothing
    assert isinstance(app.backend, type(plain))
    assert type(app.backend).__mro__[1].__name__ == "_StoresOutcomes"
    assert app.backend.as_uri(include_password=True) == plain.as_uri(include_password=True)
    app.close()


def test_a_setting_changed_before_the_first_use_counts() -> None:
    app = Celery("any", backend="redis://127.0.0.1:1/3", set_as_current=False)
    add_to_backend(app)
    app.conf.result_backend = "redis://127.0.0.1:1/4"
    assert app.backend.as_uri() == "redis://127.0.0.1:1/4"
    app.close()


def test_an_event_that_cannot_be_sent(sessions: Sessions, redis_server: RedisServer, tmp_path: Path) -> None:
    """The broker is gone when a task ends and its results are elsewhere: the task succeeds."""
    gate = tmp_path / "gate"
    with RedisServer(tmp_path) as broker:
        results = redis_server.database()
        with sessions("-E", url=broker.database(), RCON_TEST_BACKEND=results) as session:
            result = session.send("retried_late", "begun", str(gate))
            until(lambda: bool(session.log("begun")))
            broker.process.kill()
            broker.process.wait()
            gate.touch()
            assert session.wait(result) == "done"
            assert "its rcon-task event cannot be sent" in session.worker.log()
