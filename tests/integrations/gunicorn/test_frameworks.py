"""The recipes of docs/howto/frameworks.md, each with the real library."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.directories import let_others_read
from tests.integrations.gunicorn.server import Gunicorn
from tests.integrations.gunicorn.tenants import TENANTS
from tests.integrations.gunicorn.test_libraries import Collector, collector
from tests.postgresql import PostgresServer
from tests.processes import until

__all__ = ["collector"]  # a fixture

PAGE = Path(__file__).resolve().parents[3] / "docs" / "howto" / "frameworks.md"
RECIPES = {
    found["module"]: found["text"]
    for found in re.finditer(
        r"^<!-- app -->\n```python\n(?P<text># (?P<module>\w+)\.py\n.*?)^```$", PAGE.read_text(), re.M | re.S
    )
}
UID = TENANTS["tenant1"]
SETTINGS = f"""
executor_started = "{{module}}:started"

[policy.free]
user = {UID}
group = {UID}
memory = "256M"
pids = 64
each = {{{{ timeout = "5s" }}}}

[[route]]
policy = "free"
"""


def server(
    directory: Path,
    module: str,
    *arguments: str,
    started: bool = True,
    more: str = "",
    keep: str = "",
    **environ: str,
) -> Gunicorn:
    """A server with the application of a recipe; ``started`` as the recipe says, or without its function.

    ``more`` stands in the settings before the policy of the recipe, ``keep`` in that policy.
    """
    let_others_read(directory)
    source = directory / f"{module}.py"
    # A user of the requests may be unable to read the interpreter's files.
    source.write_text("import encodings.idna\n" + RECIPES[module].replace("/tmp/rcon-", f"{directory}/"))
    settings = SETTINGS.format(module=module)
    if not started:
        settings = settings.replace("executor_started", "#")
    settings = settings.replace("\n[policy.free]", f"{more}\n[policy.free]\n{keep}")
    return Gunicorn(
        directory,
        settings,
        "--pythonpath",
        str(directory),
        *arguments,
        app=f"{module}:app",
        health="/",
        environ={"HOME": "/", **environ},
    )


def test_each_recipe_of_the_page_is_run() -> None:
    tests = Path(__file__).read_text()
    assert sorted(RECIPES) == sorted(name for name in RECIPES if f'"{name}"' in tests)
    assert len(RECIPES) >= 10


def test_fastapi(tmp_path: Path) -> None:
    with server(tmp_path, "fastapi_app") as gunicorn:
        answers = [gunicorn.get("/") for _ in range(3)]
        assert [answer.json() for answer in answers] == [{"hello": "world"}] * 3
        assert len(gunicorn.executors()) == 1


def test_sqlalchemy(tmp_path: Path) -> None:
    with server(tmp_path, "sqlalchemy_app") as gunicorn:
        assert {gunicorn.get("/").body for _ in range(3)} == {b"42"}


@pytest.mark.parametrize("started", [True, False])
def test_a_queue_of_log_records(tmp_path: Path, started: bool) -> None:
    with server(tmp_path, "queue_app", started=started) as gunicorn:
        assert gunicorn.get("/").body == b"logged"
        if started:
            until(lambda: "[free] a line from the shop" in gunicorn.log())
        else:
            assert "do not run in executor processes: 'Thread-1 (_monitor)'" in gunicorn.log()
            assert "a line from the shop" not in gunicorn.log()


def test_flask(tmp_path: Path) -> None:
    (tmp_path / "example.db").touch()
    with server(tmp_path, "flask_app", started=False) as gunicorn:
        assert {gunicorn.get("/").body for _ in range(3)} == {b"42"}
        assert len(gunicorn.executors()) == 1


def test_caches(tmp_path: Path) -> None:
    with server(tmp_path, "cache_app", started=False) as gunicorn:
        assert gunicorn.get("/").json() == {"hit": True}


def test_sentry(tmp_path: Path, collector: Collector) -> None:
    dsn = collector.address.replace("://", "://key@") + "/1"
    with server(tmp_path, "sentry_example", started=False, SENTRY_DSN=dsn) as gunicorn:
        assert gunicorn.status("/fails") == 500
        until(lambda: collector.has("/api/1/envelope", "no such article"))


def test_schedulers(tmp_path: Path) -> None:
    """As the page runs it."""
    (tmp_path / "scheduler_app.py").write_text(RECIPES["scheduler_app"])
    rcon = [str(Path(sys.executable).with_name("rcon")), "run", "--memory", "512M", "--cpu", "50%"]
    process = subprocess.Popen(
        [*rcon, "--", sys.executable, "-m", "scheduler_app"], cwd=tmp_path, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "reported\n"
        assert process.stdout.readline() == "reported\n"
    finally:
        process.terminate()
        process.communicate()


@pytest.fixture
def database(postgres_server: PostgresServer) -> PostgresServer:
    """A PostgreSQL with the database and the user of the recipes."""
    postgres_server.execute("postgres", "drop database if exists shop")
    postgres_server.execute("postgres", "drop role if exists tenant")
    postgres_server.execute("postgres", "create database shop")
    postgres_server.execute("postgres", "create role tenant superuser login")
    return postgres_server


def connections_of(database: PostgresServer) -> int:
    found = database.execute("shop", "select count(*) from pg_stat_activity where usename = 'tenant'")
    return int(found[0][0])


@pytest.mark.parametrize("module", ["psycopg_app", "django_app"])
def test_connections_of_postgresql(tmp_path: Path, database: PostgresServer, module: str) -> None:
    """Each executor process has one, also where the application connected while it was loaded."""
    recipe = RECIPES[module]
    RECIPES[module] = recipe.replace("/run/postgresql", database.host)
    try:
        with server(
            tmp_path, module, PGHOST=database.host, PGPORT=str(database.port), PGUSER="tenant"
        ) as gunicorn:
            at_load = 1 if module == "django_app" else 0  # that of the worker
            for _ in range(5):
                assert gunicorn.get("/").body == b"42"
            assert len(gunicorn.executors()) == 1
            until(lambda: connections_of(database) == at_load + 1)
        assert "Traceback" not in gunicorn.log()
        until(lambda: connections_of(database) == 0)
    finally:
        RECIPES[module] = recipe


METRICS = f"""
[policy.metrics]
isolation = "process"

