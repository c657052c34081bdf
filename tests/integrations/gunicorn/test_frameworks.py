"""The recipes of docs/howto/frameworks.md, each with the real library."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.directories import let_others_read
from tests.integrations.gunicorn.server import Gunicorn
from tests.integrations.gunicorn.tenants import TENANTS
from tests.processes import until

PAGE = Path(__file__).resolve().parents[3] / "docs" / "howto" / "frameworks.md"
RECIPES = {
    found["module"]: found["text"]
    for found in re.finditer(
        r"^<!-- app -->\n```python\n(?P<text># (?P<module>\w+)\.py\n.*?)^```$", PAGE.read_text(), re.M | re.S
    )
}
UID = TENANTS["tenant1"]
SETTINGS = f"""
executor_started = "{{module}}:started"

[policy.free]
user = {UID}
group = {UID}
memory = "256M"
pids = 64
each = {{{{ timeout = "5s" }}}}

[[route]]
policy = "free"
"""


def server(directory: Path, module: str, *, started: bool = True) -> Gunicorn:
    """A server with the application of a recipe; ``started`` as the recipe says, or without its function."""
    let_others_read(directory)
    source = directory / f"{module}.py"
    source.write_text("import encodings.idna\n" + RECIPES[module].replace("/tmp/rcon-", f"{directory}/"))
    settings = SETTINGS.format(module=module)
    if not started:
        settings = settings.replace("executor_started", "#")
    return Gunicorn(
        directory,
        settings,
        "--pythonpath",
        str(directory),
        app=f"{module}:app",
        health="/",
        environ={"HOME": "/"},
    )


def test_each_recipe_of_the_page_is_run() -> None:
    assert set(RECIPES) == {"fastapi_app", "sqlalchemy_app", "queue_app"}


def test_fastapi(tmp_path: Path) -> None:
    with server(tmp_path, "fastapi_app") as gunicorn:
        answers = [gunicorn.get("/") for _ in range(3)]
        assert [answer.json() for answer in answers] == [{"hello": "world"}] * 3
        assert len(gunicorn.executors()) == 1


def test_sqlalchemy(tmp_path: Path) -> None:
    with server(tmp_path, "sqlalchemy_app") as gunicorn:
        assert {gunicorn.get("/").body for _ in range(3)} == {b"42"}


@pytest.mark.parametrize("started", [True, False])
def test_a_queue_of_log_records(tmp_path: Path, started: bool) -> None:
    with server(tmp_path, "queue_app", started=started) as gunicorn:
        assert gunicorn.get("/").body == b"logged"
        if started:
            until(lambda: "[free] a line from the shop" in gunicorn.log())
        else:
            assert "do not run in executor processes: 'Thread-1 (_monitor)'" in gunicorn.log()
            assert "a line from the shop" not in gunicorn.log()
