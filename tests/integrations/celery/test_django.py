"""Django in a worker: what Celery's fix-up and handlers of signals do beside the body of a confined task."""

from __future__ import annotations

import contextlib
import itertools
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import celery
import pytest

from tests.forks import ROOT
from tests.integrations.celery.producers import closing
from tests.integrations.celery.redis_server import RedisServer
from tests.integrations.celery.worker import Worker
from tests.postgresql import PostgresServer
from tests.processes import until

PATIENCE = 60.0
SITE = "tests.integrations.celery.shop.site"
POLICY = """
unmatched = "allow"

[policy.shop]
each = { memory = "256M", timeout = "60s" }

[[route]]
task = "*"
policy = "shop"
"""


class DjangoWorker(NamedTuple):
    """A worker of the project, its producer, and its database."""

    worker: Worker
    app: celery.Celery
    postgres: PostgresServer
    database: str

    def send(self, name: str, *args: Any, **options: Any) -> Any:
        return self.app.send_task(name, args, **options)

    def get(self, name: str, *args: Any, **options: Any) -> Any:
        return self.send(name, *args, **options).get(timeout=PATIENCE)

    def sql(self, statement: str, *values: object) -> list[tuple[Any, ...]]:
        return self.postgres.execute(self.database, statement, *values)

    def sessions(self, state: str = "%") -> list[int]:
        """Return the pids of the sessions of this database in this state, but for our own."""
        found = self.sql(
            "SELECT pid FROM pg_stat_activity WHERE datname = %s AND state LIKE %s AND pid <> pg_backend_pid()",
            self.database,
            state,
        )
        return [pid for (pid,) in found]


Opener = Callable[..., contextlib.AbstractContextManager[DjangoWorker]]


@pytest.fixture(scope="module")
def opener(
    redis_server: RedisServer, postgres_server: PostgresServer, tmp_path_factory: pytest.TempPathFactory
) -> Opener:
    folder, numbers = tmp_path_factory.mktemp("shops"), itertools.count()
    common = {
        "DJANGO_SETTINGS_MODULE": "tests.integrations.celery.shop.settings",
        "SHOP_PORT": str(postgres_server.port),
    }
    template = postgres_server.database()
    command = [sys.executable, "-m", "tests.integrations.celery.shop.migrate"]
    environment = {**os.environ, **common, "SHOP_DATABASE": template, "SHOP_BROKER": "memory://"}
    subprocess.run(command, cwd=ROOT, env=environment, check=True)

    @contextlib.contextmanager
    def open_worker(
        *arguments: str, confined: bool = True, pool: str = "prefork", concurrency: int = 2, **environ: str
    ) -> Iterator[DjangoWorker]:
        directory = folder / str(next(numbers))
        directory.mkdir()
        database, url = postgres_server.database(template), redis_server.database()
        environ |= {**common, "SHOP_DATABASE": database, "SHOP_BROKER": url}
        if confined:
            policy = directory / "rcon.toml"
            policy.write_text(POLICY)
            environ["SHOP_POLICY"] = str(policy)
        worker = Worker(directory, SITE, *arguments, pool=pool, concurrency=concurrency, environ=environ)
        app = celery.Celery("producer", broker=url, backend=url, set_as_current=False)
        with closing(app), worker:
            yield DjangoWorker(worker, app, postgres_server, database)

    return open_worker


@pytest.fixture(scope="module", params=[True, False], ids=["confined", "plain"])
def shop(opener: Opener, request: pytest.FixtureRequest) -> Iterator[DjangoWorker]:
    """A worker, confined and not: what plain Celery does, a confined worker does too."""
    with opener(confined=request.param) as shop:
        yield shop


def test_each_task_has_a_new_connection(shop: DjangoWorker) -> None:
    """With ``CONN_MAX_AGE = 0`` Celery closes the connections before and after each task."""
    sessions = [shop.get("count")[2] for _ in range(4)]
    assert len(set(sessions)) == 4
    until(lambda: not shop.sessions(), 10)


