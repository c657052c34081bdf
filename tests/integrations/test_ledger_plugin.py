"""The example of a third-party plugin, installed as one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import rcon_plugins
from rcon_plugins import Manager
from rcon_plugins.settings.file import from_mapping
from tests.children import in_child
from tests.kernel.executors.service import ask, serve

LEDGER = Path(rcon_plugins.__file__).parent.parent / "examples" / "ledger-plugin"


def test_the_example_plugin_installed_and_named_in_the_settings(tmp_path: Path) -> None:
    site = tmp_path / "site"
    project = shutil.copytree(LEDGER, tmp_path / "ledger-plugin")  # the original may be on a read-only disk
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--target", site, project], check=True)
    ledger = tmp_path / "ledger.jsonl"

    def program() -> None:
        sys.path.insert(0, str(site))
        os.environ["RCON_LEDGER"] = str(ledger)
        settings = from_mapping(
            {
                "plugins": ["ledger"],
                "policy": {"p": {"per": "host", "each": {"timeout": "30s"}}},
                "route": [{"policy": "p"}],
            }
        )
        manager = Manager(settings).start(serve)
        ask(manager, "burn", 0.1, host="a.example")
        ask(manager, "raises", host="b.example")
        manager.close()

    in_child(program)
    lines = [json.loads(line) for line in ledger.read_text().splitlines()]
    assert [(line["key"], line["work"], line["ending"]) for line in lines] == [
        ("a.example", "burn", "ok"),
        ("b.example", "raises", "error"),
    ]
    assert lines[0]["cpu_seconds"] > 0  # how much of the tenth of a second is the machine's to say

    command = (
        f"import sys; sys.path.insert(0, {str(site)!r}); from rcon_plugins.cli.rcon import main; "
        "sys.argv = ['rcon', 'ledger']; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", command],
        env={**os.environ, "RCON_PLUGINS": "ledger", "RCON_LEDGER": str(ledger)},
        capture_output=True,
        text=True,
        check=True,
    )
    rows = [line.split() for line in done.stdout.splitlines()]
    assert [(works, name) for _, _, works, name in rows] == [("1", "p~a.example"), ("1", "p~b.example")]
    assert float(rows[0][0]) == pytest.approx(lines[0]["cpu_seconds"], abs=0.01)
