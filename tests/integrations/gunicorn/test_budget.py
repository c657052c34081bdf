"""Requests that do not fit into the budget of the machine together, with workers that are not who the master is."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from tests.integrations.gunicorn.server import Answer, Gunicorn
from tests.integrations.gunicorn.test_limits import CLASSES, assert_problem
from tests.processes import until

SETTINGS = """
[budget]
memory = "300M"
wait = "500ms"

[policy.heavy]
memory = "300M"
each = { memory = "200M" }

[policy.free]
memory = "64M"

[[route]]
path = "/narrow/**"
policy = "heavy"

[[route]]
path = "/free/**"
policy = "free"
"""


@pytest.mark.usefixtures("machine_budget")
@pytest.mark.parametrize("worker_class", CLASSES)
def test_a_request_above_the_budget_gets_503_with_retry_after(tmp_path: Path, worker_class: str) -> None:
    more = (
        "--worker-class",
        worker_class,
        *CLASSES[worker_class],
        "--user",
        "www-data",
        "--group",
        "www-data",
    )
    with Gunicorn(tmp_path, SETTINGS, *more) as server:
        slow: list[Answer] = []
        thread = threading.Thread(target=lambda: slow.append(server.get("/narrow/sleep?seconds=3")))
        thread.start()
        until(lambda: bool(server.executors("heavy")))
        answer = server.get("/narrow/who")
        assert server.get("/free/who").status == 200  # there is room for that
        thread.join()
        assert_problem(answer, 503, "budget.memory", "heavy")
        assert int(answer.headers["Retry-After"]) >= 1
        assert slow[0].status == 200
        assert server.get("/narrow/who").status == 200
