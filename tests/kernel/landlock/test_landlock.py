"""Landlock on the real kernel: what is forbidden, to whom, and that nothing else is."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rcon_plugins.errors import CapabilityError, KernelError
from rcon_plugins.kernel import landlock
from rcon_plugins.kernel.syscalls import CLONE_NEWNS, MS_REC, mount, prctl, unshare
from tests.system_calls import refuse_system_call

NOBODY = 65534
PR_SET_NO_NEW_PRIVS = 38
MS_PRIVATE = 1 << 18
PTRACE_ATTACH, PTRACE_DETACH = 16, 17
CGROUPS = [
    mount.split()[1] for mount in Path("/proc/self/mounts").read_text().splitlines() if " cgroup" in mount
]


def answer(act: Callable[..., Any], *arguments: Any) -> str:
    """ "ok", or the name of the error."""
    try:
        act(*arguments)
    except OSError as error:
        return type(error).__name__
    return "ok"


def write(path: str | Path, data: bytes = b"x", flags: int = os.O_CREAT) -> None:
    descriptor = os.open(path, os.O_WRONLY | flags)
    try:
        os.write(descriptor, data)
    finally:
        os.close(descriptor)


def become_nobody() -> None:
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)
    prctl(PR_SET_NO_NEW_PRIVS, 1)


def attach(pid: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.ptrace(PTRACE_ATTACH, pid, None, None) != 0:
        raise OSError(ctypes.get_errno(), "ptrace")
    os.waitpid(pid, 0)
    libc.ptrace(PTRACE_DETACH, pid, None, None)


def open_memory(pid: int) -> None:
    os.close(os.open(f"/proc/{pid}/mem", os.O_RDWR))


def read_memory(pid: int) -> None:
    """process_vm_readv(2): EFAULT is for the address; it is the permission that is asked for."""
    libc = ctypes.CDLL(None, use_errno=True)
    buffer = ctypes.create_string_buffer(8)

    class Piece(ctypes.Structure):
        _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))

    here, there = Piece(ctypes.addressof(buffer), 8), Piece(8, 8)
    libc.process_vm_readv(pid, ctypes.byref(here), 1, ctypes.byref(there), 1, 0)
    if ctypes.get_errno() not in (0, 14):
        raise OSError(ctypes.get_errno(), "process_vm_readv")


@contextlib.contextmanager
def sleeper(user: int) -> Iterator[int]:
    process = subprocess.Popen(["sleep", "600"], user=user, group=user, extra_groups=[])
    try:
        yield process.pid
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def folders() -> Iterator[Path]:
    """Two folders, free and shut, with a file and a folder in each, anybody's to change."""
    with tempfile.TemporaryDirectory() as name:
        top = Path(name)
        for folder in (top / "free", top / "shut"):
            (folder / "folder").mkdir(parents=True)
            (folder / "file").write_text("some text")
        for path in (top, *top.rglob("*")):
            path.chmod(0o777)
        yield top


def every_change(below: Path) -> dict[str, str]:
    """Each way to change something below a folder, tried."""
    file, folder = below / "file", below / "folder"
    return {
        "overwrite": answer(write, file),
        "append": answer(write, file, b"x", os.O_APPEND),
        "create": answer(write, below / "new"),
        "truncate on opening": answer(write, file, b"x", os.O_TRUNC),
        "mkdir": answer(os.mkdir, below / "newer"),
        "rmdir": answer(os.rmdir, folder),
        "symlink": answer(os.symlink, "file", below / "symlink"),
        "mkfifo": answer(os.mkfifo, below / "fifo"),
        "link": answer(os.link, file, below / "link"),
        "rename": answer(os.rename, file, below / "renamed"),
        "unlink": answer(os.unlink, below / "renamed" if (below / "renamed").exists() else file),
    }


@pytest.mark.smoke
@pytest.mark.each_layout
def test_this_kernel_has_landlock() -> None:
    assert landlock.abi() >= 2


def test_a_kernel_without_landlock_is_abi_0(in_child: Any) -> None:
    """Where the kernel, or a filter of a container, refuses the call."""

    def refused() -> tuple[int, str, str | None]:
        refuse_system_call(444)  # landlock_create_ruleset
        with pytest.raises(CapabilityError) as raised:
            landlock.restrict(["/"], [])
        return landlock.abi(), raised.value.problem, raised.value.hint

    number, problem, hint = in_child(refused)
    assert number == 0
    assert problem == "this kernel has no Landlock"
    assert hint is not None
    assert "lsm=" in hint


