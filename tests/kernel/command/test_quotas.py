"""CPU quotas of commands, measured in one window: of `rcon run`, of `rcon run` inside another, of `rcon attach`."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rcon_plugins.kernel.cgroup import Resources
from tests.kernel.cgroup.helpers import layout
from tests.kernel.cgroup.helpers import running as running_child
from tests.kernel.command.harness import Done, left_by, rcon, until
from tests.kernel.command.test_attach import Processes, attach, end, running, watcher
from tests.kernel.command.test_nested import RCON, SPIN, open_path, within
from tests.kernel.quota import judge, window
from tests.processes import cpu_seconds

__all__ = ["open_path"]  # a fixture


def share(done: Done) -> float:
    """Return the CPUs that a command used until its timeout."""
    assert done.report["outcome"] == "timeout"
    used: float = done.report["usage"]["cpu_seconds"] / done.report["usage"]["wall_seconds"]
    return used


def alone() -> float:
    return share(rcon("run", "--cpu", "10%", "--timeout", f"{window(0.1):g}s", "--", *SPIN))


def inner_rcon() -> float:
    """The inner Python has to start within the outer quota."""
    return share(
        rcon("run", "--cpu", "20%", "--timeout", "5s", "--", RCON, "run", "--cpu", "80%", "--", *SPIN)
    )


def nested(outer: float, inner: str, folder: Path) -> float:
    words = ["run", "--cpu", inner, "--timeout", "3s", "--json", f"{folder}/report.json", "--", *SPIN]
    assert within(Resources(cpu_quota=outer), words, folder)[0] == 137
    usage: dict[str, Any] = json.loads(folder.joinpath("report.json").read_text())["usage"]
    used: float = usage["cpu_seconds"] / usage["wall_seconds"]
    return used


@contextlib.contextmanager
def attached_both() -> Iterator[Processes]:
    """Two busy processes in a group with a quota. The group goes with them."""
    with running("yes", count=2) as both:
        group = f"yes-{both[0].pid}"
        done = attach(both, "--cpu", "30%", "--group", group)
        assert (done.status, done.out, done.err) == (0, f"{group}: 2 processes\n", "")
        mine = watcher(both[0].pid)
        assert watcher(both[1].pid) == mine
        yield both
        end(both)
        until(lambda: not left_by(mine), "the group goes after its last process")
    until(lambda: not Path("/proc", str(mine)).exists(), "the watcher ends")


def attached(both: Processes) -> float:
    before, began = sum(cpu_seconds(one.pid) for one in both), time.monotonic()
    time.sleep(window(0.3))
    used = sum(cpu_seconds(one.pid) for one in both) - before
    return used / (time.monotonic() - began)


@pytest.mark.measures
def test_quotas_hold_and_of_two_the_tighter_one(open_path: Path) -> None:
    open_path.chmod(0o777)
    looser, tighter = (open_path / name for name in ("looser", "tighter"))
    looser.mkdir()
    tighter.mkdir()
    begun: list[tuple[float, Any, tuple[Any, ...]]] = [
        (0.1, alone, ()),
        (0.2, nested, (0.2, "80%", looser)),
        (0.2, nested, (0.8, "20%", tighter)),
    ]
    if layout() != "v2":  # Python takes too long to start within the quota in the emulated machine
        begun.append((0.2, inner_rcon, ()))
    with attached_both() as both:

        def measure() -> list[tuple[float, float]]:
            with contextlib.ExitStack() as stack:
                children = [
                    (quota, stack.enter_context(running_child(None, function, *arguments)))
                    for quota, function, arguments in begun
                ]
                return [(0.3, attached(both)), *((quota, child.result()) for quota, child in children)]

        judge(measure)
