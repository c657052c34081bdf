"""docs/reference/policy-file.md is correct: its files load, its commands print what it shows, and it has every key."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from rcon_plugins.settings.accounts import PathTemplate
from rcon_plugins.settings.file import json_schema, load
from rcon_plugins.settings.policy import Per

ROOT = Path(__file__).parents[3]
TEXT = (ROOT / "docs/reference/policy-file.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
FILES = [text for language, text in BLOCKS if language == "toml"]
COMMANDS = [
    (text, following[1] if following[0] == "text" else "")
    for (language, text), following in zip(BLOCKS, [*BLOCKS[1:], ("", "")], strict=True)
    if language == "sh"
]


@pytest.mark.parametrize("text", FILES)
def test_every_file_loads(tmp_path: Path, text: str) -> None:
    (tmp_path / "rcon.toml").write_text(text)
    assert load(tmp_path / "rcon.toml").policies


@pytest.mark.parametrize(("command", "printed"), COMMANDS)
def test_every_command_prints_what_the_page_says(tmp_path: Path, command: str, printed: str) -> None:
    (tmp_path / "rcon.toml").write_text(FILES[0])
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["/bin/sh", "-ec", command],
        cwd=tmp_path,
        env={**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, printed, "")


def keys_under(heading: str) -> set[str]:
    """Return the keys in the first column of the table under a heading."""
    section = TEXT.partition(f"\n### {heading}\n")[2].partition("\n### ")[0]
    rows = re.findall(r"^\| (`.*?) \|", section, re.MULTILINE)
    return {key for row in rows for key in re.findall(r"`([^`]+)`", row)}


@pytest.mark.parametrize(
    ("heading", "kind"),
    [
        ("A policy", "Policy"),
        ("Each", "Each"),
        ("Budget", "Budget"),
        ("IO", "IoLimits"),
        ("Rlimits", "Rlimits"),
        ("A route", "Route"),
    ],
)
def test_the_reference_has_every_key(heading: str, kind: str) -> None:
    assert keys_under(heading) == set(json_schema()["$defs"][kind]["properties"])


def test_the_reference_has_every_key_of_memory_that_expands() -> None:
    table = json_schema()["$defs"]["Policy"]["properties"]["memory"]["anyOf"][0]["anyOf"][-1]
    keys = {key for key in keys_under("Memory") if key.isidentifier()}
    assert keys == set(table["properties"])


def test_the_reference_has_every_key_of_the_file() -> None:
    assert keys_under("The file") == set(json_schema()["properties"])


def test_the_reference_has_every_placeholder() -> None:
    names = {*PathTemplate.names, "header:NAME", "path:N"}
    assert {key for key in keys_under("Placeholders") if key.startswith("{")} == {f"{{{n}}}" for n in names}


def test_the_reference_has_every_attribute_that_can_be_a_key() -> None:
    assert keys_under("Keys") == {*Per.names, "header:NAME", "path:N"}