[policy.root]
isolation = "process"
max_uses = 1

[policy.other]
user = {TENANTS["tenant2"]}
group = {TENANTS["tenant2"]}
max_uses = 1
keep_files = ["{{directory}}"]

[[route]]
path = "/metrics"
policy = "metrics"

[[route]]
path = "/root"
policy = "root"

[[route]]
path = "/other"
policy = "other"

"""
#: More than live at once: the worker, and of each policy the one that serves, its successor and those that end.
MOST_NAMES = 24


def figures(gunicorn: Gunicorn) -> dict[str, float]:
    lines = gunicorn.get("/metrics").body.decode().splitlines()
    return {
        name: float(value) for name, value in (line.split() for line in lines if not line.startswith("#"))
    }


def test_prometheus_client(tmp_path: Path) -> None:
    """A thousand executor processes of three users: as few files as live at once, and no count is lost."""
    directory = tmp_path / "metrics"
    directory.mkdir()
    directory.chmod(0o1777)
    more = METRICS.format(directory=directory)
    keep = f'keep_files = ["{directory}"]'
    with server(
        tmp_path, "metrics_app", started=False, more=more, keep=keep, PROMETHEUS_MULTIPROC_DIR=str(directory)
    ) as gunicorn:
        before = figures(gunicorn)["shop_requests_total"]
        pids = {gunicorn.get(path).body for _ in range(500) for path in ("/root", "/other")}
        assert len(pids) > 900, "the kernel gives a pid again when it has gone around"
        assert figures(gunicorn)["shop_requests_total"] == before + 1000
        locks = {file.stem for file in directory.glob("*.lock")}
        files = list(directory.glob("*.db"))
        assert len(locks) <= MOST_NAMES
        assert len(files) <= 2 * len(locks)  # one for counters, one for the gauge
        # one that dies within a request was never counted down
        assert gunicorn.status("/die") == 503
        until(lambda: figures(gunicorn).get("shop_busy", 0) == 0)
        assert figures(gunicorn)["shop_requests_total"] == before + 1001
