"""docs/howto/one-command.md and the example: each command parses, each option is documented, the example runs."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from rcon_plugins.cli.options import RUN_OPTIONS, parse
from rcon_plugins.cli.run.commands import attach, run

ROOT = Path(__file__).resolve().parents[3]
PAGE = (ROOT / "docs" / "howto" / "one-command.md").read_text()
README = (ROOT / "README.md").read_text()
COMMANDS = {"run": run, "attach": attach}


def lines() -> list[str]:
    blocks = re.findall(r"^```sh\n(.*?)^```", PAGE + README, re.MULTILINE | re.DOTALL)
    helps = f"{run.help}\n{attach.help}"
    return [
        line.strip()
        for line in "\n".join([*blocks, helps]).splitlines()
        if re.match(r" *rcon (run|attach) ", line)
    ]


@pytest.mark.parametrize("line", lines())
def test_the_commands_parse(line: str) -> None:
    _, name, *words = shlex.split(line, comments=True)
    if name == "run":
        assert parse(words, RUN_OPTIONS).options
    else:
        assert attach.make_context(name, words).params


@pytest.mark.smoke
def test_the_page_describes_each_option() -> None:
    options = {one for command in COMMANDS.values() for parameter in command.params for one in parameter.opts}
    assert [
        one for one in options if one.startswith("-") and f"`{one}" not in PAGE and f" {one} " not in PAGE
    ] == []


def test_the_example_runs(tmp_path: Path) -> None:
    script = tmp_path / "rcon"
    code = "from rcon_plugins.cli.start import main; main()"
    script.write_text(f"#!/bin/sh\nPYTHONPATH={ROOT} exec {sys.executable} -c '{code}' \"$@\"\n")
    script.chmod(0o755)
    done = subprocess.run(
        [ROOT / "examples" / "command" / "held-down.sh"],
        env={"PATH": "/usr/bin:/bin", "RCON": str(script)},
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert "exit status 137" in done.stdout, done
    assert "saved\n" in done.stdout
    assert "rcon: wall time limit 1 s reached; ended within the grace of 5 s" in done.stderr
    assert "it finished" in done.stdout
    assert "status 137 of the second" in done.stdout
    assert "rcon: memory limit 64 MiB of the group held-down-" in done.stderr
    assert "in its group\nback where it was\n" in done.stdout
    assert "rcon: memory limit 32 MiB reached" in done.stderr
