"""docs/security.md: each promise names a test that tries to break it, and that test exists."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from tests.sources import parsed

ROOT = Path(__file__).resolve().parents[2]
ROWS = re.findall(
    r"^\| (.+) \| `(tests/\S+\.py)::(test_\w+)` \|$", (ROOT / "docs/security.md").read_text(), re.MULTILINE
)


def test_there_are_promises() -> None:
    section = (ROOT / "docs/security.md").read_text().partition("## Promise and test\n")[2]
    table = [line for line in section.splitlines() if line.startswith("| ")][1:]
    assert len(ROWS) == len(table) > 20


@pytest.mark.parametrize(("promise", "file", "name"), ROWS, ids=[row[2] for row in ROWS])
def test_the_test_of_a_promise_exists(promise: str, file: str, name: str) -> None:
    tree = parsed(ROOT / file)
    assert name in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}, promise
