"""rcon run inside rcon run: the limits of both hold, for different users too."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from rcon_plugins.command.run import Order, run
from rcon_plugins.kernel.cgroup import Hierarchy, Resources
from rcon_plugins.kernel.cgroup.v2 import MOST_DESCENDANTS
from tests.commands import become_rcon
from tests.kernel.cgroup.helpers import DISK
from tests.kernel.command.harness import ALLOCATE, left_by, rcon

pytestmark = pytest.mark.each_layout

NOBODY = 65534
#: The command as a shell finds it; in the emulated machine Python takes seconds to start.
RCON = str(Path(sys.executable).parent / "rcon")
SPIN = ["sh", "-c", "while :; do :; done"]
PIDS = Resources(pids_max=40)
INNER = ["run", "--pids", "9", "-g", "inner", "--", "cat", "/proc/self/cgroup"]
TOO_MUCH = ALLOCATE.format(150).split()


def within(
    resources: Resources,
    words: list[str],
    folder: Path,
    user: int | None = None,
    *,
    delegate: bool = False,
    told: Path | None = None,
) -> tuple[int, str, str]:
    """Return the status of an inner rcon in the group of an outer one, and its output.

    The outer rcon executes no other program. It runs the inner one in a fork, as ``user``, because that user may not be
    able to read this Python.
    """
    hierarchy = Hierarchy.discover()
    streams = [folder / "out", folder / "err"]
    for stream in streams:
        stream.write_text("")
        stream.chmod(0o666)
    folder.chmod(0o777)

    def inner() -> None:
        if user is not None:
            os.setgroups([])
            os.setresgid(user, user, user)
            os.setresuid(user, user, user)
        become_rcon(words, streams)

    order = Order(
        program="/bin/true",
        arguments=("true",),
        variables={},
        group="outer",
        resources=resources,
        become=inner,
        delegate_to=(NOBODY, NOBODY) if delegate else None,
    )
    child = os.fork()
    if child == 0:
        status = 99
        try:
            ended = run(order, hierarchy)
            status = ended.status
            if told is not None:
                told.write_text(json.dumps([ended.end.ending, ended.end.limit]))
        finally:
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert left_by(child) == []
    out, err = (stream.read_text() for stream in streams)
    return status, out, err


@pytest.fixture
def open_path() -> Iterator[Path]:
    """Make a directory that the user nobody can enter, unlike those of pytest."""
    path = Path(tempfile.mkdtemp(prefix="rcon-nested-", dir="/tmp"))
    try:
        yield path
    finally:
        shutil.rmtree(path)


@pytest.mark.smoke
def test_an_inner_group_is_inside_the_outer_group() -> None:
    done = rcon("run", "--pids", "40", "-g", "outer", "--", RCON, "run", "--pids", "9", "-g", "inner", "--",
                "cat", "/proc/self/cgroup")  # fmt: skip
    assert (done.status, done.err) == (0, "")
    paths = [line.split(":", 2)[2] for line in done.out.splitlines() if "/work/inner/main" in line]
    assert paths
    assert all("/work/outer/rcon-" in path for path in paths)


@pytest.mark.parametrize(("outer", "inner"), [("64M", "256M"), ("256M", "64M")])
def test_the_tighter_memory_limit_holds(outer: str, inner: str, open_path: Path) -> None:
    resources = Resources(memory_max=int(outer[:-1]) << 20, swap_max=0)
    status, _, err = within(resources, ["run", "--memory", inner, "--", *TOO_MUCH], open_path)
    assert status != 0
    # At the outer limit the kernel may kill the inner rcon, which then cannot report anything.
    assert ("memory limit 64 MiB reached" in err) == (inner == "64M")
    assert "memory limit 256 MiB reached" not in err


def test_an_inner_command_as_another_user() -> None:
    done = rcon(
        "run", "--pids", "40", "--", RCON, "run", "--user", "nobody", "--pids", "9", "--", "id", "-un"
    )
    assert (done.status, done.out, done.err) == (0, "nobody\n", "")


@pytest.mark.layout("v1", "hybrid")
def test_nested_io_limits_are_refused_on_v1() -> None:
    done = rcon("run", "--write", "5M", "--device", DISK, "--", RCON, "run", "--write", "1M", "--device", DISK,
                "--", "true")  # fmt: skip
    assert done.status == 125
    assert "the IO limits of " in done.err
    assert "set IO limits only in " in done.err


def test_an_inner_rcon_in_a_group_delegated_to_its_user(open_path: Path) -> None:
    status, out, err = within(PIDS, INNER, open_path, NOBODY, delegate=True)
    assert (status, err) == (0, "")
    paths = [line.split(":", 2)[2] for line in out.splitlines() if "/work/inner/main" in line]
    assert paths
    assert all("/work/outer/rcon-" in path for path in paths)


#: Make cgroups below the own one until the kernel refuses, and remove them. Print how many there were, and the reason.
MAKE_MANY = """
import errno, os
(path,) = [line[3:].strip() for line in open("/proc/self/cgroup") if line.startswith("0::")]
made, reason = [], ""
unified = "/sys/fs/cgroup/unified"
own = f"{unified if os.path.isdir(unified) else '/sys/fs/cgroup'}{path}"
while len(made) < 3000 and not reason:
    try:
        os.mkdir(f"{own}/{len(made)}")
        made.append(f"{own}/{len(made)}")
    except OSError as error:
        reason = errno.errorcode[error.errno]
