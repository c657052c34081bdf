"""Many tasks, of which a tenth exceeds its memory, a tenth hangs, a tenth forks: each ends with its exception.

One hundred tasks; ``RCON_TEST_TASKS=1000`` runs a thousand.
"""

from __future__ import annotations

import os
from collections import Counter

import pytest

from rcon_celery import outcome_of
from tests.integrations.celery.sessions import Sessions
from tests.processes import alive, until

COUNT = int(os.environ.get("RCON_TEST_TASKS", "100"))
#: Ten tasks, and the exception and ending of each harmful one.
TEN = ["where", "fresh", "where", "hog", "where", "hang", "where", "fork", "where", "double"]
ENDS = {"hog": "MemoryLimitExceeded", "hang": "TimeLimitExceeded", "fork": "PidsLimitExceeded"}
ENDINGS = {"hog": "memory", "hang": "timeout", "fork": "pids"}


@pytest.mark.timeout(60 + COUNT)
def test_each_ending_raises_its_exception(sessions: Sessions) -> None:
    with sessions(concurrency=4) as session:
        pool = session.worker.children()
        names = [TEN[number % 10] for number in range(COUNT)]
        sent = [(name, session.send(name, *([7] if name == "double" else []))) for name in names]
        until(lambda: all(result.ready() for _, result in sent), 60 + COUNT)
        ended = Counter(
            (name, "ok" if result.successful() else type(result.result).__name__) for name, result in sent
        )
        assert ended == Counter((name, ENDS.get(name, "ok")) for name in names)
        outcomes = Counter((name, outcome.ending) for name, result in sent if (outcome := outcome_of(result)))
        assert outcomes == Counter((name, ENDINGS.get(name, "ok")) for name in names)
        assert session.worker.children() == pool
        assert "WorkerLostError" not in session.worker.log()
        everybody, directories = session.worker.family(), session.worker.cgroups()
        assert session.worker.stop() == 0
        assert not any(map(alive, everybody))
        assert not any(path.exists() for path in directories)
