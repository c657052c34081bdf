"""A capcon that every user can run, even if this checkout and its interpreter are in a private directory."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

import rcon_plugins
from tests.kernel.capcon.command import NOBODY

ENOUGH = "import sys; sys.exit(sys.version_info < (3, 11))"


@pytest.fixture(scope="session")
def python() -> str:
    """Return the path of a Python that the user nobody may execute."""
    for path in (Path(sys.executable).resolve(), Path("/usr/bin/python3"), Path("/usr/local/bin/python3")):
        try:
            done = subprocess.run(
                [path, "-I", "-c", ENOUGH], user=NOBODY, stderr=subprocess.DEVNULL, check=False
            )
        except OSError:
            continue
        if done.returncode == 0:
            return str(path)
    raise FileNotFoundError("no Python 3.11 or newer that nobody may execute: apt-get install python3")


@pytest.fixture(scope="session")
def everybodys(python: str) -> Iterator[Path]:
    """Return a folder with a `capcon` that every user may run."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for package in (rcon_plugins, click):
            source = Path(str(package.__file__)).parent
            # With its byte code, which no capcon could write here: each would compile what it imports.
            shutil.copytree(source, folder / "lib" / source.name)
        script = f"""#!{python} -IB
import sys
sys.path.insert(0, "{folder}/lib")
from rcon_plugins.cli.capcon.commands import main
main()
"""
        (folder / "capcon").write_text(script)
        for path in (folder, *folder.rglob("*")):
            path.chmod(0o755 if path.is_dir() or path.name == "capcon" else 0o644)
        yield folder
