"""The policy of a task, and the settings with which a worker refuses to start."""

from __future__ import annotations

import pwd
from typing import Any

import celery
import celery.result
import pytest

from rcon_celery import confined, install
from rcon_plugins.errors import ConfinementError, MemoryLimitExceeded, SettingsError
from tests.integrations.celery import limited
from tests.integrations.celery.producers import closing
from tests.integrations.celery.sessions import SETTINGS, Sessions
from tests.processes import instance_directories, until

ROUTES = """
[policy.small]
memory = "1G"
each = { memory = "128M", timeout = "60s" }

[policy.slow]
cpu = "50%"

[[route]]
queue = "slow"
policy = "slow"

[[route]]
task = "pla*"
policy = "small"
"""


def test_cgroups_that_cannot_be_removed_are_logged_and_the_next_start_removes_them(
    sessions: Sessions,
) -> None:
    with sessions(settings=ROUTES, concurrency=1, **{limited.CANNOT_REMOVE: "1"}) as session:
        assert session.get("where")["confined"]
        worker = session.worker
    assert worker.process.returncode == 0
    assert "rcon: cgroups of this worker are left; the next start removes them: " in worker.log()
    assert "Signal handler" not in worker.log()  # which Celery says of an exception, with its traceback
    assert instance_directories(worker.pid)
    with sessions(settings=ROUTES, concurrency=1):
        assert not instance_directories(worker.pid)


def test_routes_and_names(sessions: Sessions) -> None:
    with sessions("-Q", "celery,slow", settings=ROUTES) as session:
        assert "/work/small/" in session.get("plain")["cgroup"]
        assert "/work/small/" in session.get("named")["cgroup"]
        assert "/work/slow/" in session.get("queued")["cgroup"]
        assert "/work/where/" in session.get("where")["cgroup"]
        # A policy without `each` limits also runs tasks in processes.
        assert session.get("queued")["pid"] not in session.worker.children()


def test_unmatched_is_refused(sessions: Sessions) -> None:
    with sessions(settings=ROUTES.replace("pla*", "nothing")) as session:
        error = session.error("plain", ConfinementError)
        assert "no route names 'plain'" in str(error)
        assert session.get("where")["confined"]
        # Celery's own tasks, which only look after others, are not confined.
        assert session.wait(celery.chord([session.app.tasks["double"].s(1)])(session.app.tasks["where"].si()))


@pytest.mark.parametrize("isolation", ["inline", "thread"])
def test_in_the_pool_itself(sessions: Sessions, isolation: str) -> None:
    policy = (
        f'[policy.here]\nisolation = "{isolation}"\npids = 100\n[[route]]\ntask = "*lain*"\npolicy = "here"\n'
    )
    with sessions(settings=SETTINGS + policy, concurrency=1) as session:
        found = session.get("plain")
        assert [found["pid"]] == session.worker.children()
        assert "/host/here" in found["threads"]
        error = session.error("complain", ValueError)
        assert str(error) == "no"


def test_limits_together(sessions: Sessions) -> None:
    """Two processes of the pool share one limit."""
    with sessions(settings=SETTINGS, concurrency=2) as session:
        assert session.get("share", 80 * 2**20) == 80 * 2**20
        results = [session.send("share", 80 * 2**20) for _ in range(2)]
        celery.result.ResultSet(results, app=session.app).join(timeout=60, propagate=False)
        (error,) = [result.result for result in results if result.failed()]
        assert isinstance(error, MemoryLimitExceeded)
        assert (error.limit, error.policy) == ("memory", "share")


def test_without_a_result_backend(sessions: Sessions) -> None:
    """A result that is dropped need not be encodable."""
    with sessions(settings=SETTINGS, concurrency=1, RCON_TEST_NO_BACKEND="1") as session:
        session.send("unencodable", task_id="unencodable-1")
        until(lambda: "unencodable[unencodable-1] succeeded" in session.worker.log())
        assert ": <object object at 0x" in session.worker.log()


def test_traceback_of_a_task(sessions: Sessions) -> None:
    """It begins with the task's own first frame."""
    with sessions(settings=SETTINGS, concurrency=1) as session:
        result = session.send("raising")
        with pytest.raises(ValueError, match="mine"):
            session.wait(result)
        frames = [
            line
            for line in str(result.traceback).partition("The above exception")[0].splitlines()
            if "File" in line
        ]
        assert len(frames) == 1
        assert "limited.py" in frames[0]


