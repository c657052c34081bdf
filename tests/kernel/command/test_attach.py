"""rcon attach: it limits running processes, the group disappears by itself, and processes are moved back."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from rcon_plugins.groups.find import find_group
from rcon_plugins.kernel import proc
from rcon_plugins.kernel.cgroup import Cgroup, Hierarchy, Resources
from rcon_plugins.tree import attach as tree_attach
from rcon_plugins.tree.garbage import collect
from tests.kernel.command.harness import Done, left_by, rcon, until

pytestmark = pytest.mark.each_layout

Processes = list[subprocess.Popen[bytes]]


@pytest.fixture
def name() -> str:
    """The name of a group that no other test on this machine has."""
    return f"attached-{os.getpid()}"


def run(*words: str, count: int = 1) -> Processes:
    return [
        subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) for _ in range(count)
    ]


@contextlib.contextmanager
def running(*words: str, count: int = 1) -> Iterator[Processes]:
    processes = run(*words, count=count)
    try:
        yield processes
    finally:
        end(processes)


def end(processes: Processes) -> None:
    for process in processes:
        process.kill()
        process.wait()


def where(pid: int) -> str:
    return Path("/proc", str(pid), "cgroup").read_text()


def watcher(pid: int) -> int:
    """Return the pid of the watcher of the group that this process is in."""
    found = re.search(r"/rcon-([0-9]+)-[0-9]+/attached/", where(pid))
    assert found, where(pid)
    return int(found[1])


def attach(processes: Processes, *options: str) -> Done:
    return rcon("attach", *options, *(str(process.pid) for process in processes))


@pytest.mark.smoke
def test_release_moves_processes_back(name: str) -> None:
    with running("sleep", "1000", count=3) as three:
        before = [where(process.pid) for process in three]
        attach(three, "--pids", "50", "--group", name)
        (listed,) = [line for line in rcon("ls").out.splitlines() if line.startswith(f"{name} ")]
        assert listed.endswith("  rcon attach")
        mine = watcher(three[0].pid)
        assert rcon("attach", "--release", str(three[0].pid)).status == 0
        assert where(three[0].pid) == before[0]
        assert watcher(three[1].pid) == mine
        done = rcon("attach", "--release", name)
        assert (done.status, done.err) == (0, "")
        assert [where(process.pid) for process in three] == before
        until(lambda: not left_by(mine), "nothing is left")
        assert all(process.poll() is None for process in three)


def test_each_process_returns_to_its_own_cgroup(name: str) -> None:
    """The processes of one group may come from different cgroups."""
    hierarchy = Hierarchy.discover()
    places = [hierarchy.cgroup(f"/rcon-test-{os.getpid()}-{number}").create() for number in range(2)]
    try:
        with running("sleep", "1000", count=2) as both:
            for place, process in zip(places, both, strict=True):
                place.attach(process.pid)
            before = [where(process.pid) for process in both]
            assert before[0] != before[1]
            attach(both, "--group", name)
            assert rcon("attach", "--release", name).status == 0
            assert [where(process.pid) for process in both] == before
    finally:
        for place in places:
            place.delete()


def test_children_are_attached_too(name: str) -> None:
    script = "sleep 1000 & sh -c 'sleep 1000 & echo up; wait' & wait"
    shell = subprocess.Popen(["sh", "-c", script], stdout=subprocess.PIPE, start_new_session=True)
    try:
        assert shell.stdout is not None
        shell.stdout.readline()
        done = rcon("attach", "--children", "--group", name, str(shell.pid))
        assert done.out == f"{name}: 4 processes\n"
        assert rcon("attach", "--release", name).status == 0
    finally:
        os.killpg(shell.pid, signal.SIGKILL)
        shell.communicate()


def test_processes_of_a_killed_watcher_are_moved_back_and_not_killed(base: Cgroup) -> None:
    """In a base of its own: in that of root, any server or command that starts moves them back."""
    with running("sleep", "1000") as one:
        before = where(one[0].pid)
        attach(one, "--pids", "50", "--cgroup", base.path)
        mine = watcher(one[0].pid)
        os.kill(mine, signal.SIGKILL)
        until(lambda: not Path("/proc", str(mine)).exists(), "it is dead")
        assert "/attached/sleep-" in where(one[0].pid)
        assert [f"rcon-{mine}-" in one.path for one in collect(Hierarchy.discover(), base.path)] == [True]
        assert where(one[0].pid) == before
        assert one[0].poll() is None
        assert base.children() == []


@pytest.mark.layout("v1", "hybrid")
def test_without_a_record_processes_stay_below_the_base() -> None:
    """A watcher in a container records in the /run there. The limits around the base hold for its processes.

    On v2 the base passes controllers on, and takes no processes.
    """
    base = f"/rcon-tests-{os.getpid()}"
    cgroup = Hierarchy.discover().cgroup(base)
    with running("sleep", "1000") as one:
        attach(one, "--pids", "50", "--cgroup", base)
        mine = watcher(one[0].pid)
        os.kill(mine, signal.SIGKILL)
        until(lambda: not Path("/proc", str(mine)).exists(), "it is dead")
        for record in Path("/run/rcon").glob(f"rcon-{mine}-*.json"):
            record.unlink()
        assert [one.removed for one in collect(Hierarchy.discover(), base)] == [True]
        assert cgroup.processes() == [one[0].pid]
    assert cgroup.delete()


def test_a_watcher_moves_processes_back_on_sigterm() -> None:
    with running("sleep", "1000") as one:
        before = where(one[0].pid)
        attach(one)
        mine = watcher(one[0].pid)
        os.kill(mine, signal.SIGTERM)
        until(lambda: not left_by(mine), "the group is gone")
        assert where(one[0].pid) == before


def test_attach_notes_that_existing_memory_is_not_counted(name: str) -> None:
    with running("sleep", "1000") as one:
        done = attach(one, "--memory", "64M", "--group", name)
        assert done.status == 0
        assert done.err == (
            "rcon: note: --memory counts only memory that the processes allocate from now on\n"
        )
        rcon("attach", "--release", name)


@pytest.mark.once
def test_neither_a_process_nor_a_name_is_attached_twice(name: str) -> None:
    with running("sleep", "1000", count=2) as both:
        attach(both[:1], "--group", name)
        again = attach(both[:1])
        assert again.status == 2
        assert "is in a group already" in again.err
        named = attach(both[1:], "--group", name)
        assert named.status == 2
        assert f"'{name}' is in use" in named.err
        assert "/attached/" not in where(both[1].pid)
        rcon("attach", "--release", name)


def test_attach_takes_all_processes_or_none() -> None:
    with running("sleep", "1000") as one:
        before = where(one[0].pid)
        gone = run("true")[0]
        gone.wait()
        done = rcon("attach", "--cpu", "50%", str(one[0].pid), str(gone.pid))
        assert done.status == 2
        assert f"there is no process {gone.pid}, or it has ended" in done.err
        assert where(one[0].pid) == before


@pytest.mark.parametrize("limit", [["--cpus", "4000"], ["--write", "1M", "--device", "999:0"]])
def test_a_limit_that_cannot_be_set_attaches_nothing(limit: list[str]) -> None:
    with running("sleep", "1000") as one:
        before = where(one[0].pid)
        done = attach(one, *limit)
        assert (done.status, done.out) == (2, "")
        assert len(done.err.splitlines()) == 1
        assert where(one[0].pid) == before


def test_if_rcon_is_killed_during_attach_no_process_stays_attached(base: Cgroup) -> None:
    def kill_who_asks(cgroup: Cgroup) -> Callable[[], object]:
        os.kill(os.getppid(), signal.SIGKILL)
        until(lambda: os.getppid() != asking, "who asked is gone")
        return lambda: None

    with running("sleep", "1000") as one:
        before = where(one[0].pid)
        asking = os.fork()
        if asking == 0:
            asking = os.getpid()
            request = tree_attach.AttachRequest((one[0].pid,), "unasked", Resources(), monitor=kill_who_asks)
            tree_attach.attach(request, Hierarchy.discover(), base.path)
        assert os.waitstatus_to_exitcode(os.waitpid(asking, 0)[1]) == -signal.SIGKILL
        until(lambda: not base.children(), "the group is gone")
        assert where(one[0].pid) == before


def test_if_a_process_ends_during_attach_the_others_are_not_attached(base: Cgroup) -> None:
    with running("sleep", "1000", count=2) as both:
        before = where(both[0].pid)

        def end_one(cgroup: Cgroup) -> Callable[[], object]:
            os.kill(both[1].pid, signal.SIGKILL)
            until(lambda: proc.start_time(both[1].pid) is None, "it has ended")
            return lambda: None

        request = tree_attach.AttachRequest(
            (both[0].pid, both[1].pid), "ending", Resources(), monitor=end_one
        )
        with pytest.raises(tree_attach.AttachRefused, match=f"process {both[1].pid} has ended"):
            tree_attach.attach(request, Hierarchy.discover(), base.path)
        assert where(both[0].pid) == before
    until(lambda: not base.children(), "the group is gone")


@contextlib.contextmanager
def allocating(mebibytes: int) -> Iterator[subprocess.Popen[bytes]]:
    """Run a program that allocates memory on the first line of input and prints the size. It ends on the second."""
    program = f"input(); held = b'x' * ({mebibytes} << 20); print(len(held), flush=True); input(); exit(5)"
    words = [sys.executable, "-c", program]
    started = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        yield started
    finally:
        started.kill()
        started.communicate()


def tell(program: subprocess.Popen[bytes]) -> bytes:
    """Send the program a line, and return its answer."""
    assert program.stdin is not None
    assert program.stdout is not None
    program.stdin.write(b"go\n")
    program.stdin.flush()
    return program.stdout.readline()


GROWS = ("--memory", "32M", "--swap", "0", "--expand", "2x", "--up-to")


def test_memory_grows_for_as_long_as_they_run(name: str) -> None:
    with allocating(80) as program:
        done = attach([program], *GROWS, "1G", "--group", name)
        assert (done.status, done.out) == (0, f"{name}: 1 process\n")
        mine = watcher(program.pid)
        assert tell(program) == b"%d\n" % (80 << 20)
        limits = find_group(name).limits()
        assert limits.memory_max == 1 << 30
        assert not isinstance(limits.memory_high, int) or limits.memory_high > 80 << 20  # only v2 has it
        tell(program)
        assert program.wait() == 5
        until(lambda: not left_by(mine), "the group goes after its last process")


def test_memory_expands_up_to_its_bound() -> None:
    with allocating(200) as program:
        attach([program], *GROWS, "64M")
        assert tell(program) == b""
        assert program.wait() == -signal.SIGKILL


def test_processes_with_expanding_memory_are_released(name: str) -> None:
    with running("sleep", "1000") as one:
        before = where(one[0].pid)
        attach(one, *GROWS, "1G", "--group", name)
        mine = watcher(one[0].pid)
        assert len(list(Path(f"/proc/{mine}/task").iterdir())) == 2  # one thread watches memory
        done = rcon("attach", "--release", name)
        assert (done.status, done.err) == (0, "")
        assert where(one[0].pid) == before
        assert left_by(mine) == []


@pytest.mark.once
@pytest.mark.parametrize(
    ("options", "says"),
    [
        (GROWS[:-1], "--expand needs --up-to (add it"),
        (("--memory", "2G", "--expand", "2x", "--up-to", "1G"), "--up-to"),
        (("--memory", "32M", "--expand", "0.5x", "--up-to", "1G"), "--expand"),
    ],
)
def test_an_expansion_that_cannot_be_set_attaches_nothing(options: tuple[str, ...], says: str) -> None:
    with running("sleep", "1000") as one:
        before = where(one[0].pid)
        done = attach(one, *options)
        assert (done.status, done.out) == (2, "")
        assert says in done.err
        assert len(done.err.splitlines()) == 1
        assert where(one[0].pid) == before
