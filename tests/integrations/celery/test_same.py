"""Celery's own semantics hold: the same tasks give the same results, states and signals, confined or not."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.integrations.celery.cases import CASES, Case, History, play, tell
from tests.integrations.celery.conftest import ApplicationWorkers


class Histories:
    """The histories of all cases by pool, serializer, and whether confined. Each setup runs once."""

    def __init__(self, application_workers: ApplicationWorkers, directory: Path) -> None:
        self._workers = application_workers
        self._directory = directory
        self._played: dict[tuple[str, str, bool], dict[str, History]] = {}

    def history(self, case: Case, pool: str, *, confined: bool) -> History:
        setup = (pool, case.serializer, confined)
        if setup not in self._played:
            self._played[setup] = self._play(*setup)
        return self._played[setup][case.name]

    def _play(self, pool: str, serializer: str, confined: bool) -> dict[str, History]:
        cases = [c for c in CASES.values() if pool in c.pools and c.serializer == serializer]
        with self._workers.open(
            pool=pool, confined=confined, serializer=serializer, concurrency=1
        ) as running:
            played = play(cases, running.app, running.records, self._directory)
            running.worker.stop()
            return tell(played)


@pytest.fixture(scope="module")
def histories(application_workers: ApplicationWorkers, tmp_path_factory: pytest.TempPathFactory) -> Histories:
    return Histories(application_workers, tmp_path_factory.mktemp("gates"))


PLAYED = [
    pytest.param(case, pool, id=f"{case.name}-{pool}") for case in CASES.values() for pool in case.pools
]


@pytest.mark.parametrize(("case", "pool"), PLAYED)
def test_plain_celery_does_what_the_cases_expect(histories: Histories, case: Case, pool: str) -> None:
    """Plain Celery does what the cases expect; else a comparison would prove nothing."""
    history = histories.history(case, pool, confined=False)
    assert history.fault is None, history.fault
    assert any(task["records"] for task in history.tasks.values()) or not history.tasks


#: Cases in which two processes write records of one task, in no certain order.
IN_ANY_ORDER = {"replace", "error_link_by_id", "time_limit", "revoked_while_it_runs"}


@pytest.mark.parametrize(("case", "pool"), PLAYED)
def test_confined_celery_does_the_same(histories: Histories, case: Case, pool: str) -> None:
    plain = histories.history(case, pool, confined=False)
    confined = histories.history(case, pool, confined=True)
    assert confined.fault is None, confined.fault
    assert confined.answer == plain.answer
    assert comparable(case, confined) == comparable(case, plain, beside=True)


def comparable(case: Case, history: History, *, beside: bool = False) -> dict[str, dict[str, object]]:
    """Return the tasks of a history; ``beside``: as if their handlers ran beside the bodies."""
    tasks = {name: dict(task) for name, task in history.tasks.items()}
    for task in tasks.values():
        if beside:
            task["records"] = beside_the_body(task["records"])
        if case.name in IN_ANY_ORDER:
            task["records"].sort(key=str)
    return tasks


def beside_the_body(records: list[list[object]]) -> list[list[object]]:
    """Put the records of handlers where those handlers run: next to the body, the others outside of both.

    In plain Celery ``task_prerun`` comes before `before_start`, and ``task_postrun`` after all other handlers.
    """
    ordered: list[list[object]] = []
    for record in records:
        if record[0] == "before_start" and ordered and ordered[-1][0] == "prerun":
            ordered.insert(len(ordered) - 1, record)
        elif record[0] == "postrun":
            prerun = max(number for number, one in enumerate(ordered) if one[0] == "prerun")
            ordered.insert(prerun + 1, record)
        else:
            ordered.append(record)
    return ordered
