"""The budget of the machine, with managers as servers have them."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from rcon_plugins.confinement import budget
from rcon_plugins.errors import ConcurrencyLimitExceeded, ConfinementError
from rcon_plugins.work import Work
from tests.children import in_child
from tests.kernel.executors.service import ask, begin, end, managing

pytestmark = pytest.mark.each_layout

POLICY = {"memory": "1G", "each": {"memory": "60M", "timeout": "60s"}}
BUDGET = {"budget": {"memory": "100M", "wait": "300ms"}}


@pytest.fixture(autouse=True)
def account(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An account of this test's own: that of the machine may be in use."""
    monkeypatch.setattr(budget, "_folder", lambda: str(tmp_path / "rcon"))


def budgeted(policy: dict[str, Any] | None = None, **settings: Any) -> Any:
    return managing(policy or POLICY, settings={**BUDGET, **settings})


def refused(manager: Any) -> str:
    try:
        begin(manager, "pid").abort("admitted")
    except ConcurrencyLimitExceeded as error:
        return f"{error.limit} {error.retry_after}: {error}"
    return "admitted"


@pytest.mark.smoke
def test_work_that_does_not_fit_waits_and_is_refused() -> None:
    def server() -> list[Any]:
        with budgeted() as manager:
            held = begin(manager, "sleep", 300)
            begun = time.monotonic()
            answers: list[Any] = [refused(manager), time.monotonic() - begun >= 0.3]
            held.abort("over")
            answers.append(ask(manager, "pid")[1].ending)
            # What dies gives back, too.
            answers += [ask(manager, "allocate_and_hold", 90, 0)[1].ending for _ in range(2)]
            return [*answers, ask(manager, "pid")[1].ending]

    text = "budget.memory 1: the memory budget of 100M has less than 60M left"
    assert in_child(server) == [text, True, "ok", "memory", "memory", "ok"]


def test_waiting_work_runs_when_memory_is_released() -> None:
    def server() -> tuple[str, bool]:
        with budgeted(budget={"memory": "100M", "wait": "60s"}) as manager:
            held = begin(manager, "sleep", 300)
            begun = time.monotonic()
            threading.Timer(0.5, held.abort, ["over"]).start()
            ending = ask(manager, "pid")[1].ending
            return ending, 0.4 < time.monotonic() - begun < 30

    assert in_child(server) == ("ok", True)


def test_servers_share_the_budget_and_release_it_when_they_die() -> None:
    def server() -> list[str]:
        reading, writing = os.pipe()
        other = os.fork()
        if other == 0:
            with budgeted() as manager:
                begin(manager, "sleep", 300)
                os.write(writing, b"x")
                signal.pause()
        os.read(reading, 1)
        with budgeted() as manager:
            answers = [refused(manager).partition(":")[0]]
            os.kill(other, signal.SIGKILL)
            os.waitpid(other, 0)
            return [*answers, ask(manager, "pid")[1].ending]

    assert in_child(server) == ["budget.memory 1", "ok"]


@pytest.mark.once
def test_managers_of_one_process_share_the_budget() -> None:
    def server() -> list[str]:
        with budgeted() as first, budgeted() as second:
            held = begin(first, "sleep", 300)
            answers = [refused(second).partition(":")[0]]
            held.abort("over")
            return [*answers, ask(second, "pid")[1].ending, ask(first, "pid")[1].ending]

    assert in_child(server) == ["budget.memory 1", "ok", "ok"]


@pytest.mark.once
def test_memory_given_to_one_unit_of_work_counts() -> None:
    def server() -> list[str]:
        with budgeted({**POLICY, "each": {"memory": "10M"}}) as manager:
            answers = []
            for size in (95, 90, 101):
                try:
                    held = manager.admit(Work("call", "x", {}), memory=lambda _, size=size: size * 2**20)
                except ConfinementError as error:
                    answers.append(str(error))
                    continue
                assert held is not None
                answers.append(refused(manager).partition(" ")[0])
                held.abort("over")
            return answers

    assert in_child(server) == [
        "budget.memory",
        "admitted",
        "its memory limit 101M exceeds the whole budget of 100M",
    ]


@pytest.mark.once
def test_executor_processes_do_not_have_the_ledger(tmp_path: Path) -> None:
    def server() -> list[str]:
        with budgeted() as manager:
            admission = begin(manager, "pid")
            folder = Path(f"/proc/{admission.executor_pid}/fd")
            found = [str(file.readlink()) for file in folder.iterdir()]
            end(admission)
            return found

    found = in_child(server)
    assert found
    assert str(tmp_path / "rcon/budget") not in found


@pytest.mark.once
def test_without_a_budget_there_is_no_ledger(tmp_path: Path) -> None:
    def server() -> str:
        with managing(POLICY) as manager:
            held = [begin(manager, "sleep", 300) for _ in range(2)]
            for one in held:
                one.abort("over")
            return ask(manager, "pid")[1].ending

    assert in_child(server) == "ok"
    assert not (tmp_path / "rcon").exists()
