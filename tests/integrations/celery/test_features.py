"""Features of Celery and of Python that assume something about the process of a task: with a plain worker and ours."""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import celery
import pytest
from billiard.exceptions import WorkerLostError
from celery.contrib.abortable import AbortableAsyncResult

from rcon_celery import outcome_of
from rcon_plugins.errors import Killed, MemoryLimitExceeded, PidsLimitExceeded
from tests.integrations.celery import features
from tests.integrations.celery.producers import closing
from tests.integrations.celery.redis_server import RedisServer
from tests.integrations.celery.sessions import Session
from tests.integrations.celery.worker import Worker
from tests.processes import alive, executor_pids, family, until

POOLS = ("prefork", "threads", "solo", "gevent")
FORMS = pytest.mark.parametrize("confined", [False, True], ids=["plain", "confined"])
#: No result within so many seconds is a hang.
PATIENCE = 60.0


class Opener:
    """Opens sessions, each with its own database unless ``url`` names one."""

    def __init__(self, server: RedisServer, directory: Path) -> None:
        self._server = server
        self._directory = directory
        self._numbers = itertools.count()

    @contextlib.contextmanager
    def __call__(
        self,
        *arguments: str,
        pool: str = "prefork",
        confined: bool = True,
        concurrency: int = 2,
        url: str | None = None,
        name: str = "w",
        **environ: str,
    ) -> Iterator[Session]:
        directory = self._directory / str(next(self._numbers))
        directory.mkdir()
        url = url or self._server.database()
        environ[features.REDIS] = url
        app = features.make({key: value for key, value in environ.items() if key != features.MODULES})
        worker = Worker(
            directory,
            features.__name__,
            *arguments,
            pool=pool,
            concurrency=concurrency,
            name=name,
            environ={**environ, **({features.CONFINED: "1"} if confined else {})},
        )
        with closing(app), worker, contextlib.closing(Session(worker, app, url, PATIENCE)) as session:
            yield session


@pytest.fixture(scope="module")
def opener(redis_server: RedisServer, tmp_path_factory: pytest.TempPathFactory) -> Opener:
    return Opener(redis_server, tmp_path_factory.mktemp("features"))


@pytest.fixture(scope="module")
def running(opener: Opener) -> Iterator[Callable[..., Session]]:
    """Return the one session of a pool, confined or not, that the tests of this module share."""
    with contextlib.ExitStack() as stack:
        opened: dict[tuple[str, bool], Session] = {}

        def session(pool: str = "prefork", *, confined: bool = True) -> Session:
            key = (pool, confined)
            if key not in opened:
                opened[key] = stack.enter_context(opener(pool=pool, confined=confined))
            return opened[key]

        yield session


# --- multiprocessing ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pool", "name", "arguments"),
    [
        ("prefork", "pool", ["multiprocessing", "fork"]),
        ("prefork", "pool", ["multiprocessing", "forkserver"]),
        ("prefork", "pool", ["multiprocessing", "spawn"]),
        ("prefork", "pool", ["billiard", "fork"]),
        ("prefork", "futures", ["fork"]),
        ("prefork", "futures", ["spawn"]),
        ("threads", "pool", ["multiprocessing", "fork"]),
        ("threads", "futures", ["fork"]),
        ("solo", "pool", ["multiprocessing", "fork"]),
        ("gevent", "futures", ["fork"]),
    ],
)
def test_a_pool_in_a_task(running: Any, pool: str, name: str, arguments: list[str]) -> None:
    assert running(pool).get(name, *arguments) == [0, 1, 4, 9, 16]


@pytest.mark.parametrize(
    ("pool", "library", "method"),
    [
        ("prefork", "multiprocessing", "fork"),
        ("prefork", "billiard", "spawn"),
        ("threads", "billiard", "fork"),
        ("solo", "multiprocessing", "fork"),
        ("gevent", "multiprocessing", "fork"),
    ],
)
def test_a_child_process_is_in_the_cgroups_of_its_task(
    running: Any, pool: str, library: str, method: str
) -> None:
    assert running(pool).get("process", library, method) is True


