"""rcon set, freeze, thaw and kill, on groups in use."""

from __future__ import annotations

import json
import os
import signal
import time

import pytest

from rcon_plugins.cli.rcon import run_main
from rcon_plugins.errors import KernelError
from rcon_plugins.kernel.cgroup import MAX, Cgroup, IoMax, Resources, change_limits, device_of, read_limits
from rcon_plugins.tree.instance import Instance
from tests.kernel.cgroup.helpers import (
    DISK,
    MIB,
    eventually,
    layout,
    running,
    settings_of,
    sleep_forever,
    write_directly,
)
from tests.kernel.command.harness import rcon

pytestmark = pytest.mark.each_layout

LIMITS = Resources(cpu_quota=0.5, memory_max=64 * MIB, pids_max=8)


@pytest.fixture
def command(instance: Instance, own: str) -> Cgroup:
    """A group as a command has it: its process is in the leaf main."""
    together = instance.policy_cgroup(f"{own}-command").create()
    instance.executor_cgroup(f"{own}-command", "main").create()
    together.configure(LIMITS)
    return together


def hold(size: int) -> None:
    held = bytearray(size)
    held[::4096] = b"x" * len(held[::4096])
    sleep_forever()


def said(capsys: pytest.CaptureFixture[str], arguments: list[str], status: int = 0) -> tuple[str, str]:
    capsys.readouterr()
    found = run_main(arguments)
    out, err = capsys.readouterr()
    assert found == status, err
    return out, err


@pytest.mark.smoke
def test_limits_are_set_live(command: Cgroup, own: str, capsys: pytest.CaptureFixture[str]) -> None:
    out, err = said(
        capsys,
        ["set", f"{own}-command", "--cpu", "30%", "--memory", "128M", "--pids", "max", "--cpu-weight", "50"],
    )
    swap = ", swap 0" if layout() == "v2" else ""  # v1 has no such limit without swap on the machine
    assert out == f"{own}-command: cpu 30%, cpu-weight 50, memory 128M{swap}\n"
    assert err == ""
    after = read_limits(command)
    assert (after.cpu_quota, after.memory_max, after.pids_max, after.cpu_weight) == (0.3, 128 * MIB, MAX, 50)


@pytest.mark.once
def test_as_json(command: Cgroup, own: str, capsys: pytest.CaptureFixture[str]) -> None:
    told = json.loads(said(capsys, ["set", f"{own}-command", "--pids", "5", "--json"])[0])
    assert told["group"] == f"{own}-command"
    assert (told["before"]["pids"], told["limits"]["pids"], told["limits"]["memory"]) == (8, 5, 64 * MIB)
    assert told["notes"] == []


