"""docs/howto/what-killed-my-request.md knows each ending, status and error that the code can give."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import rcon_celery
import rcon_gunicorn
import rcon_plugins
import rcon_wsgi
from rcon_gunicorn.check import CheckFailed
from rcon_plugins.ending import Ending
from rcon_plugins.errors import RconError
from rcon_plugins.settings.budget import BUDGET
from rcon_plugins.settings.file import Settings
from rcon_wsgi import ResponseCut, request
from tests.sources import parsed

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "howto" / "what-killed-my-request.md").read_text()
PACKAGES = (rcon_plugins, rcon_wsgi, rcon_gunicorn, rcon_celery)


def rows(heading: str) -> list[list[str]]:
    """The cells of the table below a heading, without its head."""
    section = PAGE.split(f"{heading}\n", 1)[1]
    table = re.search(r"(?:^\|.*\n)+", section, re.M)
    assert table is not None
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in table[0].splitlines()[2:]]


def test_each_ending_has_a_section() -> None:
    section = PAGE.split("## From a log line\n")[1].split("\n## ")[0]
    assert sorted(re.findall(r"^### (\w+)$", section, re.M)) == sorted(get_args(Ending))


def test_each_section_has_cause_and_remedy() -> None:
    section = PAGE.split("## From a log line\n")[1].split("\n## ")[0]
    _, *parts = re.split(r"^### ", section, flags=re.M)
    lacking = [part.split("\n")[0] for part in parts if "**Cause.**" not in part or "**Remedy.**" not in part]
    assert lacking == ["result"]  # of tasks alone


def test_each_status_leads_to_its_section() -> None:
    """Every problem document that the middleware can answer with, and nothing else."""
    problems = {ending: problem.status for ending, problem in request._PROBLEMS.items()}
    problems["killed"] = request._KILLED.status
    found = {
        re.sub("`", "", kind): (int(status[:3]), link)
        for status, kind, link in rows("## From a status")
        if kind.startswith("`")
    }
    assert found == {ending: (status, f"[{ending}](#{ending})") for ending, status in problems.items()}
    assert {ending for ending in get_args(Ending) if ending not in found} == {"ok", "error", "result"}
    assert Settings().unmatched_status == problems["unroutable"]
    assert "unmatched_status" in PAGE


def below(kind: type[BaseException]) -> Iterator[type[BaseException]]:
    for child in kind.__subclasses__():
        yield child
        yield from below(child)


def test_each_error_is_on_the_page() -> None:
    for package in PACKAGES:
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if module.name != "rcon_gunicorn.conf":  # gunicorn's
                importlib.import_module(module.name)
    private = {"CloneUnavailable", "NotShared"}  # handled where they are raised; the second is of commands
    names = {kind.__name__ for kind in (RconError, ResponseCut, CheckFailed, *below(RconError))} - private
    assert len(names) >= 20
    named = {name for cells in rows("## Errors") for name in re.findall(r"`(\w+)`", cells[0])}
    assert named == names


def test_each_limit_on_what_runs_at_once_is_in_the_table() -> None:
    """The ``limit`` of each `ConcurrencyLimitExceeded` that the core raises."""
    limits = set()
    for file in (ROOT / "rcon_plugins").rglob("*.py"):
        for node in ast.walk(parsed(file)):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "ConcurrencyLimitExceeded":
                limit = next(keyword.value for keyword in node.keywords if keyword.arg == "limit")
                limits.add(BUDGET if ast.unparse(limit) == "BUDGET" else ast.literal_eval(limit))
    assert len(limits) >= 4
    assert {cells[0].strip("`") for cells in rows("### concurrency")} == limits
