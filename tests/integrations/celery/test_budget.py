"""Tasks that do not fit into the budget of the machine together run one after the other."""

from __future__ import annotations

import celery
import pytest

from tests.integrations.celery.sessions import SETTINGS, Session, Sessions
from tests.integrations.celery.test_start import refused

pytestmark = pytest.mark.usefixtures("machine_budget")

#: A task ``heavy`` takes 60 % of it.
BUDGET = """
[budget]
memory = "1200M"
wait = "{wait}"
"""


def settings(wait: str) -> str:
    return SETTINGS + BUDGET.format(wait=wait)


def one_at_a_time(session: Session, numbers: range) -> None:
    """Check that each task ran once, to its end, and no other meanwhile."""
    log = session.log("heavy")
    begun = [int(line.split()[1]) for line in log[::2]]
    assert log == [line for number in begun for line in (f"begins {number}", f"ends {number}")]
    assert sorted(begun) == list(numbers)


@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_tasks_wait(sessions: Sessions, pool: str) -> None:
    with sessions(settings=settings("60s"), concurrency=3, pool=pool) as session:
        results = [session.send("heavy", number, 0.5) for number in range(3)]
        assert [session.wait(result) for result in results] == [[number, 0] for number in range(3)]
        one_at_a_time(session, range(3))
        assert "back to its queue" not in session.worker.log()


@pytest.mark.parametrize("name", ["heavy", "heavy_late"])
def test_tasks_go_back_to_the_queue(sessions: Sessions, name: str) -> None:
    with sessions(settings=settings("200ms"), concurrency=2) as session:
        tasks = session.app.tasks
        result = celery.chord([tasks[name].si(number, 2) for number in range(3)])(tasks["count"].s())
        # One of the two processes is free again soon: the waiting tasks go back to the queue.
        assert session.get("where")["confined"]
        assert session.wait(result) == 3
        one_at_a_time(session, range(3))
        assert "back to its queue" in session.worker.log()
        assert sorted(one.get() for one in result.parent) == [[number, 0] for number in range(3)]


def test_two_workers_share_the_budget(sessions: Sessions) -> None:
    with (
        sessions(settings=settings("60s"), concurrency=1) as session,
        sessions(settings=settings("60s"), concurrency=1, url=session.url) as other,
    ):
        results = [session.send("heavy", number, 1) for number in range(4)]
        for result in results:
            session.wait(result)
        one_at_a_time(session, range(4))
        ran = [worker.log().count("succeeded in") for worker in (session.worker, other.worker)]
        assert sum(ran) == 4


def test_a_task_above_the_budget_keeps_a_worker_from_starting(sessions: Sessions) -> None:
    log = refused(sessions, settings=settings("1s").replace("1200M", "1000M"))
    assert "720M" not in log
    assert (
        "@confined of retried_in_vain: on_memory.up_to: 1G never fits: the whole budget is 1000M here" in log
    )
