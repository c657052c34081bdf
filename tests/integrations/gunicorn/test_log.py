"""Log lines: their fields in a JSON log, the id of a request, and what a request left behind."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.integrations.gunicorn.server import Gunicorn
from tests.processes import until

SETTINGS = """
[policy.free]
memory = "256M"
pids = 64

[policy.kept]
memory = "256M"
leave_children = true

[policy.small]
memory = "64M"

[policy.few]
pids = 16
isolation = "process"

[[route]]
path = "/free/**"
policy = "free"

[[route]]
path = "/kept/**"
policy = "kept"

[[route]]
path = "/small/**"
policy = "small"

[[route]]
path = "/few/**"
policy = "few"
"""

ID = "4bf92f3577b34da6a3ce929d0e0e4736"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gunicorn]:
    with Gunicorn(tmp_path_factory.mktemp("gunicorn"), SETTINGS, "--worker-class", "sync") as running:
        yield running


def last(server: Gunicorn, event: str) -> dict[str, Any]:
    until(lambda: any(line["event"] == event for line in server.lines()))
    return [line for line in server.lines() if line["event"] == event][-1]


@pytest.mark.parametrize(
    "headers",
    [{"X-Request-ID": ID}, {"traceparent": f"00-{ID}-00f067aa0ba902b7-01"}],
    ids=["X-Request-ID", "traceparent"],
)
def test_answer_and_line_have_the_id_that_came(server: Gunicorn, headers: dict[str, str]) -> None:
    answer = server.get("/small/allocate?mib=200", **headers)
    assert (answer.status, answer.json()["instance"]) == (503, ID)
    line = last(server, "memory")
    assert (line["request_id"], line["client"]) == (ID, "127.0.0.1")
    assert (
        f"rcon: memory policy=small limit=memory request_id={ID} client=127.0.0.1: GET /small/"
        in server.log()
    )


@pytest.mark.parametrize("path", ["/small/allocate?mib=200", "/elsewhere/who"], ids=["ended", "refused"])
def test_answer_and_line_have_the_same_new_id(server: Gunicorn, path: str) -> None:
    forged = "x rcon: memory policy=other"
    answer = server.get(path, **{"X-Request-ID": forged, "Host": f"{path[1:6]}.example"})
    made = answer.json()["instance"]
    assert re.fullmatch("[0-9a-f]{32}", made)
    assert server.lines()[-1]["request_id"] == made
    assert forged not in server.log()


@pytest.mark.parametrize("path", ["bomb", "page"], ids=["exception", "page"])
def test_a_detail_names_the_limit(server: Gunicorn, path: str) -> None:
    """Also where a framework made a page of the exception."""
    assert server.get(f"/few/{path}").status == 503
    detail = last(server, "pids")["detail"]
    limit = f"GET /few/{path}: pids limit 16 reached: no more processes or threads could be started ("
    assert detail.startswith(limit)
    assert ("500 Internal Server Error" if path == "page" else "BlockingIOError: ") in detail


def test_what_a_request_left_behind_is_one_line_with_the_way_to_keep_it(server: Gunicorn) -> None:
    assert server.get("/free/leave?processes=1").status == 200
    line = last(server, "ok")
    assert (line["left_behind"], line["policy"]) == (1, "free")
    assert line["detail"] == (
        "GET /free/leave: 1 process that it left behind was ended; leave_children = true in the policy keeps them"
    )
    lines = len(server.lines())
    assert server.get("/free/leave?processes=3").status == 200
    assert len(server.lines()) == lines  # one line a minute


def test_what_a_policy_keeps_is_not_logged(server: Gunicorn) -> None:
    lines = len(server.lines())
    assert server.get("/kept/leave?processes=2").status == 200
    assert len(server.lines()) == lines


CONFIG = """
from rcon_gunicorn import Hooks

{block}
Hooks({settings!r}).install(globals())
"""
PAGE = Path(__file__).resolve().parents[3] / "docs" / "howto" / "gunicorn.md"


def test_a_json_formatter_nests_the_fields(tmp_path: Path) -> None:
    """With the configuration of docs/howto/gunicorn.md and the real library."""
    found = re.search(r"^```python\n(logconfig_dict = .*?)^```$", PAGE.read_text(), re.M | re.S)
    assert found is not None
    config = tmp_path / "gunicorn.conf.py"
    config.write_text(CONFIG.format(block=found[1], settings=str(tmp_path / "rcon.toml")))
    with Gunicorn(tmp_path, SETTINGS, config=str(config), plain=True) as server:
        assert server.get("/small/allocate?mib=200", **{"X-Request-ID": ID}).status == 503
        (line,) = [json.loads(line) for line in server.log().splitlines() if '"rcon"' in line]
        assert line["rcon"]["event"] == "memory"
        assert line["rcon"]["usage"]["memory_peak"] <= 64 << 20
        assert line["message"].startswith(f"rcon: memory policy=small limit=memory request_id={ID} ")
        assert "{" not in line["message"]
        server.signal(signal.SIGHUP)  # the loggers are made anew
        until(lambda: server.log().count("Booting worker") == 2 and server.is_booted())
        assert server.get("/small/allocate?mib=200").status == 503
        until(lambda: server.log().count('"rcon"') == 2)
