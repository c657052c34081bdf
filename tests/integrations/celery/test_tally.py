"""What a Celery worker counts, in each of its pools."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import pytest

from rcon_plugins.cli.rcon import run_main
from rcon_plugins.errors import MemoryLimitExceeded, TimeLimitExceeded
from rcon_plugins.tally.reader import Counts, read_directory
from tests.integrations.celery.sessions import Session, Sessions
from tests.processes import until


def directory_of(session: Session) -> Path:
    return Path("/run/rcon", session.worker.cgroups()[0].name)


def counts(directory: Path, policy: str) -> Counts:
    found = read_directory(str(directory))
    assert found is not None
    its = found.of(policy, None)
    assert its is not None
    return its


@pytest.mark.parametrize("pool", ["prefork", "threads", "solo", "gevent"])
def test_tasks_are_counted(sessions: Sessions, pool: str, capsys: pytest.CaptureFixture[str]) -> None:
    with sessions(pool=pool) as session:
        directory = directory_of(session)
        session.error("hog", MemoryLimitExceeded)
        session.error("hog", MemoryLimitExceeded)
        session.error("hang", TimeLimitExceeded)
        session.get("where")
        hog = counts(directory, "hog")
        assert (hog.begun, hog.endings["memory"], hog.under_way, hog.lost) == (2, 2, 0, 0)
        assert hog.oom_kills is not None and hog.oom_kills >= 2  # noqa: PT018
        assert counts(directory, "hang").endings["timeout"] == 1
        assert counts(directory, "where").endings["ok"] == 1
        assert run_main(["ls", "--json"]) == 0
        rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)
                if row["instance"] == directory.name}  # fmt: skip
        assert (rows["hog"]["hits"], rows["hog"]["tally"]) == (2, hog.to_data())
        assert len([one for one in directory.iterdir() if one.name.isdigit()]) == (
            2 if pool == "prefork" else 1
        )
    assert counts(directory, "hog").endings["memory"] == 2


def test_each_pool_process_takes_over_from_one_before(sessions: Sessions) -> None:
    """With a new process for each task, there are no more files than processes at one time."""
    with sessions("--max-tasks-per-child", "1") as session:
        directory = directory_of(session)
        for _ in range(8):
            session.get("where")
        found = counts(directory, "where")
        assert (found.begun, found.endings["ok"], found.lost) == (8, 8, 0)
        assert len([one for one in directory.iterdir() if one.name.isdigit()]) <= 4


@pytest.mark.parametrize("pool", ["threads", "gevent"])
def test_tasks_that_end_at_the_same_time_are_counted_each(sessions: Sessions, pool: str) -> None:
    """All in one process, which has one file: eight at a time, with four kinds of endings."""
    endings = {"where": "ok", "raising": "error", "hog": "memory", "hang": "timeout"}
    with sessions(pool=pool, concurrency=8) as session:
        directory = directory_of(session)
        results = [session.send(name) for _ in range(12) for name in endings]
        for result in results:
            with contextlib.suppress(MemoryLimitExceeded, TimeLimitExceeded, ValueError):
                session.wait(result)
        until(lambda: all(counts(directory, name).under_way == 0 for name in endings))
        found = {name: counts(directory, name) for name in endings}
        for name, ending in endings.items():
            ended = {of: number for of, number in found[name].endings.items() if number}
            assert (found[name].begun, ended, found[name].lost) == (12, {ending: 12}, 0), name
            assert sum(found[name].refusals.values()) == 0
        assert [one.name for one in directory.iterdir() if one.name.isdigit()] == ["0"]
