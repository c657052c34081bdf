"""How tests/run.py runs tiers, and what it says of them."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from tests import run
from tests.machine import NEXT_RUN
from tests.run import ALONE, Suite, Tier, count


@pytest.fixture(autouse=True)
def logs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(run, "LOGS", tmp_path)
    return tmp_path


def tier(name: str, code: str, lane: str = "a", tests: bool = True) -> Tier:
    """A tier that runs this code instead of tests."""
    return Tier(name, lane, (sys.executable, "-c", code), tests=tests)


def saying(last_line: str) -> str:
    return f"print({last_line!r})"


PASSED = saying("==== 3 passed, 2 deselected, 1 rerun in 0.10s ====")


def test_a_suite_of_passing_tiers_passes(capsys: pytest.CaptureFixture[str]) -> None:
    tiers = [tier("one", PASSED), tier("two", PASSED, "b"), tier("lint", "", tests=False)]
    assert Suite("test", tiers).run() == 0
    said = capsys.readouterr().out
    assert said.splitlines()[-1].startswith("===== 0 failed, 6 passed, 2 rerun in ")
    assert "make test: " in said


def test_a_failing_tier_fails_the_suite_and_prints_its_failures(capsys: pytest.CaptureFixture[str]) -> None:
    code = (
        saying("start\n=== FAILURES ===\nE  what happened\n=== 1 failed, 2 passed in 1.00s ===")
        + "; raise SystemExit(1)"
    )
    assert Suite("test", [tier("one", PASSED), tier("bad", code, "b")]).run() == 1
    said = capsys.readouterr().out
    assert "E  what happened" in said
    assert "start\n" not in said.partition("== bad")[2]
    assert said.splitlines()[-1].startswith("===== 1 failed, 5 passed, 1 rerun in ")


def test_a_tier_without_tests_fails(capsys: pytest.CaptureFixture[str]) -> None:
    assert Suite("test", [tier("empty", saying("==== 5 deselected in 0.01s ===="))]).run() == 1
    assert "ran no test" in capsys.readouterr().out


def test_too_many_second_attempts_fail() -> None:
    three = saying("3 passed, 3 rerun in 0.1s")
    assert Suite("test", [tier(name, three) for name in ("one", "two")]).run() == 0
    assert Suite("test", [tier(name, three) for name in ("one", "two", "three")]).run() == 1
    assert Suite("test", [tier("one", f"{three}; {saying(NEXT_RUN)}; {three}")]).run() == 1


def test_the_counts_of_two_runs_in_one_tier_are_added_up() -> None:
    log = f"==== 5 passed, 1 error in 3.21s ====\n{NEXT_RUN}\n==== 2 passed, 1 failed in 0.10s ====\n"
    assert count(log) == {"passed": 7, "error": 1, "failed": 1}


def test_lanes_run_side_by_side_and_what_is_alone_after_them(tmp_path: Path) -> None:
    """Each of two lanes waits for the other; the one that is alone finds both done."""
    meet = """import pathlib, time
folder = pathlib.Path({!r})
folder.joinpath({!r}).touch()
while not folder.joinpath({!r}).exists():
    time.sleep(0.01)
"""
    folder = str(tmp_path)
    tiers = [
        tier(
            "alone",
            f"import pathlib; assert {{p.name for p in pathlib.Path({folder!r}).iterdir()}} >= {{'x', 'y'}}\n{PASSED}",
            ALONE,
        ),
        tier("x", meet.format(folder, "x", "y") + "time.sleep(0.2)\n" + PASSED, "a"),
        tier("y", meet.format(folder, "y", "x") + PASSED, "b"),
    ]
    began = time.monotonic()
    assert Suite("test", tiers).run() == 0
    assert tiers[0].seconds < time.monotonic() - began
    assert tiers[1].seconds >= 0.2


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("==== 3 passed in 1.00s ====", {"passed": 3}),
        (
            "2 failed, 840 passed, 43 deselected in 1002.87s (0:16:42)",
            {"failed": 2, "passed": 840, "deselected": 43},
        ),
        ("=== 1 passed, 2 errors in 0.5s ===", {"passed": 1, "error": 2}),
        ("nothing of the kind", {}),
    ],
)
def test_counts(line: str, expected: dict[str, int]) -> None:
    assert count(f"before\n{line}\n") == expected


def test_every_tier_of_make_test_has_its_own_name() -> None:
    for target, tiers in run.plans().items():
        names = [one.name for one in tiers]
        assert len(set(names)) == len(names), target
