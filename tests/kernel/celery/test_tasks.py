"""The core of what a confined task is promised, on whatever cgroups this machine has: Redis and a worker are real."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from rcon_plugins.errors import Killed, MemoryLimitExceeded, PidsLimitExceeded, TimeLimitExceeded
from tests.integrations.celery.office import Office, Offices
from tests.integrations.celery.redis_server import RedisServer
from tests.processes import alive, until

pytestmark = pytest.mark.timeout(600)  # an emulated machine is slow


@pytest.fixture(scope="module")
def office(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Office]:
    directory = tmp_path_factory.mktemp("celery")
    with RedisServer(directory) as server, Offices(server, directory)(concurrency=1) as opened:
        processes = opened.worker.children()
        yield opened
        assert opened.worker.children() == processes
        assert "WorkerLostError" not in opened.worker.log()


def test_ends_are_told_by_name(office: Office) -> None:
    assert office.get("where")["confined"]
    error = office.error("hog", MemoryLimitExceeded)
    assert str(error).startswith("hog: memory limit 64M reached, peak 6")
    assert error.usage is not None
    office.error("hang", TimeLimitExceeded)
    office.error("fork", PidsLimitExceeded)
    assert office.error("die", Killed, "kill").signal == 9
    assert office.get("where")["confined"]


@pytest.mark.once
def test_it_is_told_before(office: Office) -> None:
    assert office.get("soft_memory") == "cleaned up: soft_memory: its memory is nearly used up"
    assert office.get("soft_time") == "cleaned up"


@pytest.mark.once
def test_what_it_started_ends_with_it(office: Office) -> None:
    pid = office.get("leaving")
    until(lambda: not alive(pid))
    left = office.get("leaving_on_purpose")
    try:
        office.get("where")
        assert alive(left)
        assert "/work/" in Path(f"/proc/{left}/cgroup").read_text()
    finally:
        office.end(left)
