"""rcon attach as an ordinary user, in a cgroup that was given to it."""

from __future__ import annotations

import contextlib
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from rcon_plugins import taken
from rcon_plugins.kernel.cgroup import Cgroup, Hierarchy, Resources
from tests.children import in_child
from tests.kernel.command.harness import rcon, until

NOBODY = 65534


def become(uid: int) -> None:
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Where nobody, who has not logged in, can keep where processes came from."""
    with tempfile.TemporaryDirectory(prefix="rcon-runtime-", dir="/tmp") as folder:
        os.chown(folder, NOBODY, NOBODY)
        monkeypatch.setenv("XDG_RUNTIME_DIR", folder)
        yield


@pytest.fixture
def given() -> Iterator[Cgroup]:
    """A cgroup of nobody's."""
    cgroup = Hierarchy.discover().cgroup(f"/rcon-test-{os.getpid()}-user").create()
    try:
        cgroup.delegate(NOBODY, NOBODY)
        yield cgroup
    finally:
        cgroup.kill()
        cgroup.delete()


def within(cgroup: Cgroup, uid: int) -> Callable[[], None]:
    """What a process does to be in there as this user."""

    def enter() -> None:
        cgroup.attach(os.getpid())
        become(uid)

    return enter


@contextlib.contextmanager
def sleeping(enter: Callable[[], None]) -> Iterator[int]:
    process = subprocess.Popen(["sleep", "1000"], preexec_fn=enter)
    try:
        yield process.pid
    finally:
        process.kill()
        process.wait()


def where(pid: int) -> str:
    return Path("/proc", str(pid), "cgroup").read_text()


def instances(cgroup: Cgroup) -> list[str]:
    return [name for name in cgroup.children() if name.startswith("rcon-")]


@pytest.mark.layout("v1", "hybrid")
@pytest.mark.usefixtures("runtime")
def test_ones_own_processes_are_taken_and_let_go(given: Cgroup) -> None:
    """With the base named: on v1 none is found by what is around the shell."""
    enter = within(given, NOBODY)

    def take(pid: int) -> list[int]:
        enter()
        wish = taken.Wish((pid,), "mine", lambda cgroup: cgroup.configure(Resources(pids_max=9)))
        return taken.take(wish, Hierarchy.discover(), given.path)

    with sleeping(enter) as pid:
        before = where(pid)
        assert in_child(take, pid) == [pid]
        assert f"{given.path}/rcon-" in where(pid)
        assert "/taken/mine" in where(pid)
        done = rcon("attach", "--release", "mine", before=enter)
        assert (done.status, done.err) == (0, "")
        assert where(pid) == before
        until(lambda: not instances(given), "nothing is left")


@pytest.mark.layout("v1", "hybrid")
def test_where_no_base_is_found_the_remedy_is_said(given: Cgroup) -> None:
    enter = within(given, NOBODY)
    with sleeping(enter) as pid:
        before = where(pid)
        done = rcon("attach", "--pids", "9", str(pid), before=enter)
        assert (done.status, done.out) == (125, "")
        assert "run the server as root, or as root once: " in done.err
        assert len(done.err.splitlines()) == 1
        assert where(pid) == before
        assert instances(given) == []


@pytest.mark.parametrize("uid", [0, 65533])
def test_those_of_others_are_not(given: Cgroup, uid: int) -> None:
    with sleeping(within(given, uid)) as pid:
        before = where(pid)
        done = rcon("attach", "--pids", "9", str(pid), before=within(given, NOBODY))
        assert (done.status, done.out) == (2, "")
        assert f"{pid} is another user's (run rcon as root)" in done.err
        assert len(done.err.splitlines()) == 1
        assert where(pid) == before
        assert instances(given) == []
