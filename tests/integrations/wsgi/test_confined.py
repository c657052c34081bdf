"""The middleware by itself, under a server that knows nothing of it, with the kernel's own limits."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.contract.wsgi.apps import CASES
from tests.contract.wsgi.client import Served, ask, comparable, request_of, serving
from tests.integrations.gunicorn.fields import fields_in

SETTINGS = """
[policy.tenant]
per = "host"
memory = "256M"
pids = 64
isolation = "process"

[policy.small]
each = { memory = "64M" }

[policy.short]
each = { timeout = "500ms" }

[policy.few]
each = { pids = 16 }

[policy.one-at-a-time]
concurrency = 1
isolation = "process"

[policy.here]
isolation = "inline"
pids = 500

[[route]]
host = ["*.example", "example.com"]
policy = "tenant"
"""


class Answer(NamedTuple):
    status: int
    headers: http.client.HTTPMessage
    body: bytes

    @property
    def problem(self) -> dict[str, Any]:
        assert self.headers["Content-Type"] == "application/problem+json"
        told: dict[str, Any] = json.loads(self.body)
        assert told["status"] == self.status
        return told


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("confined")
    settings = folder / "rcon.toml"
    routes = "".join(
        f'[[route]]\nhost = "{name}"\npolicy = "{name}"\n'
        for name in ("small", "short", "few", "one-at-a-time", "here")
    )
    settings.write_text(SETTINGS + routes)
    with serving(folder / "log", "tests.integrations.wsgi.serve", str(settings)) as served:
        yield served


def get(served: Served, host: str, path: str, method: str = "GET") -> Answer:
    connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=20)
    try:
        connection.request(method, f"/{path}", headers={"Host": host})
        response = connection.getresponse()
        return Answer(response.status, response.headers, response.read())
    finally:
        connection.close()


def lines(served: Served) -> list[dict[str, Any]]:
    """The fields of the records in the server's log."""
    return fields_in(served.log.read_text())


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if "wsgiref" in case.servers])
def test_answers_are_those_of_the_application_alone(served: Served, alone: Served, name: str) -> None:
    case = CASES[name]
    request = request_of(name, case)
    confined = comparable(ask(served, request), framing=case.framing)
    assert confined == comparable(ask(alone, request), framing=case.framing)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    log = tmp_path_factory.mktemp("alone") / "log"
    with serving(log, "tests.contract.wsgi.serve", "wsgiref", "direct") as served:
        yield served


def test_a_process_serves_one_key(served: Served) -> None:
    a = {get(served, "a.example", "who").body for _ in range(5)}
    b = {get(served, "b.example", "who").body for _ in range(5)}
    assert len(a) == len(b) == 1
    assert a != b


def test_memory(served: Served) -> None:
    before = time.monotonic()
    answer = get(served, "small", "allocate")
    assert time.monotonic() - before < 2
    assert answer.status == 503
    assert answer.problem == {
        "type": "urn:problem-type:rcon:memory",
        "title": "Memory limit reached",
        "status": 503,
        "detail": "The request needed more memory than its policy allows.",
        "limit": "each.memory",
        "policy": "small",
        "instance": answer.problem["instance"],
    }
    (line,) = [line for line in lines(served) if line["event"] == "memory"]
    assert answer.problem["instance"] == line["request_id"]
    assert line["usage"]["memory_peak"] <= 64 << 20
    assert get(served, "small", "who").status == 200


def test_memory_in_the_stream(served: Served) -> None:
    before = len(served.log.read_text())
    answer = ask(served, b"GET /allocate-in-the-stream HTTP/1.1\r\nHost: small\r\n\r\n")
    assert answer.endswith(b"begun")
    assert b"problem" not in answer
    assert "Traceback" not in served.log.read_text()[before:]
    assert get(served, "small", "who").status == 200


def test_time(served: Served) -> None:
    answer = get(served, "short", "sleep?5")
    assert answer.status == 504
    assert answer.problem["limit"] == "each.timeout"
    assert get(served, "short", "sleep?0.01").body == b"awake"


@pytest.mark.parametrize("path", ["fork", "fork-and-make-a-page-of-it"])
def test_pids(served: Served, path: str) -> None:
    answer = get(served, "few", path)
    assert answer.status == 503
    assert answer.problem["limit"] == "each.pids"
    assert get(served, "few", "who").status == 200


def test_processes_that_a_request_leaves_running_end_with_it(served: Served) -> None:
    child = int(get(served, "a.example", "leave-something-running").body)
    end = time.monotonic() + 2
    while Path(f"/proc/{child}").exists():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_concurrency(served: Served) -> None:
    get(served, "one-at-a-time", "who")
    first: list[Answer] = []
    thread = threading.Thread(target=lambda: first.append(get(served, "one-at-a-time", "sleep?1")))
    thread.start()
    time.sleep(0.3)
    second = get(served, "one-at-a-time", "who")
    thread.join()
    assert first[0].body == b"awake"
    assert second.status == 503
    assert int(second.headers["Retry-After"]) >= 1
    assert second.problem["limit"] == "concurrency"
    assert get(served, "one-at-a-time", "who").status == 200


def test_no_route(served: Served) -> None:
    answer = get(served, "nobody.invalid", "who")
    assert answer.status == 421
    assert answer.problem["type"] == "urn:problem-type:rcon:unroutable"
    refused = [line["detail"] for line in lines(served) if line["event"] == "unroutable"]
    assert any("no route names 'GET /who' of the host 'nobody.invalid'; " in detail for detail in refused)


@pytest.mark.parametrize(
    "host", ["../../x.example", "a" * 300 + ".example", "%00.example", "a/b.example", "*.example"]
)
def test_an_invalid_host(served: Served, host: str) -> None:
    assert get(served, host, "who").status in (200, 421)


def test_inline(served: Served) -> None:
    assert int(get(served, "here", "who").body) == served.process.pid
    assert get(served, "here", "who", "HEAD").status == 200


def test_each_limit_logs_one_line(served: Served) -> None:
    before = len(lines(served))
    get(served, "short", "sleep?5")
    assert [line["event"] for line in lines(served)[before:]] == ["timeout"]


def test_a_server_that_forks_afterwards_is_refused(tmp_path: Path) -> None:
    """And says why; it does not share one fork server among its processes."""
    (tmp_path / "rcon.toml").write_text(SETTINGS)
    with serving(
        tmp_path / "log", "tests.integrations.wsgi.serve_forked", str(tmp_path / "rcon.toml")
    ) as forked:
        assert get(forked, "a.example", "who").problem["type"] == "urn:problem-type:rcon:refused"
        assert forked.log_has("made the middleware")