def test_a_manager_in_a_task(running: Any) -> None:
    assert running().get("manager") == {"a": 1}


def test_plain_celery_refuses_all_that(running: Any) -> None:
    """Plain Celery refuses it because of orphans. Billiard refuses nothing; there it is the same in both."""
    session = running(confined=False)
    with pytest.raises(AssertionError, match="daemonic processes are not allowed to have children"):
        session.get("pool", "multiprocessing", "fork")
    assert session.get("pool", "billiard", "fork") == [0, 1, 4, 9, 16]


@pytest.mark.parametrize("method", ["fork", "forkserver"])
def test_children_end_with_their_task(running: Any, method: str) -> None:
    child, executor, folder = running().get("leave_process", method)
    until(lambda: not alive(child) and not alive(executor))
    assert folder is None or not Path(folder).exists()


def test_children_count_in_the_limits(running: Any) -> None:
    with pytest.raises(PidsLimitExceeded):
        running().get("many_processes")
    with pytest.raises(MemoryLimitExceeded, match="memory limit 96M reached"):
        running().get("large_process")


# --- the exit status ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("how", ["status", "_exit", "thread"])
def test_the_exception_has_the_exit_status(running: Any, pool: str, how: str) -> None:
    with pytest.raises(Killed, match=r"end: process exited with status 3$") as caught:
        running(pool).get("end", how)
    assert caught.value.signal is None


@pytest.mark.parametrize(("how", "status"), [("none", 0), ("text", 1), ("huge", 3), ("negative", 255)])
def test_the_exit_status_is_that_of_python(running: Any, how: str, status: int) -> None:
    with pytest.raises(Killed, match=f"exited with status {status}$"):
        running().get("end", how)


def test_plain_celery_says_it_too(running: Any) -> None:
    with pytest.raises(WorkerLostError, match="exitcode 3"):
        running(confined=False).get("end", "status")


@pytest.mark.parametrize(
    ("pool", "confined"), [("prefork", False), ("prefork", True), ("threads", True), ("gevent", True)]
)
def test_exit_in_on_failure(running: Any, pool: str, confined: bool) -> None:
    """The result is stored before on_failure, which runs in the pool's process. The worker goes on."""
    session = running(pool, confined=confined)
    with pytest.raises(ValueError, match="no"):
        session.get("end_on_failure")
    assert session.get("add", 1, 2) == 3


# --- what a task sees and calls -------------------------------------------------------------------------------


CALLS: list[tuple[str, list[Any]]] = [
    ("surroundings", []),
    ("wait_for_child", [True]),
    ("states", []),
    ("again", []),
    ("replace_by", ["chord"]),
    ("replace_by", ["group"]),
    ("replace_by", ["chain"]),
]


@pytest.mark.parametrize(("name", "arguments"), CALLS)
def test_a_task_sees_the_same(running: Any, name: str, arguments: list[Any]) -> None:
    assert running().get(name, *arguments) == running(confined=False).get(name, *arguments)


@pytest.mark.parametrize("pool", ["threads", "solo", "gevent"])
def test_the_current_app_in_other_pools(running: Any, pool: str) -> None:
    seen = running(pool).get("surroundings")
    assert (seen["current_app"], seen["same app"], seen["worker task"]) == ("features", True, True)


@FORMS
def test_waiting_for_another_task_is_refused(running: Any, confined: bool) -> None:
    with pytest.raises(RuntimeError, match=r"Never call result\.get"):
        running(confined=confined).get("wait_for_child", False)


@FORMS
def test_a_chord_that_grows(running: Any, confined: bool) -> None:
    tasks = running(confined=confined).app.tasks
    whole = celery.chord([tasks["enlarge"].s(1), tasks["add"].s(1, 1)])(tasks["total"].s())
    assert whole.get(timeout=60) == 104


