"""What an executor process may do once it has dropped: asked of the kernel, from inside."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rcon_plugins import RunningManager, Work, hookimpl
from rcon_plugins.errors import ConfinementError, IdentityRefused, SettingsError
from rcon_plugins.kernel import landlock
from rcon_plugins.kernel.capability import (
    CAP_SETGID,
    CAP_SETPCAP,
    CAP_SETUID,
    Capabilities,
    Identity,
    drop,
    read_state,
    set_capabilities,
    set_keep_capabilities,
    set_uids,
)
from rcon_plugins.kernel.process import kill
from rcon_plugins.settings.file import from_mapping
from tests.children import in_child
from tests.directories import let_others_read
from tests.kernel.executors import ways_back
from tests.kernel.executors.service import ask, begin, end, managing, soon, status
from tests.kernel.seccomp import births
from tests.processes import alive

TENANT, OTHER = 61001, 61002
GROUPS = [61011, 61012]
POLICY: dict[str, Any] = {"user": TENANT, "group": TENANT, "groups": GROUPS, "pids": 32}
NOTHING = {"CapInh": 0, "CapPrm": 0, "CapEff": 0, "CapBnd": 0, "CapAmb": 0}


@pytest.fixture
def setuid_root(tmp_path: Path) -> Iterator[str]:
    """A program that is setuid root, where everybody may execute it."""
    program = Path(shutil.copy(shutil.which("id") or "id", tmp_path / "id"))
    program.chmod(0o4755)
    let_others_read(tmp_path)
    yield str(program)
    program.unlink()


def of_the_server(manager: RunningManager) -> dict[str, int]:
    assert manager.fork_server_pid is not None
    return {"worker": os.getpid(), "fork server": manager.fork_server_pid}


@pytest.mark.smoke
def test_the_executor_has_the_user_of_the_policy_and_no_capabilities() -> None:
    with managing(POLICY) as manager:
        state, outcome = ask(manager, "state")
    assert outcome.ending == "ok"
    assert state == {
        "uids": [TENANT] * 4,
        "gids": [TENANT] * 4,
        "groups": GROUPS,
        "no_new_privs": True,
        **NOTHING,
    }


def test_the_server_keeps_its_identity() -> None:
    before = status(Path("/proc/self/status"))
    with managing(POLICY) as manager:
        ask(manager, "state")
        server = status(Path(f"/proc/{manager.fork_server_pid}/status"))
        assert status(Path("/proc/self/status")) == before
    assert server == before


def test_every_attempt_to_regain_rights_fails(setuid_root: str) -> None:
    with managing(POLICY) as manager:
        found, _ = ask(manager, "ways_back", OTHER, setuid_root, of_the_server(manager))
    assert len(found) > 60
    assert {name: said for name, said in found.items() if said not in ("EPERM", "EACCES", "EROFS")} == {}


def test_every_attempt_to_regain_rights_fails_without_no_new_privs(setuid_root: str) -> None:
    """But for the setuid-root program, which becomes root, and holds nothing: the bounding set is empty."""
    with managing({**POLICY, "no_new_privs": False}) as manager:
        found, _ = ask(manager, "ways_back", OTHER, setuid_root, of_the_server(manager))
    assert found.pop("a setuid-root program") == "WORKED"
    assert {name: said for name, said in found.items() if said not in ("EPERM", "EACCES", "EROFS")} == {}


def test_with_the_servers_user_it_can_neither_loosen_its_limits_nor_reach_the_server() -> None:
    with managing({"pids": 32, "isolation": "process"}) as manager:
        state, _ = ask(manager, "state")
        found, _ = ask(manager, "ways_back_of_root", of_the_server(manager))
        signals, _ = ask(manager, "signals", of_the_server(manager))
    assert state["uids"] == [os.getuid()] * 4
    assert {name: state[name] for name in NOTHING} == NOTHING
    assert len(found) > 20
    assert {name: said for name, said in found.items() if said not in ("EPERM", "EACCES", "EROFS")} == {}
    # Signals between processes of one user are Landlock's business since its sixth version (Linux 6.12).
    assert set(signals.values()) == ({"EPERM"} if landlock.abi() >= 6 else {"WORKED"})


@pytest.mark.parametrize("policy", [POLICY, {"pids": 32, "isolation": "process"}], ids=["user", "root"])
def test_a_user_of_its_own_takes_away_what_root_may_do_without_capabilities(policy: dict[str, Any]) -> None:
    """docs/security.md says what work may do that has root's user. No capability is needed for any of it."""
    folder = Path(f"/run/rcon-test-{os.getpid()}")
    folder.mkdir()
    try:
        with managing(policy) as manager:
            found, _ = ask(manager, "rights_of_root", of_the_server(manager), str(folder))
    finally:
        folder.rmdir()
    assert len(found) == 11
    if policy is POLICY:
        assert set(found.values()) <= {"EPERM", "EACCES", "EROFS"}, found
        return
    refused = {name for name, said in found.items() if said != "WORKED"}
    # The scheduler asks for all capabilities of the other process: see cap_safe_nice() of the kernel.
    of_the_scheduler = {name for name in found if name.startswith(("CPUs", "priority"))}
    assert of_the_scheduler <= refused
    # A container may have mounted these read-only.
    assert refused - of_the_scheduler <= {"a setting of the machine", "a file in /dev"}, found