@pytest.mark.parametrize("root", [True, False])
def test_only_files_below_a_forbidden_path_cannot_be_changed(
    folders: Path, root: bool, in_child: Any
) -> None:
    def tried() -> tuple[dict[str, str], dict[str, str], str]:
        if not root:
            become_nobody()
        landlock.forbid_writing_below([str(folders / "shut")])
        text = (folders / "shut" / "file").read_text()
        return every_change(folders / "shut"), every_change(folders / "free"), text

    shut, free, text = in_child(tried)
    assert set(shut.values()) == {"PermissionError"}, shut
    assert set(free.values()) == {"ok"}, free
    assert text == "some text"
    assert sorted(path.name for path in (folders / "shut").iterdir()) == ["file", "folder"]


@pytest.mark.each_layout
def test_truncating_is_forbidden_from_abi_3(folders: Path, in_child: Any) -> None:
    def tried() -> tuple[str, str]:
        landlock.forbid_writing_below([str(folders / "shut")])
        return answer(os.truncate, folders / "shut/file", 1), answer(os.truncate, folders / "free/file", 1)

    expected = "PermissionError" if landlock.abi() >= 3 else "ok"
    assert in_child(tried) == (expected, "ok")


def test_moving_across_directories_goes_on_but_not_out_of_nor_into_a_forbidden_one(
    folders: Path, in_child: Any
) -> None:
    (folders / "other").mkdir()

    def tried() -> list[str]:
        landlock.forbid_writing_below([str(folders / "shut")])
        os.link(folders / "free/file", folders / "free/folder/second")
        return [
            answer(os.rename, folders / "shut/file", folders / "free/stolen"),
            answer(os.link, folders / "shut/file", folders / "free/stolen"),
            answer(os.rename, folders / "free/file", folders / "shut/brought"),
            answer(os.rename, folders / "free/file", folders / "other/moved"),
            answer(os.rename, folders / "free/folder", folders / "other/folder"),
        ]

    results = in_child(tried)
    assert [result != "ok" for result in results] == [True, True, True, False, False]
    assert (folders / "other/folder/second").read_text() == "some text"


@pytest.mark.each_layout
def test_cgroups_cannot_be_written_made_nor_removed_and_the_machine_goes_on(
    tmp_path: Path, in_child: Any
) -> None:
    """What a tenant that keeps the server's uid must not do."""
    cgroup = Path(next(path for path in CGROUPS if (Path(path) / "cgroup.controllers").exists()))
    mine = cgroup / f"rcon-landlock-{os.getpid()}"
    mine.mkdir()

    def tried() -> tuple[list[str], list[str], str]:
        os.chdir(tmp_path)
        landlock.forbid_writing_below(CGROUPS)
        forbidden = [
            answer(write, mine / "cgroup.procs", b"0", 0),
            answer(write, mine / "cgroup.max.depth", b"3", 0),
            answer(os.mkdir, mine / "child"),
            answer(os.mkdir, cgroup / "sibling"),
            answer(os.rmdir, mine),
            answer(write, f"/proc/self/root{mine}/cgroup.procs", b"0", 0),
        ]
        pipe = os.pipe()
        fine = [
            answer(write, "/dev/null"),
            answer(write, "/proc/self/comm", b"renamed", 0),
            answer(write, f"/proc/self/fd/{pipe[1]}"),
            answer(write, f"/proc/self/fd/{os.memfd_create('m')}"),
            answer(write, tmp_path / "file"),
            answer(subprocess.run, ["sh", "-c", "echo x > /dev/null && : > file"], -1, None),
            answer(open_terminal),
        ]
        return forbidden, fine, (mine / "cgroup.max.depth").read_text()

    try:
        forbidden, fine, depth = in_child(tried)
    finally:
        mine.rmdir()
    assert set(forbidden) == {"PermissionError"}, forbidden
    assert set(fine) == {"ok"}, fine
    assert depth == "max\n"


def open_terminal() -> None:
    """Device files take ioctl(2) as before: the size of a terminal that is opened now."""
    leader, follower = os.openpty()
    os.get_terminal_size(os.open(os.ttyname(follower), os.O_RDWR | os.O_NOCTTY))
    os.close(leader)


