"""Events of requests that run in the worker itself, told to a plugin that the settings name. Also on pure cgroup v2."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests import listener
from tests.integrations.gunicorn.server import Gunicorn
from tests.processes import until

pytestmark = pytest.mark.each_layout

SETTINGS = """
plugins = ["listener"]

[policy.free]
each = {{ timeout = "100s" }}

[policy.busy]
isolation = "{}"
per = "host"
cpu = "20%"

[[route]]
path = "/free/**"
policy = "free"

[[route]]
path = "/**"
policy = "busy"
"""


@pytest.mark.parametrize(
    ("workers", "isolation"),
    [("sync", "inline"), pytest.param("gthread", "thread", marks=pytest.mark.once)],
)
def test_plugins_receive_events_of_requests_in_threads(tmp_path: Path, workers: str, isolation: str) -> None:
    environ = {"PYTHONPATH": str(listener.install(tmp_path)), **listener.environ(tmp_path)}
    arguments = [
        "--worker-class",
        workers,
        "--workers",
        "1",
        "--threads",
        "2" if workers == "gthread" else "1",
    ]
    with Gunicorn(tmp_path, SETTINGS.format(isolation), *arguments, environ=environ) as server:
        found: list[dict[str, Any]] = []

        def is_told() -> bool:
            answer = server.get("/state?spin=0.3", Host="a.example")
            assert answer.status == 200
            found[:] = [event for event in listener.heard(tmp_path) if event["kind"] == "cpu_throttled"]
            return bool(found)

        until(is_told)
    event = found[0]
    assert (event["policy"], event["key"], event["group"]) == ("busy", "a.example", "busy~a.example")
    assert (event["limit"], event["bound"]) == ("cpu", 0.2)
    assert event["cgroup"].endswith("/host/busy~a.example")
    assert event["count"] >= 1
