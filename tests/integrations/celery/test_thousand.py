"""A thousand tasks, three tenths of which misbehave: each ends in its own way, and nothing else comes of it."""

from __future__ import annotations

from collections import Counter

import pytest
from celery.result import ResultSet

from rcon_plugins.errors import MemoryLimitExceeded, PidsLimitExceeded, TimeLimitExceeded
from tests.integrations.celery.office import Offices
from tests.processes import until

ENDS = {"hog": MemoryLimitExceeded, "hang_briefly": TimeLimitExceeded, "fork": PidsLimitExceeded}
MANY = 1000


@pytest.mark.timeout(600)
def test_a_thousand_tasks(offices: Offices) -> None:
    with offices(concurrency=4) as office:
        processes = office.worker.children()
        names = [[*ENDS, *["double"] * 7][number % 10] for number in range(MANY)]
        results = [
            office.send(name, *([number] if name == "double" else [])) for number, name in enumerate(names)
        ]
        ResultSet(results, app=office.app).join(timeout=500, propagate=False)
        counted = Counter((name, type(result.result)) for name, result in zip(names, results, strict=True))
        expected: dict[tuple[str, type], int] = dict.fromkeys(ENDS.items(), 100)
        assert counted == {("double", list): 700, **expected}
        assert all(
            result.result == [2 * number, True]
            for number, (name, result) in enumerate(zip(names, results, strict=True))
            if name == "double"
        )
        assert office.worker.children() == processes
        assert "WorkerLostError" not in office.worker.log()
        # Executor processes that wait for their next task are all that is left; then not even these.
        until(lambda: len(office.executors()) <= 4 * len(processes))
        directories = office.worker.cgroups()
        assert directories
        assert office.worker.stop() == 0
        assert not any(path.exists() for path in directories)
