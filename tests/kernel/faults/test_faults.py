"""Calls of the kernel fail, one after another: work is refused or confined, nothing hangs, nothing is left.

`tests.faults` has the mechanism. `make test` lets each call fail, with the errnos in turn. ``make test-long`` lets each
touch point fail once with each errno, and for three seconds with one.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from dataclasses import replace

import pytest

from tests.faults import cases
from tests.faults.cases import SCENARIOS
from tests.faults.not_met import NOT_MET, reason
from tests.faults.sites import all_sites

EMULATED = "RCON_TEST_EMULATED" in os.environ
#: To start one takes two seconds of CPU time, and 20 in the emulated machine.
WORKERS = 1 if EMULATED else 4
#: The scenarios that wait for a deadline or change limits are left to the sample. How many cases of them there are.
PLAIN, FEW = (("thread",), 4) if EMULATED else (("inline", "thread"), 12)


@pytest.fixture(scope="module")
def pool() -> Iterator[cases.Pool]:
    with cases.Pool(WORKERS) as pool:
        yield pool


@pytest.fixture(scope="module")
def recordings(pool: cases.Pool) -> dict[str, cases.Recording]:
    """The touch points of each scenario, and what the work says when nothing fails."""
    return cases.record(pool, SCENARIOS)


@pytest.mark.smoke
def test_calls_that_fail_refuse_a_thread(pool: cases.Pool) -> None:
    found = cases.record(pool, PLAIN)
    assert {name: one.problems for name, one in found.items()} == {name: [] for name in PLAIN}
    verdicts = cases.run(pool, cases.sample(found)[:FEW], found)
    wrong = [f"{one.case}: {one.wrong}" for one in verdicts if one.wrong]
    assert not wrong, "\n".join(wrong)
    assert any(one.fired and one.result["refusals"] for one in verdicts)


def test_nothing_is_wrong_while_nothing_fails(recordings: dict[str, cases.Recording]) -> None:
    assert {name: one.problems for name, one in recordings.items() if one.problems} == {}


@pytest.mark.layout("v1", "hybrid")
def test_each_call_in_the_source_is_met_or_named(recordings: dict[str, cases.Recording]) -> None:
    """A new call of the kernel fails here, until a scenario meets it or `NOT_MET` says why none does."""
    assert [site for site in cases.untouched(recordings) if reason(site) is None] == []


def test_the_reasons_are_about_calls_that_exist(recordings: dict[str, cases.Recording]) -> None:
    sites = [str(site) for site in all_sites()]
    assert [name for name in NOT_MET if not any(site.startswith(name) for site in sites)] == []
    met = {point[0] for point in cases.touch_points(recordings)}
    assert [name for name in NOT_MET if name.count(":") == 2 and name in met] == []


@pytest.mark.timeout(300)
def test_a_sample_of_calls_fails(pool: cases.Pool, recordings: dict[str, cases.Recording]) -> None:
    chosen = cases.sample(recordings, int(os.environ.get("RCON_TEST_FAULTS_SEED", "0")))
    verdicts = cases.run(pool, chosen, recordings)
    print(cases.figures(verdicts))
    wrong = [f"{one.case}: {one.wrong}" for one in verdicts if one.wrong]
    assert not wrong, "\n".join(wrong)
    assert sum(one.fired for one in verdicts) > len(verdicts) / 2


def test_a_retry_is_refused_while_its_policy_cannot_be_read(
    pool: cases.Pool, recordings: dict[str, cases.Recording]
) -> None:
    """It would run with the memory of a first attempt."""
    chosen = [
        case
        for case in cases.every_case({"task": recordings["task"]}, persisting=False, errnos=1)
        if "PolicyChangeLog.size" in case.site
    ]
    verdicts = cases.run(pool, [replace(case, phase="redelivered") for case in chosen], recordings)
    assert [one.wrong for one in verdicts if one.wrong] == []
    assert [len(one.result["refusals"]) for one in verdicts if one.fired] == [1]


@pytest.mark.parametrize("phase", ["leaves", "timeout"])
def test_a_command_is_killed_though_its_cgroup_is_refused_for_a_while(
    pool: cases.Pool, recordings: dict[str, cases.Recording], phase: str
) -> None:
    points = [
        cases.Case("command", *point, errno.EACCES, persisting=True, brief=True)
        for point in recordings["command"].points
        if point[0] == phase and point[1].startswith("kernel.files:_open_in:") and "cgroup.procs" in point[3]
    ]
    verdicts = cases.run(pool, points[:8], recordings)
    assert any(one.fired for one in verdicts)
    assert [one.wrong for one in verdicts if one.wrong] == []


if "RCON_TEST_LONG" in os.environ:

    @pytest.mark.timeout(3 * 3600)
    @pytest.mark.parametrize(
        ("persisting", "errnos", "workers"),
        [(False, len(cases.ERRNOS), 4), (True, 1, 16)],
        ids=["once, with each errno", "for three seconds, with one errno"],
    )
    def test_each_touch_point_fails(
        recordings: dict[str, cases.Recording], persisting: bool, errnos: int, workers: int
    ) -> None:
        chosen = cases.every_case(recordings, persisting=persisting, errnos=errnos)
        with cases.Pool(workers) as pool:
            verdicts = cases.run(pool, chosen, recordings)
        print(cases.figures(verdicts))
        wrong = [f"{one.case}: {one.wrong}" for one in verdicts if one.wrong]
        assert not wrong, "\n".join(wrong)
