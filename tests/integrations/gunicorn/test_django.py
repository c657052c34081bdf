"""Django and PostgreSQL under gunicorn: connections of each age, sessions that end, transactions left open."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import psycopg
import pytest

from tests.integrations.gunicorn.server import Gunicorn
from tests.postgresql import USER, PostgresServer
from tests.processes import until

LIBRARIES = Path(__file__).resolve().parent / "libraries"
#: How long connections of Django live (see libraries/django_shop.py).
KINDS = ("closed", "kept", "checked", "pooled")
#: At once.
CLIENTS = 4
SETTINGS = """
executor_started = "django_shop:started"

[policy.shop]
isolation = "process"
memory = "1G"
pids = 256
each = { timeout = "30s" }

[[route]]
policy = "shop"
"""


class Asked(NamedTuple):
    """One request: when it began, and how it ended."""

    kind: str
    name: str
    began: float
    status: int | str
    answer: Any


class Site:
    """A gunicorn with the project, and a database."""

    def __init__(self, gunicorn: Gunicorn, connection: psycopg.Connection[Any], *, confined: bool) -> None:
        self.gunicorn = gunicorn
        self.confined = confined
        self._connection = connection
        self._names = itertools.count()

    def ask(self, kind: str, view: str, query: str = "") -> Asked:
        name = f"{kind}-{view}-{next(self._names)}"
        began = time.monotonic()
        answer = self.gunicorn.get(f"/{kind}/{view}/{name}{query}")
        found = answer.json() if view != "stream" and answer.status == 200 else answer.body
        return Asked(kind, name, began, answer.status, found)

    def orders(self) -> dict[str, str]:
        """Return the names of the orders, and the number of the transaction that added each."""
        return dict(self._connection.execute("SELECT name, xmin::text FROM orders").fetchall())

    def end_sessions(self) -> int:
        """End all sessions of the project, as a restart of the database does. Return how many there were."""
        ended = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = ANY(%s)"
        return self._connection.execute(ended, [list(KINDS)]).rowcount

    def states(self, kind: str) -> list[str]:
        """Return the states of the sessions of this kind."""
        query = "SELECT state FROM pg_stat_activity WHERE application_name = %s"
        return [state for (state,) in self._connection.execute(query, [kind])]


@pytest.fixture(scope="module", params=[True, False], ids=["confined", "plain"])
def shop(
    postgres_server: PostgresServer, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[Site]:
    """A server, confined and not: what plain Django does, a confined one does too."""
    database = postgres_server.database()
    postgres_server.execute(database, "CREATE TABLE orders (name text)")
    gunicorn = Gunicorn(
        tmp_path_factory.mktemp("django"),
        SETTINGS,
        *("--pythonpath", str(LIBRARIES), "--worker-class", "gthread", "--threads", str(CLIENTS)),
        app="django_shop:app",
        health="/",
        confined=request.param,
        environ={
            "PGHOST": postgres_server.host,
            "PGPORT": str(postgres_server.port),
            "PGUSER": USER,
            "PGDATABASE": database,
        },
    )
    with gunicorn, postgres_server.connect(database) as connection:
        yield Site(gunicorn, connection, confined=request.param)


@pytest.mark.parametrize("kind", KINDS)
def test_no_transaction_crosses_from_one_request_to_another(shop: Site, kind: str) -> None:
    before = len(shop.orders())
    views = {"leave_open": 200, "stream": 200, "fail": 500}
    if shop.confined:
        views["die"] = 503  # a plain worker would be gone
    sessions = set()
    for number, (view, status) in enumerate(views.items()):
        assert shop.ask(kind, view).status == status
        until(lambda: "idle in transaction" not in shop.states(kind))
        after = shop.ask(kind, "order")
        assert after.answer["others"] == before + number, view
        assert shop.orders()[after.name] == after.answer["transaction"]
        sessions.add(after.answer["session"])
    assert len(shop.orders()) == before + len(views)
    if kind == "closed":
        assert len(sessions) == len(views)
        until(lambda: shop.states(kind) == [])
    else:
        assert set(shop.states(kind)) == {"idle"}


def test_after_a_restart_of_the_database_only_requests_under_way_fail(shop: Site) -> None:
    """Of each kind 25 requests, of all at once."""
    before = shop.orders().keys()
    with ThreadPoolExecutor(CLIENTS) as clients:
        asked = [clients.submit(shop.ask, kind, "order", "?seconds=0.02") for kind in 25 * KINDS]
        until(lambda: sum(one.done() for one in asked) >= 30)
        ended = shop.end_sessions()
        over = time.monotonic()
    found = [one.result() for one in asked]
    done = [one for one in found if one.status == 200]
    failed = [one for one in found if one.status != 200]
    assert [one for one in failed if one.status != 500] == []  # as Django answers
    assert len(failed) <= ended
    # Where connections are kept unchecked, a session that was idle fails one request that begins later.
    assert [one for one in failed if one.began > over and one.kind != "kept"] == []
    orders = {name: number for name, number in shop.orders().items() if name not in before}
    transactions = {one.name: one.answer["transaction"] for one in done}
    assert len(set(transactions.values())) == len(transactions)
    assert transactions.items() <= orders.items()
    # What the database has kept of others: of those that failed, which did not see its answer.
    assert orders.keys() - transactions.keys() <= {one.name for one in failed}
