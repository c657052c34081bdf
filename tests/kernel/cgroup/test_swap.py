"""A limit of memory allows no swap unless swap is set, where swap is accounted; both move together."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from rcon_plugins.confinement.expansion import expand
from rcon_plugins.kernel.cgroup import (
    MAX,
    Cgroup,
    Hierarchy,
    Refusal,
    Resources,
    change_limits,
    read_limits,
    swap,
)
from rcon_plugins.settings.memory import Memory
from tests.kernel.cgroup.helpers import DISK, MIB, layout, running, settings_of, touch
from tests.kernel.command.harness import rcon
from tests.kernel.executors.service import ask, managing

pytestmark = pytest.mark.each_layout

SWAP_MIB = 128


@pytest.fixture
def has_swap(monkeypatch: pytest.MonkeyPatch) -> None:
    """v1 limits swap only on a machine that has some. The files are the kernel's all the same."""
    monkeypatch.setattr(swap, "present", lambda: True)


@pytest.fixture
def swap_file() -> Iterator[None]:
    """Swap on a file of the emulated machine."""
    file = DISK / "swap"
    with file.open("wb") as image:
        for _ in range(SWAP_MIB):
            image.write(bytes(MIB))
    file.chmod(0o600)
    subprocess.run(["mkswap", str(file)], check=True, stdout=subprocess.DEVNULL)
    subprocess.run(["swapon", str(file)], check=True)
    yield
    subprocess.run(["swapoff", str(file)], check=True)
    file.unlink()


def is_peak(swap_peak: int | None) -> bool:
    """Return whether this is the peak of a program with 64 MiB within 50 MiB, as far as the kernel can tell.

    cgroup v2 before Linux 6.5 tells only what is in swap when that is read, at the end.
    """
    version = tuple(int(number) for number in os.uname().release.split(".")[:2])
    if layout() == "v2" and version < (6, 5):
        return swap_peak is None or 0 < swap_peak < 50 * MIB
    return swap_peak is not None and 8 * MIB < swap_peak < 50 * MIB


def allows(group: Cgroup, memory: int, swap: int) -> None:
    """Check the kernel's own files."""
    if layout() == "v2":
        assert settings_of(group, "memory.max") == str(memory * MIB)
        assert settings_of(group, "memory.swap.max") == str(swap * MIB)
    else:
        assert settings_of(group, "memory.limit_in_bytes") == str(memory * MIB)
        assert settings_of(group, "memory.memsw.limit_in_bytes") == str((memory + swap) * MIB)


@pytest.mark.smoke
@pytest.mark.usefixtures("has_swap")
def test_a_limit_of_memory_alone_allows_no_swap(group: Cgroup) -> None:
    for memory in (64, 16, 128):
        group.configure(Resources(memory_max=memory * MIB))
        allows(group, memory, 0)
    group.configure(Resources(memory_max=32 * MIB, swap_max=8 * MIB))
    allows(group, 32, 8)


@pytest.mark.usefixtures("has_swap")
def test_a_changed_limit_of_memory_keeps_the_swap(group: Cgroup) -> None:
    change_limits(group, Resources(memory_max=64 * MIB))
    allows(group, 64, 0)
    for allowed in (0, 8):
        change_limits(group, Resources(swap_max=allowed * MIB))
        for memory in (128, 16, 64):
            change_limits(group, Resources(memory_max=memory * MIB))
            allows(group, memory, allowed)
    change_limits(group, Resources(swap_max=MAX))
    change_limits(group, Resources(memory_max=32 * MIB))
    assert read_limits(group).swap_max is MAX
    change_limits(group, Resources(swap_max=0))
    change_limits(group, Resources(memory_max=MAX))
    assert (read_limits(group).memory_max, read_limits(group).swap_max) == (MAX, MAX)


@pytest.mark.usefixtures("has_swap")
def test_swap_moves_with_memory_that_expands(group: Cgroup) -> None:
    for allowed in (0, 8):
        group.configure(Resources(memory_max=32 * MIB, swap_max=allowed * MIB))
        with_bound = expand(group, Memory(32 * MIB, 2.0, 128 * MIB))
        allows(group, 128, allowed)
        with_bound.take(Memory(64 * MIB, 2.0, 256 * MIB))
        allows(group, 256, allowed)
        with_bound.close()
        group.configure(Resources(memory_high=MAX) if layout() == "v2" else Resources())