def test_a_file_in_the_root_directory_and_new_names_there(folders: Path, in_child: Any) -> None:
    """A rule for `/` would allow everything, so that each file there has its own, and new ones have none."""
    (folders / "file").write_text("")

    def tried() -> list[str]:
        os.chroot(folders)
        os.chdir("/")
        landlock.forbid_writing_below(["/shut"])
        changes = (
            (write, "/file"),
            (write, "/free/new"),
            (write, "/new"),
            (os.unlink, "/file"),
            (os.mkdir, "/folder"),
        )
        return [answer(act, path) for act, path in changes]

    assert in_child(tried) == ["ok", "ok", "PermissionError", "PermissionError", "PermissionError"]
    assert (folders / "file").read_text() == "x"


def test_a_forbidden_file_and_what_is_given_by_a_link(folders: Path, in_child: Any) -> None:
    (folders / "link").symlink_to(folders / "free")

    def tried() -> list[str]:
        landlock.forbid_writing_below([str(folders / "shut" / "file"), str(folders / "link" / "folder")])
        return [
            answer(write, folders / "shut/file"),
            answer(write, folders / "free/folder/new"),
            answer(write, folders / "free/file"),
            answer(write, folders / "shut/folder/new"),
            answer(write, folders / "shut/new"),  # leads to a forbidden path: nothing new
        ]

    no = "PermissionError"
    assert in_child(tried) == [no, no, "ok", "ok", no]


def test_everything_or_nothing_can_be_forbidden(folders: Path, in_child: Any) -> None:
    def tried(paths: list[str]) -> str:
        landlock.forbid_writing_below(paths)
        return answer(write, folders / "free/file")

    assert in_child(tried, ["/", str(folders)]) == "PermissionError"
    assert in_child(tried, []) == "ok"


def test_a_path_that_is_not_there_is_an_error_and_nothing_has_changed(folders: Path, in_child: Any) -> None:
    def tried() -> tuple[str | None, str]:
        with pytest.raises(KernelError, match="No such file") as raised:
            landlock.forbid_writing_below([str(folders / "shut"), "/nowhere"])
        with pytest.raises(KernelError, match="/nowhere"):
            landlock.restrict(["/nowhere"], [])
        return raised.value.path, answer(write, folders / "shut/file")

    assert in_child(tried) == ("/nowhere", "ok")


@pytest.mark.parametrize("root", [True, False])
@pytest.mark.parametrize("act", [attach, open_memory, read_memory])
def test_processes_outside_are_out_of_reach_whatever_the_uid(
    root: bool, act: Callable[[int], None], in_child: Any
) -> None:
    def tried(victim: int, shut: bool) -> str:
        if not root:
            become_nobody()
        if shut:
            landlock.forbid_writing_below(CGROUPS)
        return answer(act, victim)

    with sleeper(0 if root else NOBODY) as victim:
        assert in_child(tried, victim, False) == "ok"
        assert in_child(tried, victim, True) == "PermissionError"


def test_processes_inside_are_within_reach_and_inherit(folders: Path, in_child: Any) -> None:
    def tried() -> tuple[str, int]:
        landlock.forbid_writing_below([str(folders / "shut")])
        with sleeper(0) as child:
            reached = answer(open_memory, child)
        command = ["sh", "-c", f": > {folders}/free/new; : > {folders}/shut/new"]
        return reached, subprocess.run(command, stderr=subprocess.DEVNULL, check=False).returncode

    reached, status = in_child(tried)
    assert reached == "ok"
    assert status != 0
    assert (folders / "free/new").exists()
    assert not (folders / "shut/new").exists()


@pytest.mark.each_layout
def test_signals_are_scoped_where_asked_and_the_kernel_can(in_child: Any) -> None:
    def tried(victim: int, signals: bool) -> tuple[str, str]:
        landlock.forbid_writing_below(CGROUPS, signals=signals)
        with sleeper(0) as child:
            return answer(os.kill, victim, 0), answer(os.kill, child, signal.SIGKILL)

    with sleeper(0) as victim:
        expected = "PermissionError" if landlock.abi() >= 6 else "ok"
        assert in_child(tried, victim, True) == (expected, "ok")
        assert in_child(tried, victim, False) == ("ok", "ok")


def test_a_wall_made_ahead_is_for_one_process_after_the_other(folders: Path, in_child: Any) -> None:
    def tried() -> tuple[str, str]:
        wall.put_up()
        wall.close()
        return answer(write, folders / "free/file"), answer(write, folders / "shut/file")

    wall = landlock.Wall([str(folders / "shut")])
    try:
        assert in_child(tried) == in_child(tried) == ("ok", "PermissionError")
        assert answer(write, folders / "shut/file") == "ok"
    finally:
        wall.close()


