"""How work ended, from counters and a wait status: no kernel is asked."""

from __future__ import annotations

import signal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rcon_plugins.ending import (
    Bounds,
    Cause,
    End,
    LimitsInForce,
    Snapshot,
    explain_end,
    format_memory,
    oom_kills_between,
    pids_limit_hit,
    with_oom_kills,
)
from rcon_plugins.kernel.cgroup import Reading
from rcon_plugins.settings.units import parse_size

MIB = 2**20
KILLED, TERMINATED, EXIT_3 = signal.SIGKILL, signal.SIGTERM, 3 << 8

EACH = LimitsInForce(Bounds(each=64 * MIB, each_text="64M"))
GROUP = LimitsInForce(Bounds(group=64 * MIB, group_text="64M"))
BOTH = LimitsInForce(Bounds(32 * MIB, 64 * MIB, "32M", "64M"))
PIDS = LimitsInForce(pids=Bounds(each=8, group=16))


def oom(peak: int, kills: int = 1) -> Reading:
    return Reading(memory_peak=peak * MIB, oom_kills=kills)


@pytest.mark.parametrize(
    ("status", "end"),
    [
        (0, End("ok")),
        (EXIT_3, End("error")),
        (KILLED, End("killed", None, 9, "ended by SIGKILL (Killed)")),
        (TERMINATED, End("killed", None, 15, "ended by SIGTERM (Terminated)")),
        (60, End("killed", None, 60, "ended by signal 60")),
    ],
)
def test_a_command_without_limits(status: int, end: End) -> None:
    assert explain_end(Snapshot(), Snapshot(), status, LimitsInForce(), is_command=True) == end


@pytest.mark.parametrize(
    ("status", "cause", "detail"),
    [
        (0, None, "exited with status 0"),
        (EXIT_3, None, "exited with status 3"),
        (None, None, "ended, and its exit status is unknown"),
        (None, "protocol", "broke the protocol between host and executor"),
    ],
)
def test_an_executor_process_that_exits_did_not_finish_its_work(
    status: int | None, cause: Cause | None, detail: str
) -> None:
    end = explain_end(Snapshot(), Snapshot(), status, LimitsInForce(), cause=cause)
    assert end == End("killed", None, None, detail)


def test_the_host_stopped_it() -> None:
    limits = LimitsInForce(EACH.memory, timeout="5s")
    after = Snapshot(oom(64, 0))
    end = explain_end(Snapshot(), after, KILLED, limits, cause="timeout")
    assert end == End("timeout", "each.timeout", 9, "wall time limit 5s reached")
    assert explain_end(Snapshot(), after, KILLED, limits, cause="aborted") == End("aborted", None, 9)


@pytest.mark.parametrize(
    ("limits", "after", "end"),
    [
        (EACH, Snapshot(oom(64)), ("each.memory", "memory limit 64M reached (peak 64.0 MiB)")),
        (GROUP, Snapshot(oom(64)), ("memory", "memory limit 64M reached (peak 64.0 MiB)")),
        (BOTH, Snapshot(oom(31)), ("each.memory", "memory limit 32M reached (peak 31.0 MiB)")),
        (BOTH, Snapshot(oom(20), oom(64, 0)), ("memory", "memory limit 64M reached (peak 64.0 MiB)")),
        # The kernel counts a batch of pages before it refuses them.
        (GROUP, Snapshot(oom(65)), ("memory", "memory limit 64M reached (peak 64.0 MiB)")),
        # Another limit than these was reached.
        (
            GROUP,
            Snapshot(oom(20), oom(20)),
            (None, "memory limit of a group around it reached (peak 20.0 MiB)"),
        ),
        (
            LimitsInForce(),
            Snapshot(oom(20)),
            (None, "memory limit of a group around it reached (peak 20.0 MiB)"),
        ),
        # The kills are counted in the group alone.
        (GROUP, Snapshot(Reading(), oom(64)), ("memory", "memory limit 64M reached (peak 64.0 MiB)")),
        # A victim in a nested group beside the work, at the limit of the group.
        (GROUP, Snapshot(oom(5, 0), oom(63)), ("memory", "memory limit 64M reached (peak 63.0 MiB)")),
    ],
)
def test_memory(limits: LimitsInForce, after: Snapshot, end: tuple[str | None, str]) -> None:
    limit, detail = end
    assert explain_end(Snapshot(), after, KILLED, limits) == End("memory", limit, 9, detail)


