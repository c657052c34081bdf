"""rcon gc: it removes what dead owners left, in any place, and nothing that belongs to living owners."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from rcon_plugins.cli.rcon import run_main
from rcon_plugins.groups.find import find_groups
from rcon_plugins.kernel import proc
from rcon_plugins.kernel.cgroup import Cgroup, Hierarchy
from rcon_plugins.tree.instance import Instance
from tests import children
from tests.kernel.cgroup.helpers import Running, eventually, sleep_forever
from tests.processes import alive

pytestmark = pytest.mark.each_layout

NOBODY = 65534
CLONE_NEWNS = 0x00020000


def leave(base: str, place: str = "work") -> tuple[str, int]:
    """Make a tree with a process in it. Return its path and the pid. Call it in a child, which then dies."""
    instance = Instance.create(Hierarchy.discover(), base)
    cgroup = instance.host if place == "host" else instance.executor_cgroup("g", "main").create()
    return instance.path, Running(cgroup, sleep_forever).pid


def there(path: str) -> bool:
    return any(Path(directory).exists() for directory in Hierarchy.discover().cgroup(path).directories)


def gc(group: Cgroup, capsys: pytest.CaptureFixture[str], *options: str) -> tuple[int, str]:
    status = run_main(["gc", "--below", group.path, *options])
    out, err = capsys.readouterr()
    assert err == ""
    return status, out


@pytest.mark.smoke
def test_dry_run_prints_and_changes_nothing(group: Cgroup, capsys: pytest.CaptureFixture[str]) -> None:
    path, pid = children.in_child(leave, f"{group.path}/some/where")
    owner = path.rpartition("/")[2].split("-")[1]
    status, out = gc(group, capsys, "--dry-run")
    assert (status, out) == (0, f"{path}: its owner {owner} is dead: would kill process {pid}, remove it\n")
    assert alive(pid)
    assert there(path)

    status, out = gc(group, capsys)
    assert (status, out) == (0, f"{path}: removed\n")
    eventually(lambda: not alive(pid))
    assert not there(path)
    assert gc(group, capsys) == (0, "")


@pytest.mark.once
def test_names_that_others_chose_do_not_reach_the_terminal(
    group: Cgroup, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whoever has a cgroup of its own names the cgroups in it."""
    made = os.fsdecode(b"\x1b]0;\x07\r\xff")
    for directory in group.directories:
        (Path(directory) / made / "rcon-1-1" / "work").mkdir(parents=True)
    for options in (("--dry-run",), ()):
        status, out = gc(group, capsys, *options)
        assert status == 0
        assert out.startswith(f"{group.path}/\\x1b]0;\\x07\\r\\udcff/rcon-1-1: ")
        assert out.removesuffix("\n").isprintable()


def test_the_living_are_left_alone(group: Cgroup, capsys: pytest.CaptureFixture[str]) -> None:
    instance = Instance.create(Hierarchy.discover(), group.path)
    child = Running(instance.executor_cgroup("g", "main").create(), sleep_forever)
    try:
        path, _ = children.in_child(leave, f"{group.path}/other")
        assert gc(group, capsys) == (0, f"{path}: removed\n")
        assert alive(child.pid)
        assert there(instance.path)
    finally:
        child.end()
        assert instance.close()


def test_a_servers_own_processes_are_left_alone(group: Cgroup, capsys: pytest.CaptureFixture[str]) -> None:
    path, pid = children.in_child(leave, group.path, "host")
    status, out = gc(group, capsys, "--dry-run")
    assert status == 1
    assert f"keep it for its server's own process {pid}" in out
    status, out = gc(group, capsys)
    assert status == 1
    assert f"processes [{pid}] of its server still run" in out
    assert alive(pid)
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: not alive(pid))
    assert gc(group, capsys) == (0, f"{path}: removed\n")


def test_trees_inside_the_tree_of_a_dead_server_are_removed_with_it(
    group: Cgroup, capsys: pytest.CaptureFixture[str]
) -> None:
    def outer() -> tuple[str, str]:
        instance = Instance.create(Hierarchy.discover(), group.path)
        instance.executor_cgroup("g", "main").create()
        inner, _ = children.in_child(leave, instance.policy_cgroup("g").path)
        return instance.path, inner

    path, inner = children.in_child(outer)
    assert inner.startswith(f"{path}/work/g/")
    assert gc(group, capsys) == (0, f"{path}: removed\n")
    assert not there(path)


def test_a_dead_tree_inside_a_living_tree_is_removed(
    group: Cgroup, capsys: pytest.CaptureFixture[str]
) -> None:
    instance = Instance.create(Hierarchy.discover(), group.path)
    try:
        instance.executor_cgroup("g", "main").create()
        inner, _ = children.in_child(leave, instance.policy_cgroup("g").path)
        assert gc(group, capsys) == (0, f"{inner}: removed\n")
        assert there(instance.executor_cgroup("g", "main").path)
    finally:
        assert instance.close()


def nest(base: str, levels: int) -> str:
    """Make a tree with cgroups nested deeper than the longest path, as a command can. Call it in a child."""
    instance = Instance.create(Hierarchy.discover(), base)
    leaf = instance.executor_cgroup("g", "main").create()
    for directory in leaf.directories:
        at = os.open(directory, os.O_PATH | os.O_DIRECTORY)
        for _ in range(levels):
            os.mkdir("a" * 240, dir_fd=at)
            below = os.open("a" * 240, os.O_PATH | os.O_DIRECTORY, dir_fd=at)
            os.close(at)
            at = below
    return instance.path


