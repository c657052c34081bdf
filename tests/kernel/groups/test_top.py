"""rcon top of real groups, on a terminal and without one; more of its terminal in tests/integrations/test_top.py."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest

from rcon_plugins.cli.rcon import run_main
from rcon_plugins.kernel.cgroup import Resources
from rcon_plugins.tree.instance import Instance
from tests.kernel.cgroup.helpers import MIB, eventually, running
from tests.terminals import MAIN, terminal

pytestmark = pytest.mark.each_layout


@pytest.fixture
def busy(instance: Instance, own: str) -> Iterator[str]:
    """The name of a group with a process that keeps a CPU busy, as far as its quota lets it."""
    together = instance.policy_cgroup(f"{own}~busy").create()
    together.configure(Resources(cpu_quota=0.2, memory_max=64 * MIB))
    with running(instance.executor_cgroup(f"{own}~busy", "1").create(), _burn):
        eventually(lambda: (together.read().memory_current or 0) > 16 * MIB, 60)
        yield f"{own}~busy"


def _burn() -> None:
    held = bytearray(16 * MIB)
    held[::4096] = b"x" * len(held[::4096])
    while True:
        pass


@pytest.mark.smoke
def test_a_live_table(busy: str) -> None:
    with terminal("top", "--interval", "0.5") as it:
        it.until(lambda: re.search(rf"{busy} +[1-9][0-9.]*% +\d", "\n".join(it.screen())))
        lines = it.screen()
        assert len(lines) == 24
        assert max(map(len, lines)) <= 80
        assert "sorted by cpu" in lines[0]
        assert lines[1].split()[:3] == ["GROUP", "CPU", "THROTTLED"]
        assert lines[-1].startswith("q quit ")
        it.keys("m")
        it.until(lambda: it.shows("sorted by memory"))
        it.keys("?")
        it.until(lambda: it.shows("any other key goes back"))
        it.keys("x")
        it.until(lambda: not it.shows("any other key goes back"))
        it.keys("q")
        assert it.status() == 0
        assert it.is_clean()


@pytest.mark.once
def test_plain_tables_without_a_terminal(busy: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_main(["top", "--interval", "0.5", "--iterations", "2", "--sort", "name"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "\x1b" not in out
    first, second = out.removesuffix("\n\n").split("\n\n")
    for table in (first, second):
        heading, _, *lines = table.splitlines()
        assert "sorted by name, every 0.5 s" in heading
        (line,) = [line.split() for line in lines if line.startswith(f"{busy} ")]
        assert 0 < float(line[1].removesuffix("%")) < 50  # of a quota of 20 %
        assert line[3].endswith("M")
    with terminal(
        "top",
        "--iterations",
        "1",
        "--interval",
        "0.2",
        program=f"import os; os.environ['TERM'] = 'dumb'; {MAIN}",
    ) as it:
        assert it.status() == 0
        assert b"\x1b" not in it.said
        assert b"GROUP" in it.said


def test_an_object_for_each_refresh(busy: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_main(["top", "--json", "--interval", "1", "--iterations", "2"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(lines) == 2
    assert lines[1]["time"] > lines[0]["time"]
    for one in lines:
        (found,) = [group for group in one["groups"] if group["group"] == busy]
        assert 0 < found["cpu"] < 0.5
        assert found["memory"] > 16 * MIB
        assert found["memory_limit"] == 64 * MIB
        assert 0 <= found["throttled"] <= 1


@pytest.mark.once
@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--sort", "colour"], "'colour' is not one of"),
        (["--interval", "0"], "0.0 is not in the range"),
        (["--interval", "soon"], "'soon' is not a valid float"),
        (["--iterations", "0"], "0 is not in the range"),
    ],
)
def test_bad_usage(arguments: list[str], says: str, capsys: Any) -> None:
    assert run_main(["top", *arguments]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert says in err
