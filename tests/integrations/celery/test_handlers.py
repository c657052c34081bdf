"""Where the handlers of Celery's signals run, and the contexts that reach the body of a task."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import celery
import pytest
import redis

from rcon_celery import handler_side, install
from rcon_plugins.errors import Killed, ResultTooLarge, SettingsError
from tests.forks import ROOT
from tests.integrations.celery import observed
from tests.integrations.celery.producers import closing
from tests.integrations.celery.redis_server import RedisServer
from tests.integrations.celery.worker import Worker
from tests.postgresql import PostgresServer
from tests.processes import until

PATIENCE = 60.0
POLICY = """
unmatched = "allow"

[policy.all]
each = { memory = "512M", timeout = "60s" }

[policy.once]
each = { memory = "512M" }
max_uses = 1

[policy.here]
cpu = "100%"
isolation = "inline"

[[route]]
task = "where"
policy = "once"

[[route]]
task = "inline"
policy = "here"

[[route]]
task = "celery.*"
policy = "all"

[[route]]
task = "*"
policy = "all"
"""


class Session(NamedTuple):
    """A worker, its producer, and what was noted."""

    worker: Worker
    app: celery.Celery
    client: redis.Redis

    def send(self, name: str, *args: Any, **options: Any) -> Any:
        return self.app.send_task(name, args, **options)

    def end(self, result: Any) -> Any:
        return result.get(timeout=PATIENCE, propagate=False)

    def notes(self, name: str) -> list[list[Any]]:
        found: Any = self.client.lrange(f"log:{name}", 0, -1)
        return [json.loads(line) for line in found]

    def postrun(self, result: Any) -> list[list[Any]]:
        """Return the notes of ``task_postrun``, once there are some."""
        until(lambda: any(note[0] == "postrun" for note in self.notes(result.id)), PATIENCE)
        return [note for note in self.notes(result.id) if note[0] == "postrun"]


Opener = Callable[..., contextlib.AbstractContextManager[Session]]


@pytest.fixture(scope="module")
def opener(redis_server: RedisServer, tmp_path_factory: pytest.TempPathFactory) -> Opener:
    folder, numbers = tmp_path_factory.mktemp("observed"), itertools.count()

    @contextlib.contextmanager
    def open_session(
        *arguments: str, policy: str = POLICY, pool: str = "prefork", concurrency: int = 1, **environ: str
    ) -> Iterator[Session]:
        directory, url = folder / str(next(numbers)), redis_server.database()
        directory.mkdir()
        (directory / "rcon.toml").write_text(policy)
        environ |= {observed.URL: url, observed.POLICY: str(directory / "rcon.toml")}
        worker = Worker(
            directory, observed.__name__, *arguments, pool=pool, concurrency=concurrency, environ=environ
        )
        app = celery.Celery("producer", broker=url, backend=url, set_as_current=False)
        with closing(app), contextlib.closing(redis.Redis.from_url(url)) as client, worker:
            yield Session(worker, app, client)

    return open_session


@pytest.fixture(scope="module")
def session(opener: Opener) -> Iterator[Session]:
    with opener() as session:
        yield session


def test_each_handler_runs_on_its_side(session: Session) -> None:
    result = session.send("echo", 1, kwargs={"two": 2})
    session.end(result)
    assert session.notes(result.id) == [
        ["prerun outside", False],
        ["prerun both", False],
        ["prerun", True, True, [1], {"two": 2}],
        ["prerun both", True],
        ["prerun late", True],
        ["postrun", True, "SUCCESS", "[[1], {'two': 2}]"],
    ]


@pytest.mark.parametrize(
    ("task", "states"),
    [
        ("fail", [["FAILURE", "KeyError('no')"]]),
        ("ignore", [["IGNORED", "Ignore()"]]),
        (
            "auto",
            [["RETRY", "Retry('Retry in None: ConnectionError(\\'the first time\\')')"], ["SUCCESS", "1"]],
        ),
    ],
)
def test_postrun_gets_the_state_and_the_value(session: Session, task: str, states: list[list[str]]) -> None:
    result = session.send(task)
    until(lambda: len(session.postrun(result)) == len(states), PATIENCE)
    found = session.postrun(result)
    assert [note[1] for note in found] == [True] * len(states)
    assert [note[2] for note in found] == [state for state, _ in states]
    assert [note[3].partition("(")[0] for note in found] == [text.partition("(")[0] for _, text in states]


def test_a_result_that_is_refused_is_a_failure(session: Session) -> None:
    result = session.send("too_large")
    assert isinstance(session.end(result), ResultTooLarge)
    (note,) = session.postrun(result)
    assert note[1:3] == [True, "FAILURE"]


def test_postrun_of_a_task_that_was_killed_runs_in_the_pools_process(session: Session) -> None:
    result = session.send("die")
    assert isinstance(session.end(result), Killed)
    (note,) = session.postrun(result)
    assert note[1:3] == [False, "FAILURE"]


def test_handlers_of_a_body_in_the_pools_process_run_once(session: Session) -> None:
    result = session.send("inline")
    assert session.end(result) is False
    assert sorted(note[0] for note in session.notes(result.id)) == [
        *("postrun", "prerun", "prerun both", "prerun late", "prerun outside")
    ]
    assert not any(note[1] for note in session.notes(result.id))


def test_a_handler_that_fails_is_logged(session: Session) -> None:
    session.end(session.send("echo"))
    until(lambda: "a handler that fails" in session.worker.log(), PATIENCE)
    assert "Signal handler <function prerun_fails" in session.worker.log()


def test_tasks_of_celery_itself_have_their_handlers(session: Session) -> None:
    """They are not confined."""
    result = session.send("celery.backend_cleanup")
    session.postrun(result)
    assert [note[:2] for note in session.notes(result.id) if note[0] == "prerun"] == [["prerun", False]]


@pytest.mark.parametrize("pool", ["prefork", "threads", "gevent", "solo"])
def test_handlers_of_processes_run_in_each_executor_process(opener: Opener, pool: str) -> None:
    with opener(pool=pool, policy=POLICY.replace('isolation = "inline"', "")) as session:
        served = [session.end(session.send("where")) for _ in range(3)]
        assert all(inside for _, inside in served)
        session.worker.stop()
        begun = {pid for inside, pid in session.notes("init") if inside}
        assert begun == {pid for pid, _ in served}  # a spare that served no task has not begun
        ended = [note for note in session.notes("shutdown") if note[0]]
        assert sorted(pid for _, pid, _, _ in ended) == sorted(begun)
        assert all(own and exitcode == 0 for _, _, own, exitcode in ended)
        assert not any(inside for inside, _ in session.notes("init outside"))


def test_a_process_that_ends_may_do_so_while_its_worker_ends(opener: Opener) -> None:
    """The worker ends just after the task, whose process is told to end then."""
    with opener(**{observed.SLOW_END: "1"}) as session:
        served = [session.end(session.send("where")) for _ in range(2)]
        session.worker.stop()
        ended = [pid for inside, pid, _, _ in session.notes("shutdown") if inside]
        assert set(ended) == {pid for pid, _ in served}


def test_sides_of_modules(opener: Opener) -> None:
    """The side of a handler itself is stronger."""
    sides = json.dumps({"tests.integrations.celery": "both", "tests.integrations.celery.observed": "outside"})
    with opener(**{observed.SIDES: sides}) as session:
        result = session.send("echo")
        session.end(result)
        session.postrun(result)
        until(lambda: len(session.notes(result.id)) == 6, PATIENCE)
        assert [note[:2] for note in session.notes(result.id)] == [
            ["prerun", False],
            ["prerun outside", False],
            ["prerun both", False],
            ["prerun late", False],
            ["prerun both", True],
            ["postrun", False],
        ]


def test_an_unknown_side_is_refused() -> None:
    with pytest.raises(SettingsError, match=r"'within' is no side of a handler.*one of: 'inside'"):
        handler_side("within")  # type: ignore[arg-type]
    app = celery.Celery("wrong", set_as_current=False)
    with pytest.raises(SettingsError, match=r"handler_sides\['a.b'\].*'everywhere'"):
        install(app, handler_sides={"a.b": "everywhere"})  # type: ignore[dict-item]


def test_opentelemetry(opener: Opener) -> None:
    """One span of each task, in the pool's process; the body's own below it; what the body sends below that."""
    with opener(**{observed.LIBRARIES: "opentelemetry"}) as session:
        trace, sender = "5af0de5af0de5af0de5af0de5af0de55", "abcdef1234567890"
        headers = {"traceparent": f"00-{trace}-{sender}-01"}
        session.end(session.send("observe", headers=headers))
        until(lambda: len(session.notes("spans")) == 4, PATIENCE)
        spans = {span[0]: span[1:] for span in session.notes("spans")}
        assert {span[0] for span in spans.values()} == {trace}
        assert spans["run/observe"][2:4] == [sender, False]
        assert spans["body"][2:4] == [spans["run/observe"][1], True]
        assert spans["apply_async/echo"][2:4] == [spans["body"][1], True]
        assert spans["run/echo"][2:4] == [spans["apply_async/echo"][1], False]
        session.end(session.send("die", headers=headers))
        until(lambda: len(session.notes("spans")) == 5, PATIENCE)
        assert session.notes("spans")[-1][0] == "run/die"
        assert session.notes("spans")[-1][5] == "ERROR"


def test_sentry(opener: Opener) -> None:
    """What the body captures belongs to the trace of the task; nothing is left for the next task."""
    with opener(**{observed.LIBRARIES: "sentry"}) as session:

        def events() -> list[list[Any]]:
            return [
                event for event in session.notes("events") if event[0] != "ValueError"
            ]  # of `prerun_fails`

        trace = "5af0de5af0de5af0de5af0de5af0de55"
        headers = {"headers": {"sentry-trace": f"{trace}-abcdef1234567890-1"}}
        for _ in range(2):
            assert "customer" not in session.end(session.send("observe", headers=headers))["left"]
        session.end(session.send("fail"))
        until(lambda: len(events()) == 3, PATIENCE)
        first, second, third = events()
        assert first == second == ["from the body", trace, {"customer": "acme"}, True]
        assert third[0] == "KeyError"
        assert "celery_task_id" in third[2]
        assert third[3] is False


def test_ddtrace(opener: Opener) -> None:
    environ = {observed.LIBRARIES: "ddtrace", "DD_TRACE_AGENT_URL": "http://127.0.0.1:9"}
    environ |= {"DD_INSTRUMENTATION_TELEMETRY_ENABLED": "false", "DD_REMOTE_CONFIGURATION_ENABLED": "false"}
    environ |= {"DD_CELERY_DISTRIBUTED_TRACING": "true"}
    with opener(**environ) as session:
        headers = {"x-datadog-trace-id": "1234", "x-datadog-parent-id": "5678"}
        seen = session.end(session.send("observe", headers=headers))
        assert seen["ddtrace"] == f"{1234:x}"


def test_structlog(opener: Opener) -> None:
    with opener(**{observed.LIBRARIES: "structlog"}) as session:
        for _ in range(2):
            result = session.send("observe")
            assert session.end(result)["structlog"] == {"task_id": result.id, "path": "/a"}


@pytest.mark.parametrize("confined", [True, False])
def test_each_body_runs_in_the_schema_of_its_tenant(
    redis_server: RedisServer, postgres_server: PostgresServer, tmp_path: Path, confined: bool
) -> None:
    url, database = redis_server.database(), postgres_server.database()
    environ = {
        "DJANGO_SETTINGS_MODULE": "tests.integrations.celery.tenants.settings",
        "SHOP_PORT": str(postgres_server.port),
        "SHOP_DATABASE": database,
        "SHOP_BROKER": url,
    }
    command = [sys.executable, "-m", "tests.integrations.celery.tenants.prepare", "acme", "bolt"]
    subprocess.run(command, cwd=ROOT, env={**os.environ, **environ}, check=True)
    if confined:
        (tmp_path / "rcon.toml").write_text(POLICY)
        environ["SHOP_POLICY"] = str(tmp_path / "rcon.toml")
    app = celery.Celery("producer", broker=url, backend=url, set_as_current=False)
    with (
        closing(app),
        Worker(tmp_path, "tests.integrations.celery.tenants.site", concurrency=2, environ=environ),
    ):
        for tenant in ("acme", "bolt", "bolt", "acme") * 5:
            sent = app.send_task("notes", headers={"_schema_name": tenant})
            assert sent.get(timeout=PATIENCE) == [tenant, [f"of {tenant}"]]
            child = app.send_task("send_notes", headers={"_schema_name": tenant}).get(timeout=PATIENCE)
            assert app.AsyncResult(child).get(timeout=PATIENCE) == [tenant, [f"of {tenant}"]]
        postgres_server.end_sessions(database)
        sent = [app.send_task("notes", headers={"_schema_name": "acme"}) for _ in range(10)]
        assert [one.get(timeout=PATIENCE) for one in sent] == [["acme", ["of acme"]]] * 10
