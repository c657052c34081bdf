"""The groups of a running gunicorn, as rcon ls, stat, set and kill see them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rcon_plugins.cli.rcon import run_main
from tests.integrations.gunicorn.server import Gunicorn

SETTINGS = """
[policy.free]
pids = 64

[policy.tenant]
per = "host"
memory = "256M"
each = { memory = "128M" }

[[route]]
path = "/free/**"
policy = "free"

[[route]]
path = "/**"
policy = "tenant"
"""


def rcon(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    capsys.readouterr()
    assert run_main([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_groups_of_a_server_are_listed_and_changed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Gunicorn(tmp_path, SETTINGS, "--worker-class", "sync", "--workers", "1") as server:
        assert server.get("/who", Host="groups-a.example").status == 200
        found = {group["name"]: group for group in rcon(capsys, "ls") if group["owner"]["pid"] == server.pid}
        assert set(found) == {"free", "tenant~groups-a.example"}
        tenant, free = found["tenant~groups-a.example"], found["free"]
        assert (tenant["kind"], tenant["policy"], tenant["key"]) == ("work", "tenant", "groups-a.example")
        assert (tenant["limits"]["memory"], tenant["processes"]) == (256 << 20, 1)
        assert "gunicorn" in tenant["owner"]["command"]
        assert (free["kind"], free["limits"]["pids"]) == ("host", 64)

        name = tenant["group"]
        told = rcon(capsys, "set", name, "--memory", "200M")
        assert told["limits"]["memory"] == 200 << 20
        assert f"a server, pid {server.pid} (" in told["notes"][0]
        (executor,) = rcon(capsys, "stat", name)["processes"]
        assert rcon(capsys, "kill", name)["killed"][0]["pid"] == executor["pid"]
        # The server goes on, with a new executor process, for which it writes its policy's limits.
        assert server.get("/who", Host="groups-a.example").status == 200
        after = rcon(capsys, "stat", name)
        assert after["limits"]["memory"] == 256 << 20
        assert after["processes"][0]["pid"] != executor["pid"]
        assert run_main(["kill", free["group"]]) == 2
        assert f"stop the server, pid {server.pid}" in capsys.readouterr().err
        assert server.stop() == 0
