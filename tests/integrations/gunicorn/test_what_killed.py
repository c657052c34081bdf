"""docs/howto/what-killed-my-request.md: its lines are what a server writes with its policy file."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integrations.gunicorn.server import Gunicorn
from tests.processes import until

PAGE = (Path(__file__).resolve().parents[3] / "docs" / "howto" / "what-killed-my-request.md").read_text()
#: What each section of the page says, by the name of the ending.
LINES = {
    found["ending"]: found["lines"].splitlines()
    for found in re.finditer(
        r"^### (?P<ending>\w+)\n\n<!-- log -->\n```text\n(?P<lines>.*?)^```$", PAGE, re.M | re.S
    )
}
SHOP = "shop.example"
#: The requests whose lines a section shows: path and host, in this order.
REQUESTS = {
    "memory": [("/allocate?mib=200", SHOP)],
    "timeout": [("/sleep?seconds=9", SHOP)],
    "pids": [("/bomb", SHOP), ("/page", SHOP)],
    "killed": [("/end?signal=11", SHOP), ("/end?status=3", SHOP)],
    "forbidden": [("/who", "nobody.tenants.example")],
    "unroutable": [("/who", "elsewhere.example")],
    "ok": [("/lose", "batch.example"), ("/leave?processes=2", SHOP)],
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gunicorn]:
    directory = tmp_path_factory.mktemp("gunicorn")
    settings = re.search(r"^```toml\n(.*?)^```$", PAGE, re.M | re.S)
    assert settings is not None
    text = 'executor_started = "application:started"\n' + settings[1].replace("/srv/", f"{directory}/")
    more = ("--worker-class", "gthread", "--threads", "4")
    broken = {"TEST_BROKEN": str(directory / "broken")}
    with Gunicorn(
        directory, text + HEALTH, *more, health="/health/who", plain=True, environ=broken
    ) as running:
        yield running


#: For the start of the test alone.
HEALTH = '\n[[route]]\npath = "/health/**"\npolicy = "batch"\n'


def shown(server: Gunicorn) -> list[str]:
    """The lines of the log, without what gunicorn writes before them."""
    return [line.partition("] rcon: ")[2] for line in server.log().splitlines() if "] rcon: " in line]


def pattern(line: str) -> str:
    """What a line of the page stands for: figures, ids and addresses are others at each run."""
    found = re.escape(line)
    found = re.sub(r"request_id=[0-9a-f]{32}", "request_id=[0-9a-f]{32}", found)
    found = re.sub(r"client=[\d\\.]+", r"client=[\\d.]+", found)
    return re.sub(r"peak\\ \d+\\\.\d\\ MiB", r"peak\\ \\d+\\.\\d\\ MiB", found)


def assert_written(server: Gunicorn, ending: str, before: int, path: str = "") -> None:
    written = [line for line in shown(server)[before:] if line.startswith(f"{ending} ") and path in line]
    directory = str(server.directory)
    assert len(LINES[ending]) == len(written), written
    for line, real in zip(LINES[ending], written, strict=True):
        assert re.fullmatch(pattern(line), "rcon: " + real.replace(directory, "/srv")), (line, real)


@pytest.mark.parametrize("ending", REQUESTS)
def test_a_section_shows_what_the_server_writes(server: Gunicorn, ending: str) -> None:
    before = len(shown(server))
    for path, host in REQUESTS[ending]:
        lines = len(shown(server))
        server.get(path, Host=host)
        until(lambda: len(shown(server)) > lines)  # noqa: B023
    assert_written(server, ending, before)


def test_concurrency(server: Gunicorn) -> None:
    before, done = len(shown(server)), threading.Event()

    def occupy() -> None:
        while not done.is_set():
            server.get("/sleep?seconds=0.5", Host=SHOP)

    threads = [threading.Thread(target=occupy) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        until(lambda: server.get("/who", Host=SHOP).status == 503)
    finally:
        done.set()
        for thread in threads:
            thread.join()
    assert_written(server, "concurrency", before, "/who")


def test_refused(server: Gunicorn) -> None:
    """Once no executor process waits any more: each of these requests ends one."""
    (server.directory / "broken").touch()
    before = len(shown(server))
    until(lambda: server.get("/end?status=3", Host=SHOP).json()["type"].endswith(":refused"))
    assert_written(server, "refused", before)