def test_a_policy_with_a_user(sessions: Sessions) -> None:
    """The task connects to the broker as that user."""
    policy = '[policy.user]\nuser = "nobody"\n[[route]]\ntask = "who"\npolicy = "user"\n'
    with sessions(settings=SETTINGS + policy, concurrency=1) as session:
        result = session.send("who")
        assert session.wait(result) == pwd.getpwnam("nobody").pw_uid
        assert session.log("who") == ["MEETING"]


def refused(sessions: Sessions, *arguments: str, **options: Any) -> str:
    worker, app, _ = sessions.make(*arguments, **options)
    with closing(app):
        try:
            until(lambda: worker.process.poll() is not None)
            assert worker.process.returncode == 1, worker.log()
            assert not worker.cgroups()
            return worker.log()
        finally:
            worker.stop()


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        (None, ": there is no policy 'small' (add the policy to the settings, or write its limits)"),
        (SETTINGS + "[policy.x]\nmemroy = '1G'\n", "policy.x.memroy: unknown key (did you mean 'memory'?)"),
        (SETTINGS + "[policy.x]\nio.'/nowhere' = { read = '1M' }\n", "/nowhere"),
    ],
)
def test_wrong_settings(sessions: Sessions, settings: str | None, error: str) -> None:
    log = refused(sessions, settings=settings)
    assert error in log
    assert "Traceback" not in log


def test_an_unknown_pool(sessions: Sessions) -> None:
    log = refused(
        sessions, pool="custom", CELERY_CUSTOM_WORKER_POOL="tests.integrations.celery.pools:OwnPool"
    )
    assert (
        "the pool tests.integrations.celery.pools.OwnPool cannot be confined: rcon_celery does not know"
        in log
    )


def test_spawned_pool(sessions: Sessions) -> None:
    log = refused(sessions, RCON_TEST_SPAWN="1")
    assert "worker_pool_start_method" in log


def test_not_installed(sessions: Sessions) -> None:
    log = refused(sessions, **{limited.INSTALL: "no"})
    assert (
        "task die has @confined, but rcon_celery.install was not called for its application; call install(app)"
        in log
    )


def test_installed_too_late() -> None:
    app = celery.Celery("late", set_as_current=False)
    app.finalize()
    with pytest.raises(SettingsError, match="in use already"):
        install(app)


def test_installed_twice() -> None:
    app = celery.Celery("twice", set_as_current=False)
    install(app)
    with pytest.raises(SettingsError, match="installed already"):
        install(app)


def test_above_the_task() -> None:
    app = celery.Celery("above", set_as_current=False)

    @app.task(shared=False)
    def task() -> None: ...

    with pytest.raises(SettingsError, match=r"under @app\.task"):
        confined(memory="1M")(task)


@pytest.mark.parametrize(
    ("limits", "error"),
    [
        ({"memory": "1GB"}, "@confined: memory: '1GB' is not a size"),
        ({"memroy": "1G"}, "did you mean 'memory'"),
        ({"memory": "2G", "together": {"memory": "1G"}}, "@confined: memory: 2G is never reached"),
        ({"together": {"cpu": 0}}, "@confined: together.cpu: "),
        ({}, "no limit is given"),
    ],
)
def test_a_wrong_decorator(limits: dict[str, Any], error: str) -> None:
    with pytest.raises(SettingsError) as caught:
        confined(**limits)
    assert error in str(caught.value)


def test_a_name_and_limits() -> None:
    with pytest.raises(SettingsError, match="exclude each other"):
        confined("small", memory="1G")


def test_tasks_outside_of_workers_are_not_confined() -> None:
    app = celery.Celery("eager", set_as_current=False)
    app.conf.update(task_always_eager=True, result_backend="cache+memory://")
    install(app)

    @app.task(shared=False, bind=True)
    @confined(memory="64M")
    def add(self: Any, x: int, y: int) -> list[Any]:
        return [x + y, bool(self.request.id), self.request.is_eager]

    assert add(1, 2) == [3, False, False]
    assert add.delay(1, 2).get() == [3, True, True]
    assert add.apply((1, 2)).get() == [3, True, True]
    with pytest.raises(TypeError):
        add.delay(1)