@pytest.mark.layout("v1", "hybrid")
def test_a_limit_that_was_written_while_there_was_swap_can_be_raised(
    group: Cgroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(swap, "present", lambda: True)
    group.configure(Resources(memory_max=32 * MIB))
    monkeypatch.setattr(swap, "present", lambda: False)
    group.configure(Resources(memory_max=64 * MIB))
    allows(group, 64, 0)


@pytest.mark.layout("v1", "v2")
@pytest.mark.usefixtures("swap_file")
def test_memory_is_bounded_where_there_is_swap(group: Cgroup) -> None:
    unbounded, bounded, some = (group.child(name).create() for name in ("unbounded", "bounded", "some"))
    unbounded.configure(Resources(memory_max=32 * MIB, swap_max=MAX))
    with running(unbounded, touch, 64 * MIB) as child:
        assert child.result() == 64 * MIB  # the swap of this machine works
    bounded.configure(Resources(memory_max=32 * MIB))
    with running(bounded, touch, 64 * MIB) as child:
        assert child.wait() == -signal.SIGKILL
    some.configure(Resources(memory_max=32 * MIB, swap_max=64 * MIB))
    with running(some, touch, 64 * MIB) as child:
        assert child.result() == 64 * MIB
    with running(some, touch, 120 * MIB) as child:
        assert child.wait() == -signal.SIGKILL


@pytest.mark.layout("v1", "v2")
@pytest.mark.usefixtures("swap_file")
def test_a_command_is_bounded_where_there_is_swap(tmp_path: Path) -> None:
    greedy = ("--", sys.executable, "-c", "print(len(b'x' * (64 << 20)))")
    done = rcon("run", "--memory", "24M", *greedy)
    assert (done.status, done.report["outcome"]) == (137, "memory")
    done = rcon("run", "--memory", "100M", "--swap", "100M", *greedy)
    assert (done.status, done.out) == (0, f"{64 << 20}\n")
    for given in ((), ("--swap", "50M")):
        done = rcon("run", "--memory", "50M", *given, "--", sys.executable, "-c", "x = b'x' * (64 << 20)")
        assert done.report["outcome"] == ("ok" if given else "memory")
        assert done.report["usage"]["memory_peak"] <= 50 * MIB
    assert is_peak(done.report["usage"]["swap_peak"])
    settings = tmp_path / "rcon.toml"
    settings.write_text('[policy.job]\nmemory = "24M"\n')
    done = rcon("run", "--policy", "job", "--settings", settings, *greedy)
    assert (done.status, done.report["outcome"]) == (137, "memory")


@pytest.mark.layout("v1", "v2")
@pytest.mark.usefixtures("swap_file")
def test_the_usage_of_a_request_tells_its_swap() -> None:
    with managing({"each": {"memory": "50M", "swap": "50M", "timeout": "60s"}}) as manager:
        answer, outcome = ask(manager, "allocate", 64)
        assert (answer, outcome.ending) == (64, "ok")
        assert is_peak(outcome.usage.swap_peak)


def test_the_usage_says_no_swap_only_where_there_is_none() -> None:
    for usage in (
        rcon("run", "--memory", "64M", "--", "true").report["usage"],
        rcon("run", "--pids", "64", "--", "true").report["usage"],
    ):
        assert usage["swap_peak"] == (0 if usage["memory_peak"] is not None and not swap.present() else None)


def test_a_command_says_that_its_memory_limit_does_not_bound_swap() -> None:
    def no_accounting() -> None:
        gap = Refusal("swap_max", "swap is not accounted for", "turn swap off")
        setattr(Hierarchy, "swap_gap", lambda _: gap)  # noqa: B010 - in a fork of this process

    note = "rcon: note: the memory limit does not bound swap: swap is not accounted for (turn swap off)\n"
    assert rcon("run", "--memory", "64M", "--", "true", before=no_accounting).err == note
    assert rcon("run", "--pids", "64", "--", "true", before=no_accounting).err == ""
    assert rcon("run", "--memory", "64M", "--", "true").err == ""