try:
    open(f"{own}/cgroup.max.descendants", "w")
except OSError as error:
    reason += " " + errno.errorcode[error.errno]
for each in made:
    os.rmdir(each)
print(len(made), reason)
"""


@pytest.mark.layout("v2", "hybrid")
def test_the_user_of_a_command_makes_a_bounded_number_of_cgroups() -> None:
    done = rcon("run", "--user", "nobody", "--", "/usr/bin/python3", "-c", MAKE_MANY)
    below = MOST_DESCENDANTS - 1  # the group has one already, for the command
    assert (done.status, done.out.split()) == (0, [str(below), "EAGAIN", "EACCES"])


def test_an_inner_rcon_in_a_group_not_delegated(open_path: Path) -> None:
    status, out, err = within(PIDS, INNER, open_path, NOBODY)
    assert (status, out) == (125, "")
    assert err.startswith("rcon: ")
    assert "rcon run --user nobody" in err


@pytest.mark.layout("v1", "hybrid")
@pytest.mark.parametrize("inner", ["256M", None])
def test_the_outer_rcon_reports_its_limit_for_a_nested_kill(inner: str | None) -> None:
    """This runs on the host only, because the inner Python has to start.

    v1 counts the kill in the inner cgroup, which is gone by then.
    """
    limits = [] if inner is None else ["--memory", inner]
    done = rcon("run", "--memory", "64M", "--swap", "0", "--", RCON, "run", *limits, "--", *TOO_MUCH)
    assert done.status == 137
    assert done.err.splitlines()[-1] == "rcon: memory limit 64 MiB reached (peak 64.0 MiB)"
    assert (done.report["outcome"], done.report["limit"]) == ("memory", "memory")


@pytest.mark.layout("v1", "hybrid")
def test_the_outer_rcon_does_not_report_a_kill_of_the_inner_limit() -> None:
    done = rcon(
        "run", "--memory", "256M", "--", RCON, "run", "--memory", "32M", "--swap", "0", "--", *TOO_MUCH
    )
    assert done.status == 137
    assert done.err.splitlines() == ["rcon: memory limit 32 MiB reached (peak 32.0 MiB)"]
    assert (done.report["outcome"], done.report["limit"]) == ("error", None)


def test_the_outer_rcon_reports_the_kill_of_the_inner_rcon(open_path: Path) -> None:
    """The inner rcon cannot report its own kill, and leaves its cgroups behind."""
    resources = Resources(memory_max=64 << 20, swap_max=0)
    status, _, _ = within(resources, ["run", "--", *TOO_MUCH], open_path, told=open_path / "told")
    assert status == 137
    assert json.loads(open_path.joinpath("told").read_text()) == ["memory", "memory"]
