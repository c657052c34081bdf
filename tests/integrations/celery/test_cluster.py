"""What the workers of an application tell of what they confine: ``celery -A proj inspect rcon``."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from rcon_plugins.errors import MemoryLimitExceeded, TimeLimitExceeded
from tests.integrations.celery import limited
from tests.integrations.celery.office import Offices
from tests.integrations.celery.redis_server import RedisServer
from tests.integrations.celery.worker import ROOT, Worker
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


RCON = "from rcon_plugins.cli.start import main; main()"


def top(*arguments: str, url: str, app: str = limited.__name__) -> subprocess.CompletedProcess[str]:
    """`rcon top --celery` to its end."""
    command = [sys.executable, "-c", RCON, "top", "--celery", app, *arguments]
    return subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, limited.BROKER: url},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_top_of_all_workers(offices: Offices) -> None:
    """Two workers of one application; a task in each, one of which is busy."""
    with offices("-Q", "one", concurrency=2) as one:
        other, producer, _ = offices.make("-Q", "two", concurrency=1, url=one.url, name="other")
        with contextlib.closing(producer), other:
            staying = [one.send("stay", queue, queue=queue) for queue in ("one", "two")]
            until(lambda: bool(one.log("one")) and bool(one.log("two")))
            one.get("where", queue="one")
            done = top("--json", "--iterations", "2", "--interval", "1", "--sort", "name", url=one.url)
            assert done.returncode == 0, done.stderr
            first, second = map(json.loads, done.stdout.splitlines())
            names = [row["group"] for row in second["groups"]]
            assert names == sorted(names)
            assert {"w@test/stay", "other@test/stay"} <= set(names)
            for row in first["groups"] + second["groups"]:
                assert row["node"] in ("w@test", "other@test")
                assert row["group"].startswith(f"{row['node']}/")
                assert row["cpu"] is not None
                assert row["memory"] > 0
            # Without JSON, a table of the same.
            done = top("--iterations", "1", "--interval", "0.5", url=one.url)
            assert done.returncode == 0, done.stderr
            assert "w@test/stay" in done.stdout
            assert "celery worker other@test" in done.stdout
            for result in staying:
                result.revoke(terminate=True)


def test_top_without_workers(offices: Offices, redis_server: RedisServer) -> None:
    done = top("--iterations", "1", url=redis_server.database())
    assert done.returncode == 125
    assert done.stderr.startswith("rcon: no worker answers: is one running")
    assert done.stderr.count("\n") == 1
    done = top("--iterations", "1", url="redis://127.0.0.1:1/0")
    assert done.returncode == 125
    assert "cannot be reached" in done.stderr
    assert done.stderr.count("\n") == 1
    done = top("--iterations", "1", url="", app="no.such.thing")
    assert done.returncode == 2
    assert "--celery: 'no.such.thing' cannot be loaded as a Celery application" in done.stderr


def test_top_of_workers_that_confine_nothing(redis_server: RedisServer, tmp_path: Path) -> None:
    url = redis_server.database()
    (tmp_path / "plain.py").write_text(f"import celery\napp = celery.Celery(broker={url!r})\n")
    environ = {"PYTHONPATH": str(tmp_path)}
    with Worker(tmp_path, "plain", pool="solo", environ=environ):
        done = top("--iterations", "1", url=url)
        assert done.returncode == 125
        assert done.stderr.startswith("rcon: w@test: ")


def test_top_without_celery() -> None:
    program = (
        f"import sys; sys.modules['celery'] = None\nsys.argv = ['rcon', 'top', '--celery', 'proj']\n{RCON}"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 125
    assert done.stderr == (
        "rcon: --celery: celery is not installed here (pip install 'rcon-plugins[celery]')\n"
    )
