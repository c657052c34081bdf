"""What the workers of an application tell of what they confine: ``celery -A proj inspect rcon``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

from rcon_plugins.errors import MemoryLimitExceeded, TimeLimitExceeded
from tests.integrations.celery import limited
from tests.integrations.celery.office import Offices
from tests.integrations.celery.worker import ROOT
from tests.processes import until


def test_inspect(offices: Offices) -> None:
    with offices() as office:
        office.error("hog", MemoryLimitExceeded)
        office.error("hog", MemoryLimitExceeded)
        office.error("hang", TimeLimitExceeded)
        office.get("where")
        command = [sys.executable, "-m", "celery", "-A", limited.__name__, "inspect", "rcon", "--json"]
        done = subprocess.run(
            command,
            cwd=ROOT,
            env={**os.environ, limited.BROKER: office.url},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        )
        (told,) = json.loads(done.stdout).values()
        assert told["policies"]["hog"] == {"each": {"memory": "64M", "timeout": "1m"}}
        assert told["policies"]["small"]["memory"] == "1G"
        assert told["deaths"] == {"memory": 2, "timeout": 1}
        assert told["confinements"]["where"]["cpu_seconds"] > 0


def test_what_runs(offices: Offices) -> None:
    with offices(concurrency=1) as office:
        result = office.send("stay", "watched")
        until(lambda: bool(office.log("watched")))

        def running() -> dict[str, Any]:
            (told,) = office.app.control.inspect(timeout=10, limit=1)._request("rcon").values()
            found: dict[str, Any] = told["confinements"]
            return found

        stays = running()["stay"]
        result.revoke(terminate=True)
        assert stays["processes"] >= 1
        assert stays["memory"] > 0