def test_a_cpu_burst_is_checked_against_the_quota_in_force(
    command: Cgroup, own: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out, _ = said(capsys, ["set", f"{own}-command", "--cpu-burst", "30ms"])
    assert "cpu 50%, cpu-burst 30ms, " in out
    _, err = said(capsys, ["set", f"{own}-command", "--cpu-burst", "60ms"], 2)
    assert err.startswith("rcon: --cpu-burst: 60ms is more than cpu = 50% allows in a period of 100 ms (")
    assert read_limits(command).cpu_burst == 0.03
    out, _ = said(capsys, ["set", f"{own}-command", "--cpu-burst", "0ms"])
    assert "cpu-burst" not in out


def test_io_limits_come_and_go(command: Cgroup, own: str, capsys: pytest.CaptureFixture[str]) -> None:
    disk = device_of(str(DISK))
    out, _ = said(
        capsys, ["set", f"{own}-command", "--write", "5M", "--read-iops", "100", "--device", str(DISK)]
    )
    assert out.endswith(f", pids 8, write 5M on {disk}, read-iops 100 on {disk}\n")
    said(capsys, ["set", f"{own}-command", "--write", "max", "--device", str(disk)])
    assert read_limits(command).io == {disk: IoMax(MAX, MAX, 100, MAX)}
    said(capsys, ["set", f"{own}-command", "--read-iops", "max", "--read", "2M", "--device", str(disk)])
    assert read_limits(command).io == {disk: IoMax(2 * MIB, MAX, MAX, MAX)}


@pytest.mark.measures
def test_limits_that_were_set_live_hold(command: Cgroup, instance: Instance, own: str) -> None:
    """Of a busy group and of one that writes, as measured by the kernel in one window.

    Limits of IO hold also on v1, where they would not for processes in a leaf; and the leaf is whole again after them.
    """
    main = instance.executor_cgroup(f"{own}-command", "main")
    busy = instance.policy_cgroup(f"{own}-busy").create()
    target = DISK / f"{own}-io"
    try:
        with (
            running(main, _write, str(target)) as child,
            running(instance.executor_cgroup(f"{own}-busy", "main").create(), _burn),
        ):
            assert run_main(["set", f"{own}-busy", "--cpu", "10%"]) == 0
            assert run_main(["set", f"{own}-command", "--write", "4M", "--device", str(DISK)]) == 0
            time.sleep(1)  # the kernel counts what the leaf did until that is really gone
            before, used = command.read().io_write_bytes or 0, busy.read().cpu_seconds or 0
            begin = time.monotonic()
            time.sleep(3)
            share = ((busy.read().cpu_seconds or 0) - used) / (time.monotonic() - begin)
            written = (command.read().io_write_bytes or 0) - before
            rate = written / (time.monotonic() - begin)
            assert child.pid in command.processes(subtree=True)
            assert run_main(["set", f"{own}-command", "--write", "max", "--device", str(DISK)]) == 0
            assert read_limits(command).io == {}
    finally:
        target.unlink()
    assert 0.05 < share < 0.15
    assert 2 * MIB < rate < 6 * MIB
    assert main.exists()
    assert main.read().io_write_bytes is not None


def _burn() -> None:
    while True:
        pass


def _write(path: str) -> None:
    while True:
        write_directly(path, 1 * MIB)


@pytest.mark.layout("hybrid", "v1")
def test_io_limits_that_came_too_late_for_a_server_are_refused(
    instance: Instance, own: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its executors keep the files open that they are read by."""
    together = instance.policy_cgroup(f"{own}~a.example").create()
    with running(instance.executor_cgroup(f"{own}~a.example", "1").create(), sleep_forever):
        _, err = said(capsys, ["set", f"{own}~a.example", "--write", "4M", "--device", str(DISK)], 125)
        assert "set the limits before they run" in err
        assert read_limits(together).io == {}


BAD = [
    ([], "no limit given"),
    (["--cpu", "junk"], "--cpu: 'junk' is not a share of CPU time"),
    (["--memory", "512MB"], "--memory: '512MB' is not a size (write \"512M\""),
    (["--memory", "1"], "--memory: 1 bytes are less than one page"),
    (["--pids", "-1"], "--pids: '-1' is not a whole number"),
    (["--pids", "0"], "--pids: "),
    (["--cpus", "4000"], "--cpus: CPUs 4000 do not exist"),
    (["--cpus", "max"], "--cpus: 'max' is not a list of CPUs"),
    (["--device", "/"], "--device limits nothing by itself"),
    (["--write", "5M", "--device", "/no/such/path"], "--device: /no/such/path"),
    (["--write", "max", "--device", "/no/such/path"], "--device: /no/such/path"),
    (["--write", "5M", "--device", ""], "--device: the path is empty"),
    (["--expand", "2x", "--up-to", "1G"], "--expand works only with rcon run"),
    (["--pids", "5", "--memory", "5"], "--memory: "),
    (["--memoory", "5M"], "--memoory"),
]


@pytest.mark.once
@pytest.mark.parametrize(
    ("options", "says"), BAD, ids=lambda one: " ".join(one) if isinstance(one, list) else ""
)
def test_bad_input_changes_nothing(
    command: Cgroup, own: str, options: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = read_limits(command)
    out, err = said(capsys, ["set", f"{own}-command", *options], 2)
    assert (out, err.count("\n")) == ("", 1)
    assert says in err
    assert read_limits(command) == before


@pytest.mark.layout("v2")
def test_memory_high(command: Cgroup, own: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Checked against the limit that is in force, and taken away."""
    said(capsys, ["set", f"{own}-command", "--memory-high", "32M"])
    assert read_limits(command).memory_high == 32 * MIB
    _, err = said(capsys, ["set", f"{own}-command", "--memory-high", "70M"], 2)
    assert "--memory-high: 70M is never reached under memory = 64M" in err
    said(capsys, ["set", f"{own}-command", "--memory-high", "max"])
    assert read_limits(command).memory_high is MAX


@pytest.mark.layout("hybrid", "v1")
def test_more_memory_where_swap_is_limited(command: Cgroup, own: str) -> None:
    """v1 has a limit for the sum, which has to be raised first."""
    change_limits(command, Resources(memory_max=64 * MIB, swap_max=0))
    for size in (128, 32, 64):
        assert run_main(["set", f"{own}-command", "--memory", f"{size}M"]) == 0
        assert settings_of(command, "memory.limit_in_bytes") == str(size * MIB)
        assert read_limits(command).swap_max == 0
    assert run_main(["set", f"{own}-command", "--swap", "16M"]) == 0
    assert settings_of(command, "memory.memsw.limit_in_bytes") == str(80 * MIB)


@pytest.mark.layout("hybrid", "v1")
def test_memory_below_what_is_in_use_is_refused_on_v1(
    command: Cgroup, instance: Instance, own: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """And the limits that were written before it are those of before again."""
    with running(instance.executor_cgroup(f"{own}-command", "main"), hold, 40 * MIB) as child:
        eventually(lambda: (command.read().memory_current or 0) > 40 * MIB)
        before = read_limits(command)
        _, err = said(capsys, ["set", f"{own}-command", "--cpu", "20%", "--cpus", "0", "--memory", "8M"], 125)
        assert "the kernel could not reclaim it: all limits stay as they were" in err
        assert read_limits(command) == before
        assert child.status is None


@pytest.mark.layout("v2")
def test_memory_below_what_is_in_use_kills_on_v2(
    command: Cgroup, instance: Instance, own: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with running(instance.executor_cgroup(f"{own}-command", "main"), hold, 40 * MIB) as child:
        eventually(lambda: (command.read().memory_current or 0) > 40 * MIB)
        out, err = said(capsys, ["set", f"{own}-command", "--memory", "8M"])
        assert child.wait() == -signal.SIGKILL
    assert "memory 8M" in out
    assert "of memory was in use: the kernel reclaimed what it could and killed 1 process" in err


def test_a_server_may_write_its_limits_again(
    instance: Instance, own: str, capsys: pytest.CaptureFixture[str]
) -> None:
    instance.policy_cgroup(f"{own}~a.example").create()
    _, err = said(capsys, ["set", f"{own}~a.example", "--pids", "5"])
    assert err.startswith(f"rcon: note: the group belongs to a server, pid {os.getpid()} (")
    assert "may write the limits of its policy again" in err


def test_groups_of_threads_have_what_their_server_gave_them(
    instance: Instance, own: str, capsys: pytest.CaptureFixture[str]
) -> None:
    threaded = instance.threaded(f"{own}-web").create(threaded=True, controllers=frozenset({"cpu"}))
    try:
        said(capsys, ["set", f"{own}-web", "--cpu", "20%"])
        assert read_limits(threaded).cpu_quota == 0.2
        _, err = said(capsys, ["set", f"{own}-web", "--memory", "20M"], 2)
        assert f"{own}-web holds threads of a server, for which only " in err
        for verb, done in (("freeze", "frozen"), ("thaw", "thawed"), ("kill", "killed")):
            _, err = said(capsys, [verb, f"{own}-web"], 2)
            assert f"cannot be {done} without the server" in err
            assert f"stop the server, pid {os.getpid()}" in err
    finally:
        threaded.delete()


def test_all_limits_are_changed_or_none(command: Cgroup) -> None:
    """Also where the kernel refuses one that came late."""
    before = read_limits(command)
    with pytest.raises(KernelError):
        change_limits(command, Resources(cpu_quota=0.2, cpu_weight=7, cpus="0,4000", pids_max=3))
    assert read_limits(command).cpu_weight == before.cpu_weight
    assert read_limits(command).cpu_quota == before.cpu_quota


def test_freeze_and_thaw(
    command: Cgroup, instance: Instance, own: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with running(instance.executor_cgroup(f"{own}-command", "main"), _burn):
        out, _ = said(capsys, ["freeze", f"{own}-command"])
        assert out == f"{own}-command: 1 process frozen (rcon thaw {own}-command resumes them)\n"
        used = command.read().cpu_seconds
        time.sleep(0.2)
        assert command.read().cpu_seconds == used
        said(capsys, ["freeze", f"{own}-command"])
        out, _ = said(capsys, ["thaw", f"{own}-command"])
        assert out == f"{own}-command: 1 process resumed\n"
        eventually(lambda: (command.read().cpu_seconds or 0) > (used or 0))


def test_kill_kills_all_processes_and_lists_them(
    command: Cgroup, instance: Instance, own: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with running(instance.executor_cgroup(f"{own}-command", "main"), _family) as child:
        eventually(lambda: len(command.processes(subtree=True)) == 3)
        pids = command.processes(subtree=True)
        told = json.loads(said(capsys, ["kill", "--json", f"{own}-command"])[0])
        assert command.processes(subtree=True) == []
        assert child.wait() == -signal.SIGKILL
    assert told["group"] == f"{own}-command"
    assert sorted(one["pid"] for one in told["killed"]) == pids
    out, _ = said(capsys, ["kill", f"{own}-command"])
    assert out == f"{own}-command: 0 processes killed\n"


def _family() -> None:
    """With a child in a session of its own, and one whose parent has ended."""
    for _ in range(2):
        if os.fork() == 0:
            os.setsid()
            sleep_forever()
    sleep_forever()


@pytest.mark.parametrize("verb", ["freeze", "kill"])
def test_not_from_within(command: Cgroup, instance: Instance, own: str, verb: str) -> None:
    """A command that froze itself could not say so, nor be thawed by the one who waits for it."""
    main = instance.executor_cgroup(f"{own}-command", "main")
    done = rcon(verb, f"{own}-command", before=main.enter_process)
    assert done.status == 2, done.err
    assert "holds this rcon itself" in done.err
    assert not (command.processes(subtree=True))
