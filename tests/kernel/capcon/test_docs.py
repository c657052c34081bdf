"""The commands in docs/howto/capcon.md and README.md run, and the example works as described."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

from tests.kernel.capcon.command import NOBODY

ROOT = Path(__file__).resolve().parents[3]
LASTING = ("http.server", "make -C")  # servers, and commands that need files of their own
FEWEST = 9


def test_commands_of_the_documentation(everybodys: Path, python: str) -> None:
    lines = [
        line
        for page in (ROOT / "README.md", ROOT / "docs/howto/capcon.md")
        for block in re.findall(r"^```sh\n(.*?)^```$", page.read_text(), re.M | re.S)
        for line in block.splitlines()
        if "capcon" in line and not any(word in line for word in LASTING)
    ]
    assert len(lines) >= FEWEST
    path = f"{everybodys}:{Path(python).parent}:{os.environ['PATH']}"
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "work").mkdir()
        for line in lines:
            done = subprocess.run(
                ["bash", "-euc", line],
                cwd=folder,
                env={**os.environ, "PATH": path},
                capture_output=True,
                text=True,
                check=False,
            )
            expected = 1 if line.endswith("-- su") else 0  # su is setuid: it would hold other rights
            assert (done.returncode, done.stderr) == (expected, ""), line
        assert Path(folder, "work/file").read_text() == "done\n"


@pytest.mark.smoke
def test_layers_of_the_example(everybodys: Path) -> None:
    """Run the example as an ordinary user, and as a user who cannot write to the folder of the script."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        script = shutil.copy(ROOT / "examples/capcon/layers.sh", folder)
        scratch = Path(folder, "tmp")
        scratch.mkdir()
        scratch.chmod(0o777)
        done = subprocess.run(
            ["sh", script],
            env={"PATH": f"{everybodys}:{os.environ['PATH']}", "TMPDIR": str(scratch)},
            user=NOBODY,
            group=NOBODY,
            extra_groups=[],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
    answers = [line.split() for line in done.stdout.splitlines()]
    assert len(answers) == 12
    assert [(words[0], words[3]) for words in answers if words[-1] == "yes"] == [
        ("user", "."),
        ("user", "job"),
        ("user", "job/scratch"),
        ("job", "job"),
        ("job", "job/scratch"),
        ("helper", "job/scratch"),
        ("greedy", "job"),
        ("greedy", "job/scratch"),
    ]
