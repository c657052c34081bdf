"""The budget of a machine: what is written, and the account, across processes and threads."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest

from rcon_plugins.confinement.plan import Plan
from rcon_plugins.errors import KernelError, SettingsError
from rcon_plugins.kernel.cgroup import Hierarchy
from rcon_plugins.kernel.cgroup.machine import memory_of_machine
from rcon_plugins.settings.budget import Portion, promised
from rcon_plugins.settings.file import from_mapping
from rcon_plugins.settings.policy import Policy
from rcon_plugins.tree.ledger import UNIT, Ledger, ledger_of_machine, open_account
from tests.children import in_child
from tests.places import let_others_in

WHOLE = 10 * UNIT


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(open_account(str(tmp_path / "rcon")))


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
def test_what_is_no_portion(written: object) -> None:
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


def test_what_one_work_is_promised() -> None:
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


def test_a_policy_without_memory_is_told_of() -> None:
    given = settings({"memory": "64M"}, p={"memory": "1M"}, q={"pids": 9})
    (warning,) = [one for one in Plan.make(from_mapping(given)).warnings(0) if "budget" in one]
    assert warning.startswith("q: ")


def test_the_memory_of_the_machine() -> None:
    total = int(Path("/proc/meminfo").read_text().split()[1]) * 1024
    assert 0 < memory_of_machine(Hierarchy.discover()) <= total


def test_it_runs_out_and_comes_back(ledger: Ledger) -> None:
    six = ledger.take(6 * UNIT, WHOLE)
    assert six is not None
    assert ledger.take(5 * UNIT, WHOLE) is None
    four = ledger.take(3 * UNIT + 1, WHOLE)  # begun is counted whole
    assert four is not None
    assert ledger.take(1, WHOLE) is None
    ledger.give_back(six)
    ledger.give_back(six)
    assert ledger.take(6 * UNIT, WHOLE) is not None
    assert ledger.take(1, WHOLE) is None


def test_what_is_left_need_not_be_in_one_piece(ledger: Ledger) -> None:
    held = [ledger.take(UNIT, WHOLE) for _ in range(10)]
    for number in (1, 4, 8):
        share = held[number]
        assert share is not None
        ledger.give_back(share)

    def other() -> tuple[bool, list[tuple[int, int]], bool]:
        refused = ledger.take(4 * UNIT, WHOLE) is None
        share = ledger.take(3 * UNIT, WHOLE)
        return refused, share.ranges if share else [], ledger.take(1, WHOLE) is None

    assert in_child(other) == (True, [(1, 2), (4, 5), (8, 9)], True)


def test_processes_share_it_and_give_back_however_they_end(ledger: Ledger, tmp_path: Path) -> None:
    held = ledger.take(4 * UNIT, WHOLE)
    assert held is not None
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            ledger.give_back(held)  # it is its parent's
            answers = [ledger.take(7 * UNIT, WHOLE) is None, ledger.take(6 * UNIT, WHOLE) is not None]
            os.write(writing, b"y" if all(answers) else b"n")
            signal.pause()
        finally:
            os._exit(1)
    try:
        assert os.read(reading, 1) == b"y"
        assert ledger.take(UNIT, WHOLE) is None

        # Another program that opens it by name sees the same.
        assert in_child(lambda: Ledger(open_account(str(tmp_path / "rcon"))).take(UNIT, WHOLE) is None)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(reading)
        os.close(writing)
    assert ledger.take(6 * UNIT, WHOLE) is not None


def test_threads_are_never_promised_the_same(ledger: Ledger) -> None:
    taken: list[Any] = []

    def some() -> None:
        for _ in range(50):
            share = ledger.take(3 * UNIT, WHOLE * 100)
            assert share is not None
            taken.append(share)

    threads = [threading.Thread(target=some) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    units = [unit for share in taken for start, end in share.ranges for unit in range(start, end)]
    assert len(units) == len(set(units)) == 600
    assert max(units) < 1000


def test_nobody_elses_file(tmp_path: Path) -> None:
    folder = tmp_path / "rcon"
    os.close(open_account(str(folder)))
    account = folder / "budget"
    assert (folder.stat().st_mode & 0o777, account.stat().st_mode & 0o777) == (0o700, 0o600)

    account.chmod(0o666)
    with pytest.raises(KernelError, match="open to others"):
        open_account(str(folder))
    account.unlink()
    account.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(KernelError, match="symbolic links"):
        open_account(str(folder))
    assert not (tmp_path / "elsewhere").exists()
    account.unlink()
    os.mkfifo(account, 0o600)
    with pytest.raises(KernelError, match="no file of its own"):
        open_account(str(folder))
    account.unlink()
    (folder / "second").write_text("")
    os.link(folder / "second", account)
    with pytest.raises(KernelError, match="no file of its own"):
        open_account(str(folder))

    folder.chmod(0o777)
    with pytest.raises(KernelError, match="open to others"):
        open_account(str(folder))
    (tmp_path / "link").symlink_to(folder)
    with pytest.raises(KernelError):
        open_account(str(tmp_path / "link"))
    with pytest.raises(KernelError, match="XDG_RUNTIME_DIR"):
        open_account(str(tmp_path / "nowhere" / "rcon"))


def test_a_folder_of_another_user_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "rcon"
    folder.mkdir(mode=0o700)
    os.chown(folder, 12345, 12345)
    with pytest.raises(KernelError, match="belongs to the user 12345"):
        open_account(str(folder))


def test_one_for_a_process_also_as_another_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    tmp_path.chmod(0o777)

    def program() -> tuple[bool, bool, bool]:
        os.setegid(12345)
        os.seteuid(12345)
        first = ledger_of_machine()
        os.seteuid(0)
        os.setresuid(12346, 12346, 12346)
        second = ledger_of_machine()
        share = second.take(UNIT, WHOLE)
        return first is second, share is not None, (tmp_path / "rcon").stat().st_uid == 12345

    let_others_in(tmp_path.parent)
    assert in_child(program) == (True, True, True)