@pytest.mark.each_layout
@pytest.mark.parametrize(
    "policy", [POLICY, {"pids": 32, "isolation": "process"}], ids=["user", "server's user"]
)
def test_there_is_no_way_to_other_limits(policy: dict[str, Any]) -> None:
    """Each attempt is refused, or the kernel does not have the call."""
    with managing(policy) as manager:
        found, _ = ask(manager, "ways_out", births.root())
    assert len(found) > 80
    refused = ("EPERM", "EACCES", "EROFS", "EINVAL", "ENOSYS")
    assert {name: said for name, said in found.items() if said not in refused} == {}


def test_the_executor_has_no_descriptor_of_the_server() -> None:
    with managing(POLICY) as manager:
        open_ones, _ = ask(manager, "open_descriptors")
    assert open_ones.pop("0") == "/dev/null"
    own = open_ones.pop("1")
    assert open_ones.pop("2") == own
    # The logs of this run of the tests, if there are any, are the same pipe.
    open_ones = {number: what for number, what in open_ones.items() if what != own}
    connected = [number for number, what in open_ones.items() if what == "connected"]
    assert len(connected) == 1  # the channel that the work itself came by
    del open_ones[connected[0]]
    assert not [
        what for what in open_ones.values() if what == "LISTENS" or "cgroup" in what or "rcon" in what
    ]
    assert not [what for what in open_ones.values() if what.startswith(("pipe:", "anon_inode:"))]


def test_the_executor_leads_a_session_and_dies_with_its_parent() -> None:
    with managing(POLICY) as manager:
        (pid, session), _ = ask(manager, "session")
        assert session == pid
        admission = begin(manager, "sleep", 60)
        assert manager.fork_server_pid is not None
        os.kill(manager.fork_server_pid, signal.SIGKILL)
        _, outcome = end(admission)
        assert outcome.ending == "killed"
        assert soon(lambda: not alive(pid))


def test_the_executor_keeps_only_the_capabilities_of_the_policy(setuid_root: str) -> None:
    with managing({**POLICY, "capabilities": ["net_bind_service"]}) as manager:
        state, _ = ask(manager, "state")
        found, _ = ask(manager, "ways_back", OTHER, setuid_root, of_the_server(manager))
    only = 1 << 10
    assert (state["CapPrm"], state["CapEff"], state["CapBnd"]) == (only, only, only)
    assert {name: said for name, said in found.items() if said not in ("EPERM", "EACCES", "EROFS")} == {}


def test_umask_and_rlimits(tmp_path: Path) -> None:
    let_others_read(tmp_path)
    tmp_path.chmod(0o777)
    with managing({**POLICY, "umask": "027", "rlimits": {"nofile": 640, "core": 0}}) as manager:
        assert ask(manager, "create", str(tmp_path / "new"))[0] == f"{TENANT}:{TENANT} 640"
        assert ask(manager, "rlimits", "nofile", "core")[0] == [[640, 640], [0, 0]]


@pytest.mark.parametrize("policy", [POLICY, {"isolation": "process"}], ids=["as the tenant", "as the server"])
def test_fewer_files_than_the_server_has_open(policy: dict[str, Any]) -> None:
    """What confines work opens files itself; that is not the work's to pay for."""
    with contextlib.ExitStack() as of_the_server:
        for _ in range(100):
            of_the_server.callback(os.close, os.open("/", os.O_PATH))
        with managing({**policy, "rlimits": {"nofile": 64}}) as manager:
            assert ask(manager, "rlimits", "nofile")[0] == [[64, 64]]
            assert ask(manager, "create", "/tmp/none")[0] == os.strerror(errno.EMFILE)


def test_two_owners_under_one_policy_are_two_processes(tmp_path: Path) -> None:
    for number, name in ((TENANT, "a"), (OTHER, "b")):
        (tmp_path / name).mkdir()
        os.chown(tmp_path / name, number, number)
    policy = {"user": f"owner:{tmp_path}/{{host}}", "memory": "64M"}
    with managing(policy) as manager:
        seen: dict[str, set[tuple[int, ...]]] = {}
        for _ in range(3):
            for host in ("a", "b"):
                state, _ = ask(manager, "state", host=host)
                pid, _ = ask(manager, "pid", host=host)
                seen.setdefault(host, set()).add((pid, *state["uids"], *state["gids"], *state["groups"]))
        assert [len(some) for some in seen.values()] == [1, 1]
        (a,), (b,) = seen["a"], seen["b"]
        assert (a[1:], b[1:]) == ((TENANT,) * 8, (OTHER,) * 8)
        assert a[0] != b[0]


