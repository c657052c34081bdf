"""The budget of a machine: its settings, and its ledger across processes and threads."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest

from rcon_plugins.confinement.budget import UNIT, MemoryBudget, machine_ledger, open_ledger
from rcon_plugins.confinement.plan import Plan
from rcon_plugins.errors import KernelError, SettingsError
from rcon_plugins.kernel.cgroup import Hierarchy, Refusal
from rcon_plugins.settings.budget import Portion, promised
from rcon_plugins.settings.file import from_mapping
from rcon_plugins.settings.policy import Policy
from rcon_plugins.tree.locks import ByteLocks
from tests.children import in_child
from tests.directories import let_others_read

WHOLE = 10 * UNIT


def budget_in(tmp_path: Path, whole: int = WHOLE) -> MemoryBudget:
    return MemoryBudget(ByteLocks(open_ledger(str(tmp_path / "rcon"))), whole, wait=0)


@pytest.fixture
def budget(tmp_path: Path) -> MemoryBudget:
    return budget_in(tmp_path)


def settings(budget: dict[str, Any], **policies: dict[str, Any]) -> dict[str, Any]:
    return {"budget": budget, "policy": policies or {"default": {"memory": "64M"}}}


@pytest.mark.parametrize(
    ("written", "total", "size"),
    [
        ("80%", 1000, 800),
        ("100%", 7, 7),
        ("12.5%", 800, 100),
        ("6G", 1, 6 * 2**30),
        (2**30, 1, 2**30),
    ],
)
def test_portions(written: object, total: int, size: int) -> None:
    portion = Portion.parse(written)
    assert portion.of(total) == size
    assert Portion.parse(str(portion)) == portion


@pytest.mark.parametrize("written", ["0%", "101%", "%", "-1%", "80", "1K", 0, "80 %", "6GB", None, True])
def test_invalid_portions_are_refused(written: object) -> None:
    with pytest.raises(SettingsError) as caught:
        from_mapping(settings({"memory": written}))
    assert caught.value.key == "budget.memory"
    assert caught.value.hint


def test_settings() -> None:
    found = from_mapping(settings({"memory": "80%", "wait": "30s"})).budget
    assert found is not None
    assert (found.memory, found.wait) == ("80%", 30.0)
    assert from_mapping({"policy": {"default": {"pids": 1}}}).budget is None
    with pytest.raises(SettingsError, match=r"budget\.waits: unknown key \(did you mean 'wait'"):
        from_mapping(settings({"memory": "80%", "waits": "30s"}))
    with pytest.raises(SettingsError, match="the key 'memory' is missing"):
        from_mapping(settings({"wait": "30s"}))


def test_the_memory_that_one_request_reserves() -> None:
    expanding = {"limit": "64M", "expand": "2x", "up_to": "1G"}
    assert promised(Policy.make("p", memory="1G", each={"memory": "64M"})) == 64 * UNIT
    assert promised(Policy.make("p", memory="1G")) == 1024 * UNIT
    assert promised(Policy.make("p", memory="2G", each={"memory": expanding})) == 1024 * UNIT
    assert promised(Policy.make("p", pids=3)) is None


@pytest.mark.parametrize(
    ("policy", "key"),
    [
        ({"memory": "64M"}, "memory"),
        ({"memory": "1G", "each": {"memory": "64M"}}, "each.memory"),
        ({"memory": {"limit": "1M", "expand": "2x", "up_to": "64M"}}, "memory.up_to"),
    ],
)
def test_a_policy_that_never_fits_is_refused(policy: dict[str, Any], key: str) -> None:
    with pytest.raises(SettingsError, match="64M never fits: the whole budget is 63M here") as caught:
        Plan.make(from_mapping(settings({"memory": "63M"}, p=policy))).check()
    assert caught.value.key == f"policy.p.{key}"
    Plan.make(from_mapping(settings({"memory": "64M"}, p=policy))).check()


def test_a_policy_without_memory_is_reported() -> None:
    given = settings({"memory": "64M"}, p={"memory": "1M"}, q={"pids": 9})
    (warning,) = [one for one in Plan.make(from_mapping(given)).warnings(0) if "budget" in one]
    assert warning.startswith("policy q: ")


def test_policies_whose_memory_does_not_bound_swap_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    policies = {"p": {"memory": "1M"}, "q": {"pids": 9}, "r": {"each": {"memory": "1M"}}}
    plan = Plan.make(from_mapping({"policy": policies}))
    assert not [one for one in plan.warnings(0) if "swap" in one]
    gap = Refusal("swap_max", "swap is not accounted for", "turn swap off")
    monkeypatch.setattr(type(plan.hierarchy), "swap_gap", lambda _: gap)
    (warning,) = [one for one in plan.warnings(0) if "swap" in one]
    assert warning == (
        "policies p, r: memory limits do not bound swap: swap is not accounted for. Remedy: turn swap off."
    )


def test_the_memory_of_the_machine() -> None:
    total = int(Path("/proc/meminfo").read_text().split()[1]) * 1024
    assert 0 < Hierarchy.discover().usable_memory() <= total


def test_memory_runs_out_and_is_released(budget: MemoryBudget) -> None:
    six = budget.reserve(6 * UNIT)
    assert six is not None
    assert budget.reserve(5 * UNIT) is None
    four = budget.reserve(3 * UNIT + 1)  # counts as four whole units
    assert four is not None
    assert budget.reserve(1) is None
    budget.release(six)
    budget.release(six)
    assert budget.reserve(6 * UNIT) is not None
    assert budget.reserve(1) is None


def test_free_memory_need_not_be_contiguous(budget: MemoryBudget) -> None:
    held = [budget.reserve(UNIT) for _ in range(10)]
    for number in (1, 4, 8):
        allocation = held[number]
        assert allocation is not None
        budget.release(allocation)

    def other() -> tuple[bool, list[tuple[int, int]], bool]:
        refused = budget.reserve(4 * UNIT) is None
        allocation = budget.reserve(3 * UNIT)
        return refused, allocation.ranges if allocation else [], budget.reserve(1) is None

    assert in_child(other) == (True, [(1, 2), (4, 5), (8, 9)], True)


def test_processes_share_the_budget_and_release_it_however_they_end(
    budget: MemoryBudget, tmp_path: Path
) -> None:
    held = budget.reserve(4 * UNIT)
    assert held is not None
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            budget.release(held)  # has no effect: the parent made the reservation
            answers = [budget.reserve(7 * UNIT) is None, budget.reserve(6 * UNIT) is not None]
            os.write(writing, b"y" if all(answers) else b"n")
            signal.pause()
        finally:
            os._exit(1)
    try:
        assert os.read(reading, 1) == b"y"
        assert budget.reserve(UNIT) is None

        # Another program that opens the file by name sees the same reservations.
        assert in_child(lambda: budget_in(tmp_path).reserve(UNIT) is None)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(reading)
        os.close(writing)
    assert budget.reserve(6 * UNIT) is not None


def test_threads_never_reserve_the_same_memory(tmp_path: Path) -> None:
    budget = budget_in(tmp_path, WHOLE * 100)
    taken: list[Any] = []

    def some() -> None:
        for _ in range(50):
            allocation = budget.reserve(3 * UNIT)
            assert allocation is not None
            taken.append(allocation)

    threads = [threading.Thread(target=some) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    units = [unit for allocation in taken for start, end in allocation.ranges for unit in range(start, end)]
    assert len(units) == len(set(units)) == 600
    assert max(units) < 1000


def test_a_ledger_that_others_can_lock_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "rcon"
    os.close(open_ledger(str(folder)))
    account = folder / "budget"
    assert (folder.stat().st_mode & 0o777, account.stat().st_mode & 0o777) == (0o700, 0o600)

    account.chmod(0o666)
    with pytest.raises(KernelError, match="open to other users"):
        open_ledger(str(folder))
    account.unlink()
    account.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(KernelError, match="symbolic links"):
        open_ledger(str(folder))
    assert not (tmp_path / "elsewhere").exists()
    account.unlink()
    os.mkfifo(account, 0o600)
    with pytest.raises(KernelError, match="not a regular file with one name"):
        open_ledger(str(folder))
    account.unlink()
    (folder / "second").write_text("")
    os.link(folder / "second", account)
    with pytest.raises(KernelError, match="not a regular file with one name"):
        open_ledger(str(folder))

    folder.chmod(0o777)
    with pytest.raises(KernelError, match="open to other users"):
        open_ledger(str(folder))
    (tmp_path / "link").symlink_to(folder)
    with pytest.raises(KernelError):
        open_ledger(str(tmp_path / "link"))
    with pytest.raises(KernelError, match="XDG_RUNTIME_DIR"):
        open_ledger(str(tmp_path / "nowhere" / "rcon"))


def test_a_folder_of_another_user_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "rcon"
    folder.mkdir(mode=0o700)
    os.chown(folder, 12345, 12345)
    with pytest.raises(KernelError, match="belongs to the user 12345"):
        open_ledger(str(folder))


def test_a_process_keeps_its_ledger_when_it_changes_its_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    tmp_path.chmod(0o777)

    def program() -> tuple[bool, bool, bool]:
        os.setegid(12345)
        os.seteuid(12345)
        first = machine_ledger()
        os.seteuid(0)
        os.setresuid(12346, 12346, 12346)
        second = machine_ledger()
        allocation = second.reserve(1, 10)
        return first is second, allocation is not None, (tmp_path / "rcon").stat().st_uid == 12345

    let_others_read(tmp_path.parent)
    assert in_child(program) == (True, True, True)
