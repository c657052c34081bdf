"""Memory that would outlive its request: /dev/shm, System V, message queues, /tmp in memory. And read-only cgroups."""

from __future__ import annotations

import errno
import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import rcon_plugins.builtin.landlock
from rcon_plugins import Plan, Server
from rcon_plugins.cli.rcon import run_main
from rcon_plugins.errors import ConfinementError, KernelError, SettingsError
from rcon_plugins.kernel import landlock, namespaces
from rcon_plugins.kernel.capability import (
    CAP_SETGID,
    CAP_SETPCAP,
    CAP_SETUID,
    CAP_SYS_ADMIN,
    Capabilities,
    read_state,
    set_capabilities,
)
from rcon_plugins.kernel.syscalls import CLONE_NEWNS, MS_REC, mount, unshare
from rcon_plugins.settings.file import from_mapping
from tests.children import in_child
from tests.kernel.command.harness import rcon
from tests.kernel.executors import ways_back
from tests.kernel.executors.service import ask, begin, end, managing
from tests.system_calls import refuse_system_call

#: No other test has this user, whose memory is counted, even if other tests run on the same machine.
TENANT = 1_000_000 + os.getpid()
POLICY: dict[str, Any] = {"user": TENANT, "group": TENANT, "each": {"memory": "64M"}}
ROOT: dict[str, Any] = {"each": {"memory": "64M"}}
SHM = Path("/dev/shm")
MS_PRIVATE, MS_SHARED = 1 << 18, 1 << 20
MOUNT, MOUNT_SETATTR = 165, 442


@pytest.fixture
def key() -> int:
    return 0x72000000 | os.getpid()


@pytest.fixture
def name() -> Iterator[str]:
    """The name of a file in /dev/shm that a test may leave."""
    yield (name := f"rcon-test-{os.getpid()}")
    (SHM / name).unlink(missing_ok=True)


def without(*capabilities: int) -> None:
    """Give up capabilities, as a server of systemd's `User=` has none of them."""
    held = read_state().permitted - Capabilities.of(*capabilities)
    set_capabilities(held, held, Capabilities.none())


def namespace(kind: str, pid: int | None = None) -> str:
    return os.readlink(f"/proc/{pid or 'self'}/ns/{kind}")  # noqa: PTH115 - no path


def verdict(**policy: Any) -> Plan:
    return Plan.make(
        from_mapping({"policy": {"p": policy}, "route": [{"policy": "p"}]}), Server(threads=False)
    )


@pytest.mark.smoke
@pytest.mark.each_layout
@pytest.mark.parametrize("policy", [POLICY, ROOT], ids=["as a tenant", "as root"])
def test_shared_memory_is_the_executors_own_bounded_and_gone_at_its_end(
    policy: dict[str, Any], name: str, key: int
) -> None:
    with managing(policy) as manager:
        assert ask(manager, "entries", str(SHM))[0] == []
        assert ask(manager, "fill", str(SHM / name), 8)[0] == "WORKED"
        assert ask(manager, "entries", str(SHM))[0] == [name]
        assert not (SHM / name).exists()
        assert isinstance(ask(manager, "make_segment", key, 8)[0], int)
        assert ask(manager, "find_segment", key)[0] == "WORKED"
        assert ways_back.find_segment(key) == "ENOENT"
    assert not (SHM / name).exists()
    assert ways_back.find_segment(key) == "ENOENT"


@pytest.mark.each_layout
def test_the_size_is_that_of_the_memory_limit(name: str) -> None:
    """The cgroup's limit is above it here, so that the size is what is reached."""
    policy = {"user": TENANT, "group": TENANT, "memory": "256M", "each": {"memory": "32M"}}
    with managing(policy) as manager:
        size = os.statvfs(SHM).f_blocks
        assert ask(manager, "pid")[1].ending == "ok"
        found = ask(manager, "fill", str(SHM / name), 40)
    assert found[0] in ("ENOSPC", None)
    assert found[1].ending in ("ok", "memory")
    assert os.statvfs(SHM).f_blocks == size


