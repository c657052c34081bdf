"""The commands of docs/howto/groups.md do what the page says."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from rcon_plugins.cli.rcon import run_main
from rcon_plugins.kernel.cgroup import Resources
from rcon_plugins.tree.instance import Instance
from tests.kernel.cgroup.helpers import MIB, running, sleep_forever

pytestmark = pytest.mark.each_layout

ROOT = Path(__file__).parents[3]
FEWEST = 10


def commands() -> list[str]:
    """Each line that calls rcon, without what its output is piped to."""
    page = (ROOT / "docs/howto/groups.md").read_text()
    lines = [
        line for block in re.findall(r"^```sh\n(.*?)^```$", page, re.M | re.S) for line in block.splitlines()
    ]
    return [line.partition(" | ")[0] for line in lines if line.startswith("rcon ")]


@pytest.mark.smoke
def test_each_command_of_the_page(instance: Instance, own: str, capsys: pytest.CaptureFixture[str]) -> None:
    """As it stands there, of groups that no other test has; the live ones once."""
    instance.policy_cgroup(f"{own}~a.example").create().configure(
        Resources(cpu_quota=0.3, memory_max=64 * MIB)
    )
    instance.policy_cgroup(f"{own}-nightly").create().configure(Resources(cpu_quota=0.5, memory_max=64 * MIB))
    with (
        running(instance.executor_cgroup(f"{own}~a.example", "1").create(), sleep_forever),
        running(instance.executor_cgroup(f"{own}-nightly", "main").create(), sleep_forever) as command,
    ):
        done = []
        for line in commands():
            words = line.replace("nightly", f"{own}-nightly").replace("tenant~", f"{own}~")
            if words.startswith("rcon watch"):
                continue  # ends with its group: see test_watching.py
            if words.startswith("rcon top"):
                words += " --iterations 1 --interval 0.1"
            assert run_main(shlex.split(words)[1:]) == 0, line
            assert capsys.readouterr().err == "", line
            done.append(line.split()[1])
        assert len(done) >= FEWEST
        assert {"ls", "stat", "top", "set", "freeze", "thaw", "kill"} == set(done)
        assert command.wait() == -9
