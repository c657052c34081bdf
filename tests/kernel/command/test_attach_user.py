"""rcon attach and rcon run as an ordinary user, in a cgroup delegated to that user."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from rcon_plugins.kernel.cgroup import Cgroup, Hierarchy, Resources
from rcon_plugins.tree import attach
from tests.children import in_child
from tests.kernel.command.harness import rcon, until

pytestmark = pytest.mark.each_layout

#: A user that owns nothing else: only this test gives it cgroups, even if other tests run on the same machine.
OTHER_UID = 1_000_000 + os.getpid()
#: Write no report: that user cannot write to the directory of the tests.
QUIET = ("--json", "/dev/null")
V1 = pytest.mark.layout("v1", "hybrid")


def become(uid: int) -> None:
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Provide a runtime directory, in which a user without a login can record the previous cgroups of processes."""
    with tempfile.TemporaryDirectory(prefix="rcon-runtime-", dir="/tmp") as folder:
        os.chown(folder, OTHER_UID, OTHER_UID)
        monkeypatch.setenv("XDG_RUNTIME_DIR", folder)
        yield


@contextlib.contextmanager
def giving(name: str, hierarchy: Hierarchy | None = None) -> Iterator[Cgroup]:
    """Make a cgroup that belongs to that user, in all hierarchies or in some."""
    cgroup = (hierarchy or Hierarchy.discover()).cgroup(f"/rcon-test-{os.getpid()}-{name}").create()
    try:
        cgroup.delegate(OTHER_UID, OTHER_UID)
        yield cgroup
    finally:
        cgroup.kill()
        cgroup.delete()


@pytest.fixture
def given() -> Iterator[Cgroup]:
    with giving("user") as cgroup:
        yield cgroup


def within(cgroup: Cgroup, uid: int) -> Callable[[], None]:
    """Return a function that moves the calling process into the cgroup and changes to this user."""

    def enter() -> None:
        cgroup.attach(os.getpid())
        become(uid)

    return enter


def outside() -> None:
    """Change the calling process to that user, in its present cgroup."""
    become(OTHER_UID)


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


def take_and_let_go(base: Cgroup, enter: Callable[[], None], *options: str) -> None:
    """Attach a process of that user to a group below ``base`` with the command line, and release it."""
    name = f"mine-{os.getpid()}"
    with sleeping(enter) as pid:
        before = where(pid)
        done = rcon("attach", *options, "--pids", "9", "--group", name, str(pid), before=enter)
        assert (done.status, done.out) == (0, f"{name}: 1 process\n")
        said = f"--release will leave {pid} in a cgroup of this user: only root can move them back"
        assert said in done.err if enter is outside else done.err == ""
        assert f"{base.path}/rcon-" in where(pid)
        assert f"/attached/{name}" in where(pid)
        done = rcon("attach", "--release", name, before=enter)
        assert (done.status, done.err) == (0, "")
        # Only root may move a process back to a cgroup that does not belong to this user.
        assert "rcon-" not in where(pid).replace(base.path, "")
        assert enter is outside or where(pid) == before
    until(lambda: not instances(base), "nothing is left")


@pytest.mark.smoke
@V1
@pytest.mark.usefixtures("runtime")
def test_a_user_attaches_and_releases_own_processes(given: Cgroup) -> None:
    enter = within(given, OTHER_UID)

    def take(pid: int) -> list[int]:
        enter()
        request = attach.AttachRequest((pid,), "mine", Resources(pids_max=9))
        return attach.attach(request, Hierarchy.discover(), given.path)

    with sleeping(enter) as pid:
        before = where(pid)
        assert in_child(take, pid) == [pid]
        assert f"{given.path}/rcon-" in where(pid)
        assert "/attached/mine" in where(pid)
        done = rcon("attach", "--release", "mine", before=enter)
        assert (done.status, done.err) == (0, "")
        assert where(pid) == before
        until(lambda: not instances(given), "nothing is left")


@V1
@pytest.mark.usefixtures("runtime")
@pytest.mark.parametrize("place", ["inside", "outside"])
def test_on_v1_a_delegated_cgroup_is_found_from_any_cgroup(given: Cgroup, place: str) -> None:
    take_and_let_go(given, within(given, OTHER_UID) if place == "inside" else outside)