def test_a_note_on_the_limit_is_kept() -> None:
    limits = LimitsInForce(Bounds(group=64 * MIB, group_text="64 MiB", note=", expanded from 32M"))
    end = explain_end(Snapshot(), Snapshot(oom(64)), KILLED, limits)
    assert end.detail == "memory limit 64 MiB reached (peak 64.0 MiB, expanded from 32M)"


def test_an_earlier_oom_kill_does_not_explain_this_end() -> None:
    end = explain_end(Snapshot(oom(64)), Snapshot(oom(64)), KILLED, EACH)
    assert (end.ending, end.limit) == ("killed", None)


def test_a_nested_group_at_a_limit_of_its_own_does_not_explain_this_end() -> None:
    end = explain_end(Snapshot(), Snapshot(oom(5, 0), oom(30)), KILLED, GROUP)
    assert (end.ending, end.limit) == ("killed", None)


def test_a_requested_end_is_not_a_limit() -> None:
    after = Snapshot(oom(64)._replace(pids_limit_hits=3))
    assert explain_end(Snapshot(), after, TERMINATED, EACH._replace(pids=Bounds(each=8))).ending == "killed"


def test_a_command_that_succeeds_reached_no_limit() -> None:
    after = Snapshot(oom(64, 0)._replace(pids_limit_hits=3))
    assert explain_end(Snapshot(), after, 0, EACH._replace(pids=Bounds(each=8)), is_command=True) == End("ok")


@pytest.mark.parametrize("cause", ["timeout", "aborted", "protocol", None])
@pytest.mark.parametrize("status", [0, EXIT_3, TERMINATED, KILLED, None])
@pytest.mark.parametrize("is_command", [False, True])
def test_oom_kills_are_named_whatever_the_ending(
    cause: Cause | None, status: int | None, is_command: bool
) -> None:
    before, after = Snapshot(oom(64, 5), oom(64, 5)), Snapshot(oom(64, 7), oom(64, 8))
    end = explain_end(before, after, status, LimitsInForce(), cause=cause, is_command=is_command)
    without = explain_end(before, before, status, LimitsInForce(), cause=cause, is_command=is_command)
    suffix = "3 processes were killed at the memory limit"
    if end.ending == "memory":
        assert end.detail.startswith("memory limit of a group around it reached")
    else:
        assert end == without._replace(detail=f"{without.detail}; {suffix}" if without.detail else suffix)


@pytest.mark.parametrize(
    ("before", "after", "kills"),
    [
        (Snapshot(), Snapshot(), None),
        (Snapshot(oom(1, 2)), Snapshot(), None),
        (Snapshot(), Snapshot(oom(1, 0)), 0),
        (Snapshot(oom(1, 2)), Snapshot(oom(1, 3)), 1),
        (Snapshot(oom(1, 2)), Snapshot(oom(1, 2), oom(1, 3)), 3),
        (Snapshot(oom(1, 2)), Snapshot(oom(1, 3), Reading(memory_peak=1)), 1),
    ],
)
def test_oom_kills_between_two_snapshots(before: Snapshot, after: Snapshot, kills: int | None) -> None:
    assert oom_kills_between(before, after) == kills


def test_oom_kills_are_not_named_twice() -> None:
    assert with_oom_kills("memory limit 64M reached", 2, "memory") == "memory limit 64M reached"
    assert with_oom_kills("", 1, "ok") == "1 process was killed at the memory limit"