@pytest.mark.parametrize(
    ("owner", "words"),
    [(0, "root"), (99, "min_uid"), (None, "there is no")],
    ids=["root", "low", "missing"],
)
def test_an_owner_that_is_not_allowed_is_refused_and_nothing_runs(
    tmp_path: Path, owner: int | None, words: str
) -> None:
    if owner is not None:
        (tmp_path / "a").mkdir()
        os.chown(tmp_path / "a", owner, owner)
    with managing({"user": f"owner:{tmp_path}/{{host}}"}) as manager:
        with pytest.raises(IdentityRefused, match=words):
            manager.admit(Work("call", "x", {"host": "a"}))
        assert not any("work" in name for name in manager_cgroups(manager))


def test_the_owner_must_be_the_user(tmp_path: Path) -> None:
    script = tmp_path / "script"
    script.touch()
    os.chown(script, OTHER, OTHER)
    policy = {**POLICY, "owner_must_be": f"{tmp_path}/{{path}}"}
    with managing(policy) as manager:
        with pytest.raises(IdentityRefused):
            manager.admit(Work("call", "x", {"path": "/script"}))
        os.chown(script, TENANT, TENANT)
        assert ask(manager, "state", path="/script")[0]["uids"] == [TENANT] * 4


def test_a_plugin_that_drops_comes_before_and_may_refuse() -> None:
    class Refuses:
        @hookimpl
        def rcon_drop(self, target: str, identity: object) -> None:
            raise PermissionError(f"{target} {identity} {os.getuid()}")

    with (
        pytest.raises(ConfinementError, match=r"process .*61001.* 0"),
        managing(POLICY, plugins=[Refuses()]),
    ):
        pass


def test_inline_refuses_an_identity() -> None:
    with pytest.raises(SettingsError, match="user"):
        from_mapping({"policy": {"p": {"isolation": "inline", "user": TENANT, "group": TENANT}}})


def manager_cgroups(manager: RunningManager) -> list[str]:
    """The cgroups that hold work now."""
    instance = manager.instance
    assert instance is not None
    return [f"work/{name}" for name in instance.work.children()]


def test_children_that_work_makes_for_the_fork_server_are_taken_away() -> None:
    """clone(2) with CLONE_PARENT: they are the fork server's, which has never heard of them."""
    with managing({**POLICY, "pids": 16}) as manager:
        assert manager.fork_server_pid is not None
        for _ in range(3):
            made, outcome = ask(manager, "siblings", 8)
            assert outcome.ending == "ok"
            assert len(made) == 8
            assert soon(lambda made=made: not any(Path(f"/proc/{pid}").exists() for pid in made))


def test_the_session_keyring_of_the_server_is_out_of_reach() -> None:
    def program() -> tuple[str, str]:
        keyring = ways_back.join_keyring()
        key = ways_back.add_key("secret", "hunter2", keyring)
        with managing(POLICY) as manager:
            mine, _ = ask(manager, "read_key", key)
        with managing({"isolation": "process", "pids": 16}) as manager:
            others, _ = ask(manager, "read_key", key)
        return mine, others

    assert in_child(program) == ("EACCES", "EACCES")


def test_killing_an_executor_of_root_leaves_the_fork_server_what_it_holds() -> None:
    """Whose effective uid is root's for the moment of the kill."""

    def program() -> tuple[int, int, int]:
        wanted = Capabilities.of(CAP_SETUID, CAP_SETGID, CAP_SETPCAP)
        set_capabilities(wanted, wanted, Capabilities.none())
        set_keep_capabilities(True)
        set_uids(61099, 61099, 61099)
        set_keep_capabilities(False)
        set_capabilities(wanted, Capabilities.none(), Capabilities.none())
        pid = os.fork()
        if pid == 0:
            drop(Identity(0, 0), Capabilities.none())
            time.sleep(60)
            os._exit(0)
        while status(Path(f"/proc/{pid}/status"))["uids"] != [0, 0, 0, 0]:
            time.sleep(0.01)
        pidfd = os.pidfd_open(pid)
        kill(pidfd, pid)
        _, ended = os.waitpid(pid, 0)
        state = read_state()
        return os.WTERMSIG(ended), state.permitted.mask, state.effective.mask

    assert in_child(program) == (signal.SIGKILL, 0b111000000, 0)
