"""rcon run --in NAME: several commands in one group with one set of limits, which goes with the last of them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

from rcon_plugins.kernel.cgroup import Cgroup, Hierarchy
from tests.commands import become_rcon
from tests.kernel.cgroup.helpers import DISK
from tests.kernel.command.harness import ALLOCATE, MOUNTS, Done, rcon, until
from tests.processes import alive, entries

pytestmark = pytest.mark.each_layout

NOBODY = 65534
RCON = Path(sys.executable).parent / "rcon"
#: A command that says the limit of processes in each of its cgroups, from its own one up.
LIMITS = """
sed -n 's/^[0-9]*:\\(pids\\|\\):/\\1 /p' /proc/self/cgroup | while read -r kind path; do
    [ "$path" ] || { path=$kind; kind=; }
    while [ "$path" != / ] && [ "$path" ]; do
        cat "/sys/fs/cgroup/$kind$path/pids.max" 2>/dev/null
        path=${path%/*}
    done
done
"""


@pytest.fixture
def name() -> str:
    return f"shared-{os.getpid()}"


def left(name: str) -> list[Path]:
    """Return the directories of a shared group, in any hierarchy."""
    bases = [MOUNTS, *(path for path in MOUNTS.iterdir() if path.is_dir())]
    return [path for base in bases for path in entries(base / "rcon") if path.name == f"rcon-in-{name}"]


@contextmanager
def running(*words: str, ready: Path) -> Iterator[int]:
    """Run rcon in the background, whose command makes the file ``ready``. Give its pid; end it at last."""
    pid = os.fork()
    if pid == 0:
        become_rcon(list(words), [ready.with_suffix(".out"), ready.with_suffix(".err")])
    try:
        until(ready.exists, f"{words}: {ready.with_suffix('.err')}")
        yield pid
    finally:
        try:
            os.kill(pid, signal.SIGTERM)
            os.waitpid(pid, 0)
        except (ChildProcessError, ProcessLookupError):
            pass


def staying(name: str, ready: Path, *limits: str) -> list[str]:
    """Return the words of a command that stays in a group."""
    return ["run", "--in", name, *limits, "--", "sh", "-c", f"echo $$ > {ready}; exec sleep 1000"]


@pytest.mark.smoke
def test_the_limits_hold_for_all_commands_together(name: str, tmp_path: Path) -> None:
    limits = ("--memory", "64M", "--swap", "0", "--pids", "50")
    holding = (
        f"dd if=/dev/zero of=/dev/shm/{name} bs=1M count=40 status=none; touch {tmp_path}/one; sleep 1000"
    )
    try:
        with running("run", "--in", name, *limits, "--", "sh", "-c", holding, ready=tmp_path / "one"):
            done = rcon("run", "--in", name, *limits, "--", *ALLOCATE.format(40).split())
            assert done.status == 137
            assert done.err.splitlines()[-1].startswith(
                f"rcon: memory limit 64 MiB of the group {name} reached"
            )
            assert (done.report["outcome"], done.report["limit"], done.report["in"]) == (
                "memory",
                "memory",
                name,
            )
            # Its own usage, not that of the group.
            assert 0 < done.report["usage"]["memory_peak"] < 64 << 20
            # The other command goes on.
            assert rcon("run", "--in", name, "--", "sh", "-c", LIMITS).out.split().count("50") == 1
            assert rcon("run", "--in", name, "--", *ALLOCATE.format(10).split()).status == 0
    finally:
        Path("/dev/shm", name).unlink()
    assert left(name) == []


def test_a_fork_is_refused_for_all_commands_together(name: str, tmp_path: Path) -> None:
    with running(*staying(name, tmp_path / "one", "--pids", "4"), ready=tmp_path / "one"):
        script = "for i in 1 2 3 4; do sleep 3 & done; wait"
        done = rcon("run", "--in", name, "--pids", "4", "--", "sh", "-c", script)
        assert (done.report["outcome"], done.report["limit"]) == ("pids", "pids")
        assert "pids limit 4 reached" in done.err
    assert left(name) == []


@pytest.mark.once
def test_other_limits_and_no_group_are_refused(name: str, tmp_path: Path) -> None:
    made = tmp_path / "made"
    done = rcon("run", "--in", name, "--", "touch", made)
    assert (done.status, done.report["outcome"]) == (2, "refused")
    assert (
        done.err == f"rcon: --in: there is no group {name!r} (give its limits: the first command makes it)\n"
    )
    limits = ("--cpu", "50%", "--memory", "64M", "--cpu-weight", "50", "--pids", "9", "--cpus", "0")
    same = ("--cpu", "50.0%", "--memory", "65536K", *limits[4:])
    with running(*staying(name, tmp_path / "one", *limits), ready=tmp_path / "one"):
        assert rcon("run", "--in", name, *same, "--", "true").status == 0
        for other, given in (
            (("--memory", "65M"), "memory 65M"),
            (limits[:-2], "cpu 50%, cpu-weight 50, memory 64M, pids 9"),
            ((*limits, "--memory-high", "32M") if _is_v2() else ("--pids", "8"), ""),
            ((*limits[:1], "51%", *limits[2:]), "cpu 51%"),
        ):
            done = rcon("run", "--in", name, *other, "--", "touch", made)
            assert done.status == 2, done
            assert done.err.startswith(f"rcon: --in: the group {name!r} has cpu 50%, cpu-weight 50, ")
            assert given in done.err
            assert done.err.endswith(
                f"(give the same limits or none, or change them first: rcon set {name})\n"
            )
        # As the limits are now, not as they were given.
        assert rcon("set", name, "--memory", "128M").status == 0
        assert rcon("run", "--in", name, *limits, "--", "touch", made).status == 2
        changed = (*limits[:3], "128M", *limits[4:])
        assert rcon("run", "--in", name, *changed, "--", "true").status == 0
    assert not made.exists()
    assert left(name) == []


def _is_v2() -> bool:
    return Hierarchy.discover().layout == "v2"


def test_the_group_goes_with_the_last_command_and_is_made_anew(name: str, tmp_path: Path) -> None:
    with (
        running(*staying(name, tmp_path / "one", "--pids", "9"), ready=tmp_path / "one") as first,
        running(*staying(name, tmp_path / "two", "--pids", "9"), ready=tmp_path / "two"),
    ):
        os.kill(first, signal.SIGTERM)
        os.waitpid(first, 0)
        assert left(name)
        assert rcon("run", "--in", name, "--", "sh", "-c", LIMITS).out.split().count("9") == 1
        assert rcon("run", "--in", name, "--pids", "8", "--", "true").status == 2
    assert left(name) == []
    assert rcon("run", "--in", name, "--pids", "8", "--", "sh", "-c", LIMITS).out.split().count("8") == 1
    assert left(name) == []


def test_kill_9_of_a_command_that_is_not_the_last(name: str, tmp_path: Path) -> None:
    """What it started stays within the limits of the group, and ends with the last command."""
    script = (
        f"setsid sh -c 'echo $$ > {tmp_path}/orphan; exec sleep 1000' & echo $$ > {tmp_path}/one; sleep 1000"
    )
    words = ("run", "--in", name, "--pids", "9", "--", "sh", "-c", script)
    with running(*words, ready=tmp_path / "one") as first:
        until((tmp_path / "orphan").exists, "the orphan")
        with running(*staying(name, tmp_path / "two", "--pids", "9"), ready=tmp_path / "two") as second:
            os.kill(first, signal.SIGKILL)
            os.waitpid(first, 0)
            until(lambda: not alive(int((tmp_path / "one").read_text())), "the kernel kills its command")
            orphan = int((tmp_path / "orphan").read_text())
            assert alive(orphan)
            assert f"/rcon-in-{name}/" in Path(f"/proc/{orphan}/cgroup").read_text()
            os.kill(second, signal.SIGTERM)
            os.waitpid(second, 0)
            until(lambda: not alive(orphan), "the last command ends it")
    assert left(name) == []


def test_kill_9_of_the_last_command(name: str, tmp_path: Path) -> None:
    """The next command removes the group: one of its own, one that makes it anew with other limits, and rcon gc."""
    nexts = (
        ("run", "--", "true"),
        ("run", "--in", name, "--pids", "8", "--", "sh", "-c", LIMITS),
        ("gc",),
    )
    for number, words in enumerate(nexts):
        ready = tmp_path / str(number)
        with running(*staying(name, ready, "--pids", "9"), ready=ready) as command:
            os.kill(command, signal.SIGKILL)
            os.waitpid(command, 0)
            pid = int(ready.read_text())
            until(partial(_has_ended, pid), "the kernel kills its command")
        assert left(name)
        done = rcon(*words)
        assert done.status == 0, done
        assert left(name) == []
        assert "9" not in done.out.split()


def _has_ended(pid: int) -> bool:
    return not alive(pid)


@pytest.mark.once
def test_commands_that_join_and_leave_at_once_are_always_limited(name: str) -> None:
    """Four processes run one command after the other. Each is the first, the last, or between them by chance."""
    rounds = 5 if "RCON_TEST_EMULATED" in os.environ else 15
    workers = []
    for _ in range(4):
        reading, writing = os.pipe()
        pid = os.fork()
        if pid == 0:
            found = []
            for _ in range(rounds):
                done: Done = rcon("run", "--in", name, "--pids", "77", "--", "sh", "-c", LIMITS)
                found.append((done.status, done.out.split().count("77"), done.err))
            os.write(writing, json.dumps(found).encode())
            os._exit(0)
        os.close(writing)
        workers.append((pid, reading))
    for pid, reading in workers:
        data = b""
        while piece := os.read(reading, 65536):
            data += piece
        os.close(reading)
        assert os.waitpid(pid, 0)[1] == 0
        assert json.loads(data) == [[0, 1, ""]] * rounds
    assert left(name) == []


@pytest.mark.once
def test_the_limits_of_a_policy_are_shared(name: str, tmp_path: Path) -> None:
    """The limits of the policy are those of all commands together; `each` has those of one."""
    settings = tmp_path / "rcon.toml"
    settings.write_text('[policy.batch]\npids = 44\neach = { pids = 33, timeout = "60s" }\n')
    words = ("run", "--in", name, "--policy", "batch", "--settings", str(settings), "--", "sh", "-c")
    with running(*words, f"touch {tmp_path}/one; sleep 1000", ready=tmp_path / "one"):
        out = rcon(*words, LIMITS).out.split()
        assert (out.count("44"), out.count("33")) == (1, 1)
        assert rcon("run", "--in", name, "--pids", "44", "--", "true").status == 0
        groups = json.loads(rcon("ls", "--json").out)
        shared = [one for one in groups if one["name"] == name]
        assert [(one["kind"], one["limits"]["pids"], one["processes"]) for one in shared] == [
            ("shared", 44, 2)
        ]
    settings.write_text('[policy.batch]\nmemory = { limit = "64M", expand = "2x", up_to = "1G" }\n')
    done = rcon(*words, "true")
    assert done.status == 2
    assert done.err.startswith("rcon: --in: policy batch has memory that expands, ")


@pytest.mark.once
def test_the_other_commands_know_the_group(name: str, tmp_path: Path) -> None:
    ready = tmp_path / "one"
    with running(*staying(name, ready, "--pids", "9", "--memory", "64M"), ready=ready) as command:
        pid = int(ready.read_text())
        stat = json.loads(rcon("stat", "--json", name).out)
        assert (stat["kind"], stat["owner"]["pid"], stat["tally"]) == ("shared", command, None)
        assert [one["pid"] for one in stat["processes"]] == [pid]
        assert "shared: commands of rcon run --in" in rcon("stat", name).out
        assert rcon("set", name, "--pids", "8").out == f"{name}: memory 64M{_no_swap()}, pids 8\n"
        top = json.loads(rcon("top", "--json", "--iterations", "1").out)
        assert [one["pids_limit"] for one in top["groups"] if one["group"] == name] == [8]
        assert rcon("freeze", name).status == 0
        assert rcon("thaw", name).status == 0
        assert "in use" in rcon("run", "--group", name, "--", "true").err
        assert json.loads(rcon("kill", "--json", name).out)["killed"][0]["pid"] == pid
        os.waitpid(command, 0)
    assert left(name) == []


def _no_swap() -> str:
    return ", swap 0" if _is_v2() else ""


@pytest.mark.once
@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--expand", "2x", "--up-to", "1G", "--memory", "64M"), "--expand does not go with --in"),
        (("--on-event", "true", "--memory", "64M"), "--on-event does not go with --in"),
    ],
)
def test_options_that_watch_one_command_are_refused(name: str, options: tuple[str, ...], said: str) -> None:
    done = rcon("run", "--in", name, *options, "--", "true")
    assert done.status == 2
    assert done.err.startswith(
        f"rcon: {said}: it watches a group of one command (leave it out; rcon watch {name} "
    )


@pytest.mark.once
def test_the_name_of_a_group_of_one_command_is_refused(name: str, tmp_path: Path) -> None:
    words = ("run", "--group", name, "--", "sh", "-c", f"touch {tmp_path}/one; sleep 1000")
    with running(*words, ready=tmp_path / "one"):
        done = rcon("run", "--in", name, "--pids", "9", "--", "true")
        assert done.status == 2
        assert "cannot be shared (choose another name" in done.err


def test_inside_another_group_the_group_is_inside_too(name: str, tmp_path: Path) -> None:
    """A command that is held to limits cannot join a group outside of them, also one of the same name."""
    with running(*staying(name, tmp_path / "one", "--pids", "9"), ready=tmp_path / "one"):
        inner = f"{RCON} run --in {name} --pids 7 -- sh -c '{LIMITS.replace(chr(39), chr(39) + chr(92) + chr(39) * 2)}'"
        done = rcon("run", "--pids", "60", "--", "sh", "-c", inner)
        assert done.status == 0, done.err
        out = done.out.split()
        assert (out.count("7"), out.count("60"), out.count("9")) == (1, 1, 0)


@pytest.mark.once
def test_another_user_does_not_join(name: str, tmp_path: Path) -> None:
    with running(*staying(name, tmp_path / "one", "--pids", "9"), ready=tmp_path / "one"):
        words = ("run", "--json", "-", "--in", name, "--pids", "9", "--", "true")
        done = rcon(*words, before=_become_nobody)
        assert done.status == 125
        assert done.err.startswith("rcon: ")
        assert json.loads(done.out)["outcome"] == "refused"


def _become_nobody() -> None:
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)


@pytest.mark.once
def test_a_user_that_is_changed_to_shares_the_group(name: str, tmp_path: Path) -> None:
    """Root makes the group; the commands run as another user."""
    with running(*staying(name, tmp_path / "one", "--pids", "9"), ready=tmp_path / "one"):
        done = rcon("run", "--in", name, "--user", "nobody", "--", "sh", "-c", LIMITS)
        assert (done.status, done.out.split().count("9")) == (0, 1)


@pytest.mark.once
def test_root_does_not_join_the_group_of_another_user(name: str, tmp_path: Path) -> None:
    """That user could kill and freeze what is in it."""
    with running(*staying(name, tmp_path / "one", "--pids", "9"), ready=tmp_path / "one"):
        theirs = left(name)
        for directory in theirs:
            os.chown(directory, NOBODY, NOBODY)
        try:
            done = rcon("run", "--in", name, "--pids", "9", "--", "true")
            assert done.status == 125
            assert f"the group {name} belongs to uid {NOBODY}" in done.err
            assert "choose another name" in done.err
        finally:
            for directory in theirs:
                os.chown(directory, 0, 0)


def test_io_limits_are_shared(name: str, tmp_path: Path) -> None:
    limits = ("--write", "5M", "--device", str(DISK))
    with running(*staying(name, tmp_path / "one", *limits), ready=tmp_path / "one"):
        assert rcon("run", "--in", name, *limits, "--", "true").status == 0
        assert rcon("run", "--in", name, "--write", "6M", "--device", DISK, "--", "true").status == 2
    assert left(name) == []


@pytest.mark.once
def test_with_a_base_of_its_own(name: str, base: Cgroup, tmp_path: Path) -> None:
    """Groups of the same name in two bases are two groups; a third command has to choose."""
    here = (*("run", "--cgroup", base.path, "--in", name), "--pids", "9", "--", "sh", "-c")
    with running(*here, f"touch {tmp_path}/one; sleep 1000", ready=tmp_path / "one"):
        assert rcon("run", "--in", name, "--pids", "9", "--", "true").status == 0
        there = ("run", "--cgroup", "/rcon", "--in", name, "--pids", "8", "--", "sh", "-c")
        with running(*there, f"touch {tmp_path}/two; sleep 1000", ready=tmp_path / "two"):
            done = rcon("run", "--in", name, "--", "true")
            assert done.status == 125
            assert f"2 groups have the name {name}: " in done.err
            assert "choose one: rcon run --cgroup " in done.err
    assert left(name) == []
    assert base.children() == []


@pytest.mark.layout("v2")
def test_in_a_cgroup_of_its_own(name: str, base: Cgroup, tmp_path: Path) -> None:
    """In a delegated cgroup the first command moves itself out of the way, and back at its end."""
    home = base.child("home").create()

    def enter() -> None:
        home.enter_process()

    words = ("run", "--cgroup", home.path, "--in", name, "--pids", "9", "--", "sh", "-c")
    done = rcon(*words, LIMITS, before=enter)
    assert (done.status, done.out.split().count("9")) == (0, 1), done
    assert home.children() == []


@pytest.mark.once
def test_a_lock_that_another_user_holds_does_not_block_for_ever(name: str) -> None:
    hierarchy = Hierarchy.discover()
    with subprocess.Popen(
        ["flock", hierarchy.limit_mounts[0].path, "sleep", "1000"], start_new_session=True
    ) as holder:
        try:
            time.sleep(0.5)
            began = time.monotonic()
            assert rcon("run", "--in", name, "--pids", "9", "--", "true").status == 0
            assert 10 < time.monotonic() - began < 60
        finally:
            os.killpg(holder.pid, signal.SIGKILL)
    assert left(name) == []
