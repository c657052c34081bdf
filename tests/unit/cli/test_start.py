"""The console scripts as processes: an interrupt while they load, and output to a full disk."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

_INTERRUPTED_AT = """
import os, signal, sys
class Interrupt:
    def find_spec(self, name, *rest):
        if name == sys.argv[0]:
            os.kill(os.getpid(), signal.SIGINT)
sys.argv = sys.argv[1:]
sys.meta_path.insert(0, Interrupt())
from rcon_plugins.cli.start import main
main()
"""


@pytest.mark.parametrize("module", ["rcon_plugins.cli.run.run", "rcon_plugins.cli.rcon"])
def test_an_interrupt_while_it_loads_is_quiet(module: str) -> None:
    words = [module, "run", "true"] if module.endswith(".run") else [module, "ls"]
    done = subprocess.run(
        [sys.executable, "-c", _INTERRUPTED_AT, *words], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")


def test_a_full_disk_is_one_line() -> None:
    code = "from rcon_plugins.cli.start import main; main()"
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-c", code, "schema"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert (done.returncode, done.stderr) == (125, "rcon: standard output: No space left on device\n")
