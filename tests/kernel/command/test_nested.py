"""rcon run inside of rcon run: the limits of both hold, also as different users."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rcon_plugins.command import Order, run
from rcon_plugins.kernel.cgroup import Hierarchy, Resources
from tests.kernel.cgroup.helpers import DISK
from tests.kernel.command.harness import become_rcon, left_by, rcon
from tests.kernel.quota import judge

NOBODY = 65534
#: The command as a shell finds it; in the emulated machine Python takes seconds to start.
RCON = str(Path(sys.executable).parent / "rcon")
SPIN = ["sh", "-c", "while :; do :; done"]
ALLOCATE = ["sh", "-c", "x=$(head -c 150M /dev/zero | tr '\\0' x)"]


def test_it_is_inside_of_the_others_group() -> None:
    done = rcon("run", "--pids", "40", "-g", "outer", "--", RCON, "run", "--pids", "9", "-g", "inner", "--",
                "cat", "/proc/self/cgroup")  # fmt: skip
    assert (done.status, done.err) == (0, "")
    paths = [line.split(":", 2)[2] for line in done.out.splitlines() if "/work/inner/main" in line]
    assert paths
    assert all("/work/outer/rcon-" in path for path in paths)


@pytest.mark.parametrize(("outer", "inner"), [("20%", "80%"), ("80%", "20%")])
def test_the_tighter_cpu_quota_holds(outer: str, inner: str, tmp_path: Path) -> None:
    report = tmp_path / "inner.json"

    def measure() -> dict[float, float]:
        done = rcon("run", "--cpu", outer, "--", RCON, "run", "--cpu", inner, "--timeout", "3s",
                    "--json", report, "--", *SPIN)  # fmt: skip
        assert done.status == 137
        usage: dict[str, Any] = json.loads(report.read_text())["usage"]
        return {0.2: usage["cpu_seconds"] / usage["wall_seconds"]}

    judge(measure)


@pytest.mark.parametrize(("outer", "inner"), [("64M", "256M"), ("256M", "64M")])
def test_the_tighter_memory_limit_holds(outer: str, inner: str) -> None:
    done = rcon(
        "run", "--memory", outer, "--swap", "0", "--", RCON, "run", "--memory", inner, "--", *ALLOCATE
    )
    assert done.status != 0
    assert done.report["usage"]["memory_peak"] <= 1.05 * 2**20 * (64 if outer == "64M" else 110)


def test_the_inner_as_another_user() -> None:
    done = rcon(
        "run", "--pids", "40", "--", RCON, "run", "--user", "nobody", "--pids", "9", "--", "id", "-un"
    )
    assert (done.status, done.out, done.err) == (0, "nobody\n", "")


@pytest.mark.layout("v1", "hybrid")
def test_limits_of_io_cannot_be_within_others_on_v1() -> None:
    done = rcon("run", "--write", "5M", "--device", DISK, "--", RCON, "run", "--write", "1M", "--device", DISK,
                "--", "true")  # fmt: skip
    assert done.status == 125
    assert "the IO limits of " in done.err
    assert "rcon set" in done.err


def as_nobody_inside(delegate: bool, tmp_path: Path) -> tuple[int, str, str]:
    """The status of an inner rcon of nobody's, and what it said, in a group of root's that was given to it or not.

    In forks of this process, whose Python nobody may not be able to read.
    """
    hierarchy = Hierarchy.discover()
    streams = [tmp_path / "out", tmp_path / "err"]
    for stream in streams:
        stream.touch()
        stream.chmod(0o666)
    tmp_path.chmod(0o777)

    def inner() -> None:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
        become_rcon(["run", "--pids", "9", "-g", "inner", "--", "cat", "/proc/self/cgroup"], streams)

    order = Order(
        program="/bin/true",
        arguments=("true",),
        variables={},
        group="outer",
        resources=Resources(pids_max=40),
        configure=lambda cgroup: cgroup.configure(Resources(pids_max=40)),
        become=inner,
        delegate_to=(NOBODY, NOBODY) if delegate else None,
    )
    child = os.fork()
    if child == 0:
        status = 99
        try:
            status = run(order, hierarchy).status
        finally:
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert left_by(child) == []
    out, err = (stream.read_text() for stream in streams)
    return status, out, err


@pytest.fixture
def open_path() -> Iterator[Path]:
    """A directory that nobody can reach, unlike pytest's."""
    path = Path(tempfile.mkdtemp(prefix="rcon-nested-", dir="/tmp"))
    try:
        yield path
    finally:
        shutil.rmtree(path)


def test_a_group_that_was_given_to_another_user(open_path: Path) -> None:
    status, out, err = as_nobody_inside(True, open_path)
    assert (status, err) == (0, "")
    paths = [line.split(":", 2)[2] for line in out.splitlines() if "/work/inner/main" in line]
    assert paths
    assert all("/work/outer/rcon-" in path for path in paths)


def test_a_group_that_was_not(open_path: Path) -> None:
    status, out, err = as_nobody_inside(False, open_path)
    assert (status, out) == (125, "")
    assert err.startswith("rcon: ")
    assert "rcon run --user nobody" in err