@pytest.mark.filterwarnings("ignore:Call to deprecated setex:DeprecationWarning")  # by Celery, of redis
@pytest.mark.parametrize(
    ("pool", "confined"),
    [("prefork", False), ("prefork", True), ("threads", True), ("solo", True), ("gevent", True)],
)
def test_a_task_that_can_be_aborted(running: Any, pool: str, confined: bool) -> None:
    session = running(pool, confined=confined)
    name = f"abortable-{next(NUMBERS)}"
    result = session.send("abortable", name)
    until(lambda: session.log(name) == ["begins False"])
    AbortableAsyncResult(result.id, app=session.app).abort()
    assert result.get(timeout=60) == "aborted"


# --- the pool changes -----------------------------------------------------------------------------------------


def restart_pool(session: Session, gate: Path, **arguments: Any) -> None:
    """Restart the pool; wait until it has none of the processes that it had.

    One of the two processes runs a task until the file ``gate`` is there. Celery wakes one idle process at a restart;
    another one would end only at its next task.
    """
    before = set(session.worker.children())
    answer = session.app.control.pool_restart(reply=True, timeout=60, limit=1, **arguments)
    assert answer == [{session.worker.name: {"ok": "reload started"}}]
    gate.touch()
    try:
        until(lambda: not before & set(session.worker.children()) and len(session.worker.children()) == 2)
    except AssertionError as error:
        now = {pid: Path(f"/proc/{pid}/wchan").read_text() for pid in session.worker.children()}
        raise AssertionError(f"{error}: {before} before, now {now}; {session.worker.log()[-4000:]}") from None


@FORMS
@pytest.mark.parametrize("reload", [False, True])
def test_pool_restart(opener: Opener, tmp_path: Path, confined: bool, reload: bool) -> None:
    """Running tasks end first. With ``reload`` the new processes have the module as it is now, else as it was."""
    module = tmp_path / "reloaded.py"
    module.write_text("VALUE = 1\n")
    environ: dict[str, Any] = {features.RESTARTS: "1", features.MODULES: str(tmp_path)}
    with opener(confined=confined, **environ) as session:
        assert session.get("helper") == 1
        gate = tmp_path / "gate"
        running = session.send("work_until", "restarted", str(gate))
        until(lambda: len(session.log("restarted")) == 1)
        executors = executor_pids(session.worker.cgroups())
        module.write_text("VALUE = 'two'\n")
        restart_pool(session, gate, modules=["reloaded"], reload=reload)
        assert running.get(timeout=60)
        assert len(session.log("restarted")) == 1
        assert not any(map(alive, executors))
        assert session.get("helper") == ("two" if reload else 1)
        if confined:
            with pytest.raises(MemoryLimitExceeded):
                session.get("hog")


@pytest.mark.parametrize("pool", ["threads", "solo", "gevent"])
def test_pool_restarts_are_refused_in_other_pools(opener: Opener, pool: str) -> None:
    """They reload modules in the worker. Executor processes would keep the code that it started with."""
    environ: dict[str, Any] = {features.RESTARTS: "1"}
    with pytest.raises(AssertionError) as caught, opener(pool=pool, **environ):
        pass
    assert "worker_pool_restarts = True cannot be confined" in str(caught.value)
    assert "prefork" in str(caught.value)


@FORMS
def test_autoscale(opener: Opener, confined: bool) -> None:
    """The pool grows to four processes under load and shrinks to one; no task is lost, and nothing is left."""
    environ: dict[str, Any] = {"AUTOSCALE_KEEPALIVE": "1"}
    with opener("--autoscale=4,1", confined=confined, **environ) as session:
        for _ in range(2):
            until(lambda: len(session.worker.children()) == 1)
            results = [session.send("work", "scaled", 0.5) for _ in range(12)]
            until(lambda: len(session.worker.children()) == 4)
            assert all(result.get(timeout=60) for result in results)
        assert len(session.log("scaled")) == 24
        until(lambda: len(session.worker.children()) == 1)
        (process,) = session.worker.children()
        # Executor processes of the processes that ended have ended, too.
        until(lambda: set(executor_pids(session.worker.cgroups())) <= set(family(process)))


# --- due later than Redis waits for an acknowledgement --------------------------------------------------------