@V1
def test_without_a_runtime_directory_attach_is_refused(
    given: Cgroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a login there is no /run/user/UID. This is the only thing missing."""
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    said = f"/run/user/{OTHER_UID}/rcon"
    with sleeping(outside) as pid:
        done = rcon("attach", "--cgroup", given.path, "--pids", "9", str(pid), before=outside)
        assert (done.status, done.out, done.err.count("\n")) == (125, "", 1)
        assert said in done.err
        assert "set XDG_RUNTIME_DIR to a directory of this user" in done.err
        assert given.path not in where(pid)
    until(lambda: not instances(given), "nothing is left")
    done = rcon("doctor", "--cgroup", given.path, before=outside)
    assert done.status == 0, done.out
    assert f"  --  attach: rcon attach: {said}: " in done.out


@V1
@pytest.mark.usefixtures("runtime")
def test_on_hybrid_a_cgroup_delegated_only_on_v1_is_found() -> None:
    hierarchy = Hierarchy.discover()
    alone = Hierarchy.of([mount for mount in hierarchy.mounts if mount.version == 1])
    with giving("alone", alone) as given:
        take_and_let_go(given, outside)
        done = rcon("run", *QUIET, "--pids", "9", "--", "cat", "/proc/self/cgroup", before=outside)
        assert (done.status, done.err) == (0, "")
        assert f"{given.path}/rcon-" in done.out
        assert instances(given) == []


@V1
@pytest.mark.usefixtures("runtime")
def test_one_of_several_delegated_cgroups_is_named(given: Cgroup) -> None:
    with giving("other") as other, sleeping(outside) as pid:
        for words in (("attach", "--pids", "9", str(pid)), ("run", *QUIET, "--pids", "9", "--", "true")):
            done = rcon(*words, before=outside)
            assert (done.status, done.out) == (125, "")
            assert f"2 cgroups belong to this user: {', '.join(sorted((given.path, other.path)))}" in done.err
            assert "--cgroup" in done.err
            assert len(done.err.splitlines()) == 1
            assert instances(given) + instances(other) == []
        for chosen in (given, other):
            take_and_let_go(chosen, outside, "--cgroup", chosen.path)
            done = rcon(
                "run", *QUIET, "--cgroup", chosen.path, "--", "cat", "/proc/self/cgroup", before=outside
            )
            assert (done.status, done.err) == (0, "")
            assert f"{chosen.path}/rcon-" in done.out


@V1
@pytest.mark.usefixtures("runtime")
def test_the_environment_names_the_cgroup(given: Cgroup, monkeypatch: pytest.MonkeyPatch) -> None:
    with giving("other") as other:
        monkeypatch.setenv("RCON_CGROUP", other.path)
        take_and_let_go(other, outside)
        for words in ([], ["--group", f"named-{os.getpid()}"]):  # without and with another option
            done = rcon("run", *QUIET, *words, "--", "cat", "/proc/self/cgroup", before=outside)
            assert (done.status, done.err) == (0, "")
            assert f"{other.path}/rcon-" in done.out
        done = rcon("run", *QUIET, "--cgroup", given.path, "--", "cat", "/proc/self/cgroup", before=outside)
        assert f"{given.path}/rcon-" in done.out


def test_the_environment_is_ignored_inside_a_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """The variable applies only outside of a group, so rcon run inside rcon run still works."""
    base = f"/rcon-test-{os.getpid()}-named"
    monkeypatch.setenv("RCON_CGROUP", base)
    inner = "import sys; from rcon_plugins.cli.rcon import run_main; sys.exit(run_main(sys.argv[1:]))"
    words = ["--pids", "9", "--", "cat", "/proc/self/cgroup"]
    done = rcon("run", "--pids", "20", "--", sys.executable, "-c", inner, "run", *words)
    assert (done.status, done.err) == (0, "")
    _, *deeper = [part for part in done.out.split("/rcon-")[1:] if "/work/" in part]
    assert deeper
    Hierarchy.discover().cgroup(base).delete()


@V1
def test_without_a_delegated_cgroup_the_remedy_is_printed() -> None:
    with sleeping(outside) as pid:
        before = where(pid)
        done = rcon("attach", "--pids", "9", str(pid), before=outside)
        assert (done.status, done.out) == (125, "")
        assert done.err.endswith(" (rcon doctor shows how to get one)\n")
        assert len(done.err.splitlines()) == 1
        assert "run the server as root, or run once as root:\n" in rcon("doctor", before=outside).out
        assert where(pid) == before


@pytest.mark.layout("v2")
@pytest.mark.usefixtures("runtime")
def test_on_v2_the_cgroup_around_the_shell_is_found(given: Cgroup) -> None:
    """As in the printed remedy, the shell is in a cgroup of its own, below the delegated one."""
    server = given.child("server").create()
    server.delegate(OTHER_UID, OTHER_UID)
    take_and_let_go(given, within(server, OTHER_UID))


@pytest.mark.parametrize("uid", [0, OTHER_UID + 1], ids=["root", "another"])
def test_processes_of_other_users_are_not_attached(given: Cgroup, uid: int) -> None:
    with sleeping(within(given, uid)) as pid:
        before = where(pid)
        done = rcon("attach", "--pids", "9", str(pid), before=within(given, OTHER_UID))
        assert (done.status, done.out) == (2, "")
        assert f"process {pid} belongs to another user (run rcon as root; " in done.err
        assert len(done.err.splitlines()) == 1
        assert where(pid) == before
        assert instances(given) == []