def test_cgroups_deeper_than_the_longest_path(group: Cgroup, capsys: pytest.CaptureFixture[str]) -> None:
    path = children.in_child(nest, group.path, 25)
    status, out = gc(group, capsys, "--dry-run")
    assert status == 0
    assert out.startswith(f"{path}: its owner ")
    assert gc(group, capsys) == (0, f"{path}: removed\n")
    assert not there(path)


@pytest.mark.once
def test_as_json(group: Cgroup, capsys: pytest.CaptureFixture[str]) -> None:
    path, pid = children.in_child(leave, group.path)
    found: dict[str, Any] = json.loads(gc(group, capsys, "--json", "--dry-run")[1])
    assert (found["good"], found["dry_run"]) == (True, True)
    (tree,) = found["trees"]
    assert (tree["path"], tree["work"], tree["attached"], tree["host"]) == (path, [pid], [], [])
    found = json.loads(gc(group, capsys, "--json")[1])
    assert found == {
        "good": True,
        "dry_run": False,
        "trees": [{"path": path, "removed": True, "state": "removed", "message": "removed"}],
    }


def test_trees_of_other_users_stay(group: Cgroup, capsys: pytest.CaptureFixture[str]) -> None:
    path, pid = children.in_child(leave, group.path)

    def as_nobody() -> tuple[int, str]:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
        return gc(group, capsys)

    status, out = children.in_child(as_nobody)
    assert status == 1
    assert out.startswith(f"{path}: kept: ")
    assert os.strerror(errno.EACCES) in out or os.strerror(errno.EPERM) in out
    assert alive(pid)
    assert gc(group, capsys)[0] == 0


def test_attached_processes_are_moved_back(group: Cgroup, capsys: pytest.CaptureFixture[str]) -> None:
    """`rcon attach` leaves a watcher running. This test kills it.

    In a base of its own: in that of root, any server or command that starts moves them back.
    """
    before, base = group.child("before").create(), f"{group.path}/base"
    child = Running(before, sleep_forever)
    name = f"held-{os.getpid()}"
    words = ["attach", str(child.pid), "--pids", "9", "--group", name, "--cgroup", base]
    try:
        assert children.in_child(run_main, words) == 0
        held = next(found for found in find_groups().groups if found.name == name)
        assert held.pids() == [child.pid]
        path = held.cgroup.path.partition("/attached/")[0]
        os.kill(held.owner.pid, signal.SIGKILL)
        eventually(lambda: not alive(held.owner.pid))

        capsys.readouterr()
        said = f"{path}: its owner {held.owner.pid} is dead: would move process {child.pid} back, remove it\n"
        assert gc(group, capsys, "--dry-run") == (0, said)
        assert gc(group, capsys) == (0, f"{path}: removed\n")
        assert not there(path)
        assert alive(child.pid)
        assert child.pid in before.processes()
    finally:
        child.end()


def leave_attached_by_another_user(base: str) -> tuple[str, int, int]:
    """Make a tree with a process that looks as if the user nobody had attached it. Call it in a child."""
    instance = Instance.create(Hierarchy.discover(), base)
    work = Running(instance.executor_cgroup("g", "main").create(), sleep_forever).pid
    cgroup = instance.attached("held").create()
    pid = Running(cgroup, sleep_forever).pid
    instance.hierarchy.cgroup(f"{instance.path}/attached").delegate(NOBODY, NOBODY)
    return instance.path, work, pid


@pytest.mark.parametrize("form", [[], ["--json"]])
def test_dry_run_and_gc_agree_on_what_another_user_attached(
    group: Cgroup, capsys: pytest.CaptureFixture[str], form: list[str]
) -> None:
    path, work, pid = children.in_child(leave_attached_by_another_user, group.path)
    kept = f"kept: attached/ belongs to uid {NOBODY}, and only that user knows"
    status, out = gc(group, capsys, "--dry-run", *form)
    assert status == 1
    assert f"is dead; would kill process {work}; would be {kept}" in out
    assert "back" not in out
    status, out = gc(group, capsys, *form)
    assert status == 1
    assert kept in out
    assert not alive(work)
    assert alive(pid)
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: not alive(pid))
    assert gc(group, capsys) == (0, f"{path}: removed\n")


def lives_for_nobody_who_sees_only_own(pid: int, started: int) -> tuple[bool, bool, bool]:
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.unshare(CLONE_NEWNS) == 0
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    subprocess.run(["mount", "-t", "proc", "-o", "hidepid=2", "proc", "/proc"], check=True)
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)
    own = proc.pid_namespace()
    return (
        Path(f"/proc/{pid}").exists(),
        proc.is_alive(pid, started, own) is True,
        proc.is_alive(2**22 - 1, started, own) is True,
    )


def test_an_owner_that_cannot_be_seen_lives() -> None:
    started = proc.start_time(os.getpid())
    assert started is not None
    seen, lives_on, other = children.in_child(lives_for_nobody_who_sees_only_own, os.getpid(), started)
    assert (seen, lives_on, other) == (False, True, False)


@pytest.mark.once
def test_an_invalid_path_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_main(["gc", "--below", "rcon/../.."]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("rcon: --below: ")
    assert err.count("\n") == 1