def test_due_after_the_visibility_timeout(opener: Opener) -> None:
    """Redis delivers it several times, and plain Celery runs each delivery. Ours runs a task with early ack once."""
    environ: dict[str, Any] = {features.VISIBILITY: "12"}  # above the 10 seconds for which a duplicate waits
    with contextlib.ExitStack() as stack:
        sessions = {}
        for confined in (False, True):
            one = stack.enter_context(opener(confined=confined, concurrency=1, **environ))
            stack.enter_context(
                opener(confined=confined, concurrency=1, url=one.url, name="other", **environ)
            )
            sessions[confined] = one
        results = [
            one.send(name, name, 0.2, countdown=15)
            for one in sessions.values()
            for name in ("work", "work_late")
        ]
        for result in results:
            result.get(timeout=60)
        for one in sessions.values():
            until(functools.partial(is_idle, one))
        early, late = (
            {confined: len(one.log(name)) for confined, one in sessions.items()}
            for name in ("work", "work_late")
        )
    assert early[False] > 1
    assert early[True] == 1
    assert 1 <= late[True] <= late[False]


def is_idle(session: Session) -> bool:
    """Return whether no message waits or is held by a worker."""
    return session.redis.zcard("unacked_index") == 0 and session.redis.llen("celery") == 0


@FORMS
def test_a_lost_process_and_reject_on_worker_lost(running: Any, confined: bool) -> None:
    """The task runs again, as Celery has it."""
    session = running(confined=confined)
    name = f"lost-{next(NUMBERS)}"
    assert session.get("end_late", name) == "done"
    assert session.log(name) == ["run", "run"]


@FORMS
def test_a_lost_process_and_retry_on_worker_lost(running: Any, confined: bool) -> None:
    session = running(confined=confined)
    name = f"retried-{next(NUMBERS)}"
    with pytest.raises(Killed if confined else WorkerLostError, match="3"):
        session.get("end_retried", name)
    assert session.log(name) == ["run", "run"]


# --- result backends ------------------------------------------------------------------------------------------

BACKENDS = {
    "database": "db+sqlite:///{}/results.db",
    "rpc": "rpc://",
    "file": "file://{}",
}


@pytest.mark.parametrize("backend", BACKENDS)
def test_result_backends(opener: Opener, tmp_path: Path, backend: str) -> None:
    answers = {}
    calls = [*OF_A_BACKEND, ("again", backend != "rpc")]  # of rpc only the producer gets the state
    for confined in (False, True):
        folder = tmp_path / str(confined)
        folder.mkdir()
        environ: dict[str, Any] = {features.BACKEND: BACKENDS[backend].format(folder)}
        with opener(confined=confined, **environ) as session:
            answers[confined] = [outcome(session, *call) for call in calls]
            if confined:
                check_outcomes(session, has_metadata=backend != "database")
    assert answers[True] == answers[False]


OF_A_BACKEND: list[tuple[Any, ...]] = [
    ("add", 1, 2),
    ("raise", "no"),
    ("states",),
    ("replace_by", "group"),
    ("replace_by", "chord"),
    ("wait_for_child", True),
]


def outcome(session: Session, name: str, *arguments: Any) -> Any:
    """Return the result of a task, or its exception as text. Celery's rpc has no chords and no stored states."""
    try:
        return session.get(name, *arguments)
    except (ValueError, NotImplementedError) as error:
        return f"{type(error).__name__}: {error}"


def check_outcomes(session: Session, *, has_metadata: bool) -> None:
    """Check what is stored of a task that succeeded and of one that was killed at its limit."""
    result = session.send("add", 1, 2)
    assert result.get(timeout=60) == 3
    kept = outcome_of(result)
    assert (kept is not None and kept.ending == "ok") == has_metadata
    result = session.send("hog")
    with pytest.raises(MemoryLimitExceeded, match="hog: memory limit 64M reached") as caught:
        result.get(timeout=60)
    assert (caught.value.limit, caught.value.policy) == ("each.memory", "hog")
    assert caught.value.usage is not None
    kept = outcome_of(result)
    assert (kept is not None and kept.ending == "memory") == has_metadata


NUMBERS = itertools.count()