def test_each_executor_has_its_own(name: str) -> None:
    with managing({**POLICY, "max_uses": 1}) as manager:
        first = ask(manager, "namespaces")[0]
        assert ask(manager, "fill", str(SHM / name), 1)[0] == "WORKED"
        second = ask(manager, "namespaces")[0]
        assert ask(manager, "entries", str(SHM))[0] == []
        ours = {kind: namespace(kind) for kind in first}
        server = {kind: namespace(kind, manager.fork_server_pid) for kind in first}
    assert ours == server
    for kind in first:
        assert ours[kind] not in (first[kind], second[kind])


@pytest.mark.once
@pytest.mark.each_layout
def test_a_policy_can_share_the_servers(name: str, key: int) -> None:
    with managing({**POLICY, "shared_memory": "server"}) as manager:
        assert ask(manager, "fill", str(SHM / name), 1)[0] == "WORKED"
        assert (SHM / name).stat().st_size == 1 << 20
        identifier = ask(manager, "make_segment", key, 1)[0]
        try:
            assert ways_back.find_segment(key) == "WORKED"
        finally:
            ways_back.remove_segment(identifier)
        found = set(ask(manager, "change_attributes")[0].values())
        assert found <= {"EROFS", "EPERM", "EACCES", "ENOSYS"}  # ENOSYS: calls of later kernels


@pytest.mark.each_layout
def test_the_cgroups_are_read_only_also_for_modes_owners_and_attributes() -> None:
    free = in_child(ways_back.by_attributes)
    assert "WORKED" in free.values()
    with managing(ROOT) as manager:
        found = ask(manager, "change_attributes")[0]
    assert found.keys() == free.keys()
    by_mount = ("mount_setattr ", "open_tree ")
    assert {said for name, said in found.items() if not name.startswith(by_mount)} <= {"EROFS", "ENOSYS"}
    assert {said for name, said in found.items() if name.startswith(by_mount)} == {"EPERM"}


@pytest.mark.each_layout
def test_kernels_before_5_12_make_each_mount_read_only() -> None:
    def program() -> dict[str, str]:
        refuse_system_call(MOUNT_SETATTR)
        with managing(ROOT) as manager:
            return dict(ask(manager, "change_attributes")[0])

    found = in_child(program)
    assert found
    assert set(found.values()) <= {"EROFS", "ENOSYS", "EPERM"}


def test_a_command_under_a_policy_has_its_own_too(name: str, tmp_path: Path) -> None:
    settings = tmp_path / "rcon.toml"
    settings.write_text('[policy.p]\nmemory = "64M"\n')
    run = ("run", "--policy", "p", "--settings", settings, "--", "sh", "-c")
    done = rcon(*run, f"echo x > {SHM / name} && ls {SHM}")
    assert done.out == f"{name}\n", done.err
    assert not (SHM / name).exists()