def test_a_wall_is_outdated_when_names_beside_its_paths_change(in_child: Any) -> None:
    """In a file system of its own: in /tmp, others make files beside the folders of this test."""

    def tried() -> list[bool]:
        unshare(CLONE_NEWNS)
        mount(None, "/", None, MS_REC | MS_PRIVATE)
        mount("tmpfs", "/mnt", "tmpfs", 0)
        for name in ("free", "shut"):
            Path("/mnt", name).mkdir()
        wall = landlock.Wall(["/mnt/shut"])
        write("/mnt/free/new")
        write("/mnt/shut/new")
        found = [wall.is_current]
        write("/mnt/new")
        return [*found, wall.is_current]

    assert in_child(tried) == [True, False]


def test_only_the_calling_thread_is_restricted(folders: Path, in_child: Any) -> None:
    def tried() -> tuple[str, str, str]:
        restricted, over = threading.Event(), threading.Event()
        answers: dict[str, str] = {}

        def shut_in() -> None:
            landlock.forbid_writing_below([str(folders / "shut")])
            answers["in it"] = answer(write, folders / "shut/file")
            restricted.set()
            over.wait()

        def beside() -> None:
            restricted.wait()
            answers["beside it"] = answer(write, folders / "shut/file")
            over.set()

        threads = [threading.Thread(target=beside), threading.Thread(target=shut_in)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return answers["in it"], answers["beside it"], answer(write, folders / "shut/file")

    assert in_child(tried) == ("PermissionError", "ok", "ok")


def test_restrict_allows_reading_here_changing_there_and_nothing_else(folders: Path, in_child: Any) -> None:
    (folders / "secret").write_text("secret")

    def tried() -> tuple[dict[str, str], dict[str, str], list[str]]:
        become_nobody()
        landlock.restrict(
            ["/usr", "/lib", "/lib64", str(folders / "shut")], [str(folders / "free"), "/dev/null"]
        )
        others = [
            answer(Path.read_text, folders / "shut/file"),
            answer(os.listdir, folders / "shut"),
            answer(write, "/dev/null"),
            answer(Path.read_text, folders / "secret"),
            answer(os.listdir, folders),
            answer(write, folders / "new"),
        ]
        return every_change(folders / "shut"), every_change(folders / "free"), others

    shut, free, others = in_child(tried)
    assert set(shut.values()) == {"PermissionError"}, shut
    assert set(free.values()) == {"ok"}, free
    assert others == ["ok"] * 3 + ["PermissionError"] * 3


def test_layers_only_narrow(folders: Path, in_child: Any) -> None:
    def tried() -> list[str]:
        become_nobody()
        landlock.restrict(["/"], [str(folders / "free")])
        landlock.restrict(["/"], [str(folders)])  # wider again: allows nothing more
        first = [answer(write, folders / "free/file"), answer(write, folders / "shut/file")]
        landlock.restrict(["/"], [str(folders / "free/folder")])
        return [*first, answer(write, folders / "free/folder/new"), answer(write, folders / "free/file")]

    no = "PermissionError"
    assert in_child(tried) == ["ok", no, "ok", no]


def test_sixteen_layers_and_then_a_plain_error(in_child: Any) -> None:
    def tried() -> tuple[int, str]:
        for count in range(20):
            try:
                landlock.restrict(["/"], ["/"])
            except CapabilityError as error:
                return count, str(error)
        return 20, ""

    count, error = in_child(tried)
    assert count == 16
    assert "16 layers" in error


def test_without_privilege_no_new_privs_is_needed(in_child: Any) -> None:
    def tried() -> str:
        os.setresuid(NOBODY, NOBODY, NOBODY)
        with pytest.raises(CapabilityError) as raised:
            landlock.restrict(["/"], [])
        return str(raised.value)

    assert "no_new_privs" in in_child(tried)


def test_no_descriptor_is_left_open(folders: Path, in_child: Any) -> None:
    def tried() -> tuple[list[str], list[str]]:
        before = [path.name for path in Path("/proc/self/fd").iterdir()]
        landlock.forbid_writing_below([str(folders / "shut")])
        landlock.restrict(["/"], ["/"])
        with contextlib.suppress(KernelError):
            landlock.restrict(["/nowhere"], [])
        return before, [path.name for path in Path("/proc/self/fd").iterdir()]

    before, after = in_child(tried)
    assert len(before) == len(after)