@pytest.mark.parametrize(
    ("before", "after", "limit", "bound"),
    [
        (Snapshot(), Snapshot(Reading(pids_limit_hits=1)), "each.pids", "8"),
        (Snapshot(), Snapshot(group=Reading(pids_limit_hits=1)), "pids", "16"),
        (Snapshot(Reading(pids_limit_hits=1)), Snapshot(Reading(pids_limit_hits=2)), "each.pids", "8"),
    ],
)
def test_pids(before: Snapshot, after: Snapshot, limit: str, bound: str) -> None:
    end = explain_end(before, after, EXIT_3, PIDS, is_command=True)
    detail = f"pids limit {bound} reached: no more processes or threads could be started"
    assert end == End("pids", limit, None, detail)
    assert pids_limit_hit(before, after, Bounds(each=8, group=16)) == limit


def test_a_pids_limit_of_a_group_around_it() -> None:
    end = explain_end(Snapshot(), Snapshot(Reading(pids_limit_hits=1)), EXIT_3, LimitsInForce(pids=Bounds()))
    assert (end.ending, end.limit) == ("pids", "pids")
    assert end.detail.startswith("pids limit of a group around it reached")


def test_no_fork_was_refused() -> None:
    same = Snapshot(Reading(pids_limit_hits=4), Reading(pids_limit_hits=4))
    assert pids_limit_hit(same, same, Bounds(8, 16)) is None
    assert explain_end(same, same, EXIT_3, PIDS, is_command=True) == End("error")


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (100 * 1024, "100 KiB"),
        (4096, "4 KiB"),
        (64 * MIB, "64 MiB"),
        (1024 * MIB, "1 GiB"),
        (1536 * MIB, "1.5 GiB"),
        (1025 * MIB, "1025 MiB"),
        (1536 * 1024, "1.5 MiB"),
        (10240 * 1024 * MIB, "10 TiB"),
        (1028 * 1024, "1028 KiB"),
        (100_000, "97.7 KiB"),
        (12, "0.0 KiB"),
    ],
)
def test_sizes_are_as_people_write_them(count: int, text: str) -> None:
    assert format_memory(count) == text


@given(st.integers(1, 2**40), st.sampled_from([2**10, 2**20, 2**30]))
def test_a_size_of_whole_units_is_read_again(number: int, unit: int) -> None:
    size = min(number * unit, 2**62)
    assert parse_size(format_memory(size)) == size


@pytest.mark.parametrize(
    ("number", "spent", "limit", "named"),
    [
        (signal.SIGXCPU, 0.0, 1.0, True),
        (signal.SIGKILL, 0.98, 1.0, True),
        (signal.SIGKILL, 0.1, 1.0, False),
        (signal.SIGXCPU, 1.0, None, False),
        (signal.SIGTERM, 1.0, 1.0, False),
    ],
)
def test_a_limit_of_cpu_time_is_named(
    number: signal.Signals, spent: float, limit: float | None, named: bool
) -> None:
    after = Snapshot(Reading(cpu_seconds=spent))
    end = explain_end(Snapshot(), after, int(number), LimitsInForce(cpu_time=limit), is_command=True)
    assert (end.ending, end.signal) == ("killed", number)
    if named:
        detail = "CPU time limit 1s of a process reached (rlimits.cpu, or ulimit -t)"
        assert (end.limit, end.detail) == ("rlimits.cpu", detail)
    else:
        assert end.limit is None
        assert end.detail.startswith(f"ended by {number.name}")


@pytest.mark.parametrize(("needed", "how"), [(True, "killed after"), (False, "ended within")])
def test_a_timeout_with_a_grace_says_how_it_ended(needed: bool, how: str) -> None:
    limits = LimitsInForce(timeout="20s", grace="5s")
    end = explain_end(Snapshot(), Snapshot(), TERMINATED, limits, cause="timeout", needed_kill=needed)
    assert end.detail == f"wall time limit 20s reached; {how} the grace of 5s"
    assert (end.ending, end.limit, end.needed_kill) == ("timeout", "each.timeout", needed)