def test_rcon_set_says_that_the_size_stays(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    note = "rcon: note: the size of /dev/shm stays as it is for the processes that run now\n"
    for shared, memory, noted in (
        ("private", "96M", True),
        ("private", "32M", False),
        ("server", "96M", False),
    ):
        policy = {"memory": "64M", "shared_memory": shared}
        settings = {"policy": {name: policy}, "route": [{"policy": name}]}
        with managing({}, settings=settings) as manager:
            assert ask(manager, "fill", str(SHM / name), 1)[0] == "WORKED"
            assert run_main(["set", name, "--memory", memory]) == 0
            assert (note in capsys.readouterr().err) is noted


# -- mounts ---------------------------------------------------------------------------------------


def in_own_mounts(program: Callable[[], Any], *prepare: tuple[Any, ...]) -> Any:
    """Call a program in a child with mounts of its own, to which `prepare` adds some."""

    def alone() -> Any:
        unshare(CLONE_NEWNS)
        mount(None, "/", None, MS_REC | MS_PRIVATE)
        for arguments in prepare:
            mount(*arguments)
        return program()

    return in_child(alone)


@pytest.mark.once
@pytest.mark.each_layout
def test_tmp_is_private_where_it_is_in_memory_and_can_be_written(name: str) -> None:
    """Landlock allows the directory itself: the rules for / do not, as / leads to the cgroups."""

    def program() -> tuple[list[Any], list[str], str]:
        Path("/tmp", name).write_text("the server's")
        with managing({**POLICY, "max_uses": 1}) as manager:
            found = [ask(manager, "entries", "/tmp")[0], ask(manager, "fill", f"/tmp/{name}", 1)[0]]
            found += [ask(manager, "entries", "/tmp")[0], ask(manager, "fill", "/tmp/other", 80)[0]]
        return found, [path.name for path in Path("/tmp").iterdir()], Path("/tmp", name).read_text()

    found, left, text = in_own_mounts(program, ("tmpfs", "/tmp", "tmpfs", 0, "mode=1777"))
    assert found[:3] == [[], "WORKED", []]
    assert found[3] in ("ENOSPC", None)
    assert (left, text) == ([name], "the server's")


def test_a_directory_in_memory_is_private_also_where_it_is_no_mount_point(name: str) -> None:
    """As /run/lock is where /run is a tmpfs and no other is mounted in it."""

    def program() -> tuple[list[str], list[str]]:
        Path("/run/lock").mkdir()
        Path("/run/lock").chmod(0o1777)
        with managing(POLICY) as manager:
            made = [ask(manager, "fill", f"{path}/{name}", 1)[0] for path in ("/run/lock", "/run")]
        return made, [path.name for path in Path("/run/lock").iterdir()]

    made, left = in_own_mounts(program, ("tmpfs", "/run", "tmpfs", 0, "mode=755"))
    assert (made, left) == (["WORKED", "EACCES"], [])


def test_tmp_on_a_disk_stays_the_servers(tmp_path: Path) -> None:
    """Uploads spool there: more than the memory limit."""
    disk = Path(tempfile.mkdtemp(dir=os.environ.get("RCON_TEST_DISK", "/var/tmp")))

    def program() -> tuple[Any, int]:
        policy = {"each": {"memory": "40M"}}
        with managing(policy) as manager:
            result, outcome = ask(manager, "fill", "/tmp/upload", 100)
            return (result, outcome.ending), (disk / "upload").stat().st_size

    try:
        found, size = in_own_mounts(program, (str(disk), "/tmp", None, 4096))
    finally:
        (disk / "upload").unlink(missing_ok=True)
        disk.rmdir()
    assert found == ("WORKED", "ok")
    assert size == 100 << 20


def test_a_directory_that_the_server_works_in_is_not_hidden() -> None:
    def program() -> list[str]:
        Path("/tmp/application").mkdir()
        os.chdir("/tmp/application")
        with managing(ROOT) as manager:
            return list(ask(manager, "entries", "/tmp")[0])

    assert in_own_mounts(program, ("tmpfs", "/tmp", "tmpfs", 0, "mode=1777")) == ["application"]


def test_message_queues_are_the_executors_own(name: str) -> None:
    def program() -> tuple[str, list[str], list[str]]:
        Path("/mnt/queues").mkdir()
        mount("mqueue", "/mnt/queues", "mqueue", 0)
        with managing(ROOT) as manager:
            made = ask(manager, "create", f"/mnt/queues/{name}")[0]
            found = ask(manager, "entries", "/mnt/queues")[0]
        return made, found, [path.name for path in Path("/mnt/queues").iterdir()]

    made, theirs, ours = in_own_mounts(program, ("tmpfs", "/mnt", "tmpfs", 0))
    assert made.startswith("0:0 ")
    assert (theirs, ours) == ([name], [])


def test_mounts_spread_to_executors_and_not_back(tmp_path: Path) -> None:
    def program() -> tuple[list[str], list[str], bool]:
        mount(None, "/", None, MS_REC | MS_SHARED)
        with managing(ROOT) as manager:
            before = ask(manager, "entries", str(tmp_path))[0]
            mount("tmpfs", str(tmp_path), "tmpfs", 0)
            (tmp_path / "later").touch()
            after = ask(manager, "entries", str(tmp_path))[0]
            shm = "tmpfs /dev/shm tmpfs" in Path("/proc/self/mounts").read_text()
        return before, after, shm

    shm_before = "tmpfs /dev/shm tmpfs" in Path("/proc/self/mounts").read_text()
    assert in_own_mounts(program) == ([], ["later"], shm_before)


@pytest.mark.parametrize("in_memory", [False, True], ids=["tmp on a disk", "tmp in memory"])
def test_the_wall_of_landlock_is_made_once_and_again_when_a_mount_changes(
    in_memory: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = tmp_path / "made"
    original = landlock.Wall.__init__

    def counting(self: landlock.Wall, *arguments: Any, **keywords: Any) -> None:
        with made.open("a") as file:
            file.write(f"{os.getpid()}\n")
        original(self, *arguments, **keywords)

    monkeypatch.setattr(landlock.Wall, "__init__", counting)

    def program() -> tuple[list[str], list[str], int | None]:
        # Each key has an executor of its own, and none is made ahead while the mounts change.
        with managing({**ROOT, "per": "host"}) as manager:
            for number in range(5):
                assert ask(manager, "fill", "/tmp/here", 1, host=f"a{number}")[0] == "WORKED"
            first = made.read_text().split()
            mount("tmpfs", "/mnt", "tmpfs", 0)
            for number in range(5):
                assert ask(manager, "fill", "/mnt/there", 1, host=f"b{number}")[0] == "WORKED"
            return first, made.read_text().split(), manager.fork_server_pid

    folder = Path(tempfile.mkdtemp(dir=os.environ.get("RCON_TEST_DISK", "/var/tmp")))
    tmp = ("tmpfs", "/tmp", "tmpfs", 0, "mode=1777") if in_memory else (str(folder), "/tmp", None, 4096)
    made = folder / "made"
    try:
        first, both, server = in_own_mounts(program, tmp)
    finally:
        for left in folder.iterdir():
            left.unlink()
        folder.rmdir()
    assert first == [str(server)]
    assert both == [str(server)] * 2


def test_the_ruleset_does_not_grow_with_each_executor(monkeypatch: pytest.MonkeyPatch) -> None:
    """With /tmp in memory each executor adds a rule for its own; after some the ruleset is made again."""
    monkeypatch.setattr(rcon_plugins.builtin.landlock, "_MOST_USES", 3)

    def program() -> int:
        with managing({**ROOT, "max_uses": 1}) as manager:
            return sum(ask(manager, "fill", "/tmp/here", 0)[0] == "WORKED" for _ in range(8))

    assert in_own_mounts(program, ("tmpfs", "/tmp", "tmpfs", 0, "mode=1777")) == 8


# -- where the server cannot ----------------------------------------------------------------------


def test_without_the_capability_memory_is_shared_and_named_at_the_end(name: str, key: int) -> None:
    def program() -> tuple[list[str], list[str], list[str], int, tuple[int, int]]:
        without(CAP_SYS_ADMIN)
        records: list[str] = []
        handler = logging.Handler()
        handler.emit = lambda record: records.append(record.getMessage())  # type: ignore[method-assign]
        logging.getLogger("rcon").addHandler(handler)
        with managing(POLICY) as manager:
            found = [ask(manager, "fill", str(SHM / name), 2)[0]]
            identifier = ask(manager, "make_segment", key, 1)[0]
            others = ask(manager, "make_queue_and_semaphores", key, 4096)[0]
            ours = ask(manager, "namespaces")[0]
        same = [kind for kind, link in ours.items() if link == namespace(kind)]
        return found, same, records, identifier, others

    found, same, records, identifier, (queue, semaphores) = in_child(program)
    ways_back.remove_queue_and_semaphores(queue, semaphores)
    ways_back.remove_segment(identifier)  # which takes CAP_SYS_ADMIN: it is the tenant's
    assert (found, same) == (["WORKED"], ["mnt", "ipc"])
    (text,) = [record for record in records if "MiB of shared memory" in record]
    assert "left 3.0 MiB" in text
    assert f"'{SHM / name}' (uid {TENANT})" in text
    assert "'segment " in text
    assert f"'message queue {queue}' (uid {TENANT})" in text
    assert f"'semaphores {semaphores}' (uid {TENANT})" in text


def test_a_policy_without_memory_is_warned_about_where_memory_is_shared() -> None:
    def warnings(**policy: Any) -> list[str]:
        return [text for text in verdict(**policy).warnings() if "/dev/shm" in text]

    def lacking() -> tuple[list[str], list[str]]:
        without(CAP_SYS_ADMIN)
        return warnings(**POLICY), warnings(**POLICY, memory="128M")

    text = "policy p: files in /dev/shm, and shared memory, outlive their request or task, and no limit bounds them"
    assert in_child(lacking) == ([f"{text} together. Set `memory =`."], [])
    assert warnings(**POLICY) == []
    assert len(warnings(**POLICY, shared_memory="server")) == 1
    assert f"{text} together. Set `memory =`." in verdict(**POLICY).warnings(TENANT)


def test_memory_passed_over_a_socket_is_warned_about_where_nothing_bounds_it_together() -> None:
    text = "policy p: a memfd passed over a socket outlives its request or task, and `each.memory` does not bound it."

    def warned(**policy: Any) -> bool:
        return f"{text} Set `memory =`." in verdict(**policy).warnings()

    expanding = {"limit": "64M", "expand": "2x", "up_to": "128M"}
    assert warned(**POLICY)
    assert warned(user=TENANT, group=TENANT, each={"memory": expanding})
    assert not warned(**POLICY, memory="128M")
    assert not warned(user=TENANT, group=TENANT, each={"timeout": "20s"})
    assert not warned(**POLICY, shared_memory="server")  # another warning covers it


@pytest.mark.each_layout
def test_memory_passed_over_a_socket_is_bounded_by_memory_alone() -> None:
    """Each of 4 requests leaves 32 MiB in a process of the policy, where `each` has 64 MiB."""
    name = f"rcon-test-{os.getpid()}"
    with managing(POLICY) as manager:
        holder = begin(manager, "hold_memfds", name, 4)
        assert [ask(manager, "pass_memfd", name, 32)[1].ending for _ in range(4)] == ["ok"] * 4
        held, outcome = end(holder)
    assert (held, outcome.ending) == (128, "ok")
    with managing({**POLICY, "memory": "96M"}) as manager:
        holder = begin(manager, "hold_memfds", name, 4)
        assert [ask(manager, "pass_memfd", name, 32)[1].ending for _ in range(4)] != ["ok"] * 4
        holder.abort("it waits for more")


def test_private_memory_that_the_server_cannot_give_is_refused_at_start() -> None:
    def refused() -> list[tuple[str, str]]:
        without(CAP_SYS_ADMIN)
        found = verdict(**POLICY, shared_memory="private").verdicts["p"].refusals
        return [(one.limit, one.reason) for one in found]

    assert in_child(refused) == [
        (
            "shared_memory",
            "executor processes cannot have memory of their own: the server lacks cap_sys_admin",
        )
    ]
    assert verdict(**POLICY, shared_memory="private").verdicts["p"].refusals == ()
    assert verdict(pids=9, shared_memory="private").verdicts["p"].isolation == "process"
    with pytest.raises(SettingsError, match="shared_memory"):
        verdict(isolation="thread", shared_memory="private")


def test_a_server_that_may_not_mount_says_so_at_start() -> None:
    """As in a container whose security module forbids mount(2)."""

    def judged() -> tuple[str | None, str | None, int]:
        namespaces._trial.cache_clear()
        refuse_system_call(MOUNT, errno.EACCES)
        plan = verdict(isolation="process")
        return namespaces.why_not(), plan.verdicts["p"].caveat, len(plan.warnings())

    why, caveat, warnings = in_child(judged)
    assert why is not None
    assert "mount /" in why
    assert caveat is not None
    assert "change the permissions of the cgroup files and overwrite root's files" in caveat
    assert warnings == 2


def test_namespaces_that_were_there_at_the_start_must_be_there_in_every_executor() -> None:
    def refused() -> str:
        assert namespaces.why_not() is None
        refuse_system_call(MOUNT, errno.EPERM)
        try:
            with managing(ROOT) as manager:
                ask(manager, "pid")
        except (ConfinementError, KernelError) as error:
            return str(error)
        return "ran"

    assert "mount /" in in_child(refused)


def test_capabilities_that_are_only_permitted_are_enough() -> None:
    def program() -> dict[str, str]:
        held = Capabilities.of(CAP_SYS_ADMIN, CAP_SETUID, CAP_SETGID, CAP_SETPCAP)
        everything = read_state().permitted
        set_capabilities(everything, everything - held, Capabilities.none())
        with managing(POLICY) as manager:
            return dict(ask(manager, "namespaces")[0])

    assert in_child(program)["ipc"] != namespace("ipc")


def test_the_trial_leaves_no_process() -> None:
    def program() -> tuple[str | None, float]:
        namespaces._trial.cache_clear()
        began = time.monotonic()
        return namespaces.why_not(), time.monotonic() - began

    why, seconds = in_child(program)
    assert why is None
    assert seconds < 5
