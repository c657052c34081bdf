"""A user makes cgroups in its group that imitate those of rcon. rcon releases or kills no other process for them."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from rcon_plugins.kernel import proc
from rcon_plugins.kernel.cgroup import Cgroup, Hierarchy, IoMax, Resources, device_of
from tests.commands import become_rcon
from tests.kernel.cgroup.helpers import DISK, MIB, Running, running, sleep_forever
from tests.kernel.command.harness import left_by, rcon, until

pytestmark = pytest.mark.each_layout

NOBODY = 65534
DEAD = "rcon-999999999-5"


@pytest.fixture
def group() -> Iterator[Cgroup]:
    """Make a group and its leaf that belong to nobody, like ``rcon run --user nobody``."""
    cgroup = Hierarchy.discover().cgroup(f"/rcon-tests-{os.getpid()}/held").create()
    cgroup.delegate(NOBODY, NOBODY)
    try:
        yield cgroup
    finally:
        cgroup.kill()
        above = Hierarchy.discover().cgroup(cgroup.path.rpartition("/")[0])
        assert above.delete()


def move_into(group: Cgroup, below: str) -> None:
    """Change to nobody, make the cgroups, and enter the last one."""
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)
    for directory in group.directories:
        place = Path(directory)
        for name in below.split("/"):
            place /= name
            place.mkdir()
            for cpuset in ("cpuset.cpus", "cpuset.mems"):
                if (place / cpuset).exists() and not (place / "cgroup.type").exists():
                    (place / cpuset).write_text((place.parent / cpuset).read_text())
        (place / "cgroup.procs").write_text(str(os.getpid()))


@contextlib.contextmanager
def nobody_in(group: Cgroup, below: str) -> Iterator[Running]:
    """Run a process as nobody in a cgroup that it made."""
    ready, done = os.pipe()

    def act() -> None:
        move_into(group, below)
        os.write(done, b"in")
        time.sleep(600)

    leaf = group.child("main").create()
    leaf.delegate(NOBODY, NOBODY)
    with running(leaf, act) as process:
        os.close(done)
        assert os.read(ready, 2) == b"in"
        os.close(ready)
        yield process


def where(pid: int) -> set[str]:
    """Return the cgroups of a process in the hierarchies that rcon uses."""
    lines = Path(f"/proc/{pid}/cgroup").read_text().splitlines()
    return {line.split(":", 2)[2] for line in lines if "rcon-tests" in line}


@pytest.mark.smoke
def test_a_process_without_a_watcher_is_not_moved_back(group: Cgroup) -> None:
    with nobody_in(group, f"{DEAD}/attached/x") as process:
        before = Path(f"/proc/{process.pid}/cgroup").read_text()
        assert where(process.pid) == {f"{group.path}/{DEAD}/attached/x"}
        done = rcon("gc", "--below", group.path)
        assert done.status == 1
        assert f"kept: attached/ belongs to uid {NOBODY}" in done.out
        assert Path(f"/proc/{process.pid}/cgroup").read_text() == before


@pytest.mark.parametrize("whole", [True, False])
def test_release_signals_no_other_process(group: Cgroup, whole: bool) -> None:
    name = f"backup-{os.getpid()}"
    with running(None, sleep_forever) as victim:
        instance = f"rcon-{victim.pid}-{proc.start_time(victim.pid)}"
        with nobody_in(group, f"{instance}/attached/{name}") as process:
            done = rcon("attach", "--release", name if whole else str(process.pid))
            assert done.status != 0
            assert f"belongs to uid {NOBODY}" in done.err
            assert done.err.count("\n") == 1
            assert proc.start_time(victim.pid) is not None
            assert where(process.pid) == {f"{group.path}/{instance}/attached/{name}"}


def make_deep(directories: list[str]) -> None:
    """Change to nobody, and nest cgroups until their path is longer than PATH_MAX."""
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)
    for directory in directories:
        os.chdir(directory)
        for _ in range(25):
            Path("d" * 200).mkdir()
            os.chdir("d" * 200)


def test_cgroups_deeper_than_the_longest_path(group: Cgroup) -> None:
    with running(None, make_deep, group.directories) as nobody:
        assert nobody.wait() == 0
    with running(group.child("main").create(), sleep_forever) as process:
        assert rcon("ls").status == 0
        assert rcon("gc", "--below", group.path).status == 0
        group.kill()
        assert process.wait() == -signal.SIGKILL
    assert group.delete(recursive=True)


@pytest.mark.parametrize("limits_first", [True, False])
def test_io_limits_cannot_be_left(limits_first: bool) -> None:
    disk = Resources(io={device_of(str(DISK)): IoMax(wbps=MIB)})
    group = Hierarchy.discover().cgroup(f"/rcon-tests-{os.getpid()}").create()
    try:
        if limits_first:
            group.configure(disk)
        group.delegate(NOBODY, NOBODY)
        if not limits_first:
            group.configure(disk)
        for mount, directory in zip(group.mounts, group.directories, strict=True):
            flat = mount.version == 1 and "blkio" in mount.controllers
            assert Path(directory).stat().st_uid == (0 if flat else NOBODY), directory
    finally:
        assert group.delete()


def test_a_second_command_of_the_user_gives_no_escape() -> None:
    """On v1 a user who may write to a cgroup may move its processes there, from anywhere."""
    name = f"wide-{os.getpid()}"
    words = ["run", "--user", "nobody", "--group", name, "--", "sleep", "1000"]
    with running(None, become_rcon, words, []) as wide:
        files = f"work/{name}/main/cgroup.procs"
        places = until(lambda: [file for tree in left_by(wide.pid) for file in tree.glob(files)], "it runs")
        script = "for place in $@; do (echo $$ > $place) 2>/dev/null; done; cat /proc/self/cgroup"
        done = rcon("run", "--user", "nobody", "--pids", "20", "--", "sh", "-c", script, "sh", *places)
        assert done.status == 0
        assert "/rcon-" in done.out
        assert name not in done.out
        os.kill(wide.pid, signal.SIGTERM)
        assert wide.wait() == 128 + signal.SIGTERM