def test_after_a_restart_of_the_database_only_tasks_under_way_fail(shop: DjangoWorker) -> None:
    results = [shop.send("count", 0.02) for _ in range(100)]
    until(lambda: sum(result.ready() for result in results) >= 30)
    under_way = shop.postgres.end_sessions(shop.database)
    answers = [result.get(timeout=PATIENCE, propagate=False) for result in results]
    failed = [answer for answer in answers if not isinstance(answer, list)]
    assert len(failed) <= under_way <= 2
    assert {type(error).__name__ for error in failed} <= {"OperationalError"}
    assert len(answers) == 100


def test_no_transaction_crosses_from_one_task_to_another(shop: DjangoWorker) -> None:
    before = shop.get("count")[0]
    for number in range(4):
        seen, _, _ = shop.get("leave_open", f"never {number}")
        assert seen == before + 1  # its own row, and no other task's
    assert [shop.get("count")[0] for _ in range(8)] == [before] * 8
    until(lambda: not shop.sessions("idle in transaction%"), 10)
    shop.get("order", "kept")
    assert shop.get("count")[0] == before + 1


def test_the_body_sees_what_handlers_of_prerun_set(shop: DjangoWorker) -> None:
    for language in ("de", "en", "de"):
        task, seen, spoken = shop.get("context", headers={"language": language})
        assert (seen, spoken) == (task, language)


@pytest.mark.parametrize("pool", ["threads", "gevent", "solo"])
def test_other_pools(opener: Opener, pool: str) -> None:
    with opener(pool=pool) as shop:
        test_the_body_sees_what_handlers_of_prerun_set(shop)
        test_no_transaction_crosses_from_one_task_to_another(shop)


def test_results_and_periodic_tasks_in_the_database(opener: Opener) -> None:
    """django-celery-results stores them in the pool's process; its connection survives a restart, too."""
    arguments = ("-B", "--scheduler", "django_celery_beat.schedulers:DatabaseScheduler")
    with opener(*arguments, SHOP_BACKEND="django-db") as shop:
        table = "django_celery_results_taskresult"

        def ended(name: str) -> int:
            query = f"SELECT count(*) FROM {table} WHERE task_name = %s AND status = 'SUCCESS'"
            return int(shop.sql(query, name)[0][0])

        def has_ended(name: str, number: int) -> bool:
            return ended(name) >= number

        for number in range(1, 3):
            for _ in range(10):
                shop.send("count", ignore_result=False)
            until(partial(has_ended, "count", 10 * number), PATIENCE)
            shop.postgres.end_sessions(shop.database)
            time.sleep(0.1)
        ((every,),) = shop.sql(
            "INSERT INTO django_celery_beat_intervalschedule (every, period) VALUES (1, 'seconds') RETURNING id"
        )
        columns = "name, task, interval_id, args, kwargs, headers, description, enabled, one_off"
        columns += ", total_run_count, date_changed"
        shop.sql(
            f"INSERT INTO django_celery_beat_periodictask ({columns}) VALUES "
            "('often', 'context', %s, '[]', '{{}}', '{{}}', '', true, false, 0, now())".replace("{{}}", "{}"),
            every,
        )
        shop.sql(
            "INSERT INTO django_celery_beat_periodictasks (ident, last_update) VALUES (1, now()) "
            "ON CONFLICT (ident) DO UPDATE SET last_update = now()"
        )
        until(partial(has_ended, "context", 3), PATIENCE)
        errors = "SELECT status, result FROM {} WHERE status <> 'SUCCESS'"
        assert shop.sql(errors.format(table)) == []


def test_django_structlog(opener: Opener) -> None:
    """It says once that a task began and ended; the body has its context."""
    with opener(concurrency=1, SHOP_STRUCTLOG="1") as shop:
        for _ in range(2):
            sent = shop.send("logged", headers={"__django_structlog__": {"user": "nina"}})
            assert sent.get(timeout=PATIENCE) == {"task_id": sent.id, "user": "nina"}
        shop.worker.stop()
        assert shop.worker.log().count("task_started") == 2
        assert shop.worker.log().count("task_succeeded") == 2


def test_log_has_no_errors(opener: Opener) -> None:
    """A handler that fails is logged, as plain Celery does; those of these tests do not."""
    with opener() as shop:
        shop.get("count")
        shop.worker.stop()
        assert "raised" not in shop.worker.log()
