"""How work ended: from what the host did, the wait status, and the counters of the kernel. Pure; reads nothing.

Commands (`rcon_plugins.command.run`) and executor processes (`rcon_plugins.confinement.admission`) share it. It imports
little, because ``rcon run`` does.
"""

from __future__ import annotations

import os
import signal
from typing import Literal, NamedTuple

from rcon_plugins.kernel.cgroup import Reading

Ending = Literal[
    "ok",  # ran to its end
    "error",  # its own code raised, or the command exited with another status than 0
    "memory",  # killed at a memory limit
    "timeout",  # killed at its wall time limit
    "pids",  # failed because it could start no more processes or threads
    "result",  # returned or raised more than its policy allows
    "concurrency",  # never started: as many requests are under way as the policy allows
    "killed",  # its process was ended by a signal, or exited, before the work was done
    "aborted",  # stopped by the host: the client went away, or the server stops
    "refused",  # never started: it could not be confined
    "forbidden",  # never started: its identity is not allowed
    "unroutable",  # never started: no route names it
]

#: Why a host stopped work itself: at its deadline, on `abort`, or because its process broke the protocol.
Cause = Literal["timeout", "aborted", "protocol"]

#: By these signals a person or a service manager ends a process. No limit sends them.
_REQUESTED = frozenset({signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT})
#: A peak this close to a memory limit reached it: the kernel counts pages in batches.
_REACHED = 0.95
#: A process that spent this share of its CPU time limit may have reached it: the kernel counts that time in whole
#: ticks, of which a process beside many others uses a part (0.76 s of a second were seen).
_SPENT = 0.5
_UNITS = (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10))
#: Below this share of the limit, memory ran out elsewhere: in a group around it, or on the whole machine.
_ELSEWHERE = 0.9


class Snapshot(NamedTuple):
    """The counters of the cgroup of one unit of work, and of the group that holds all work of its confinement."""

    each: Reading = Reading()
    group: Reading = Reading()


class Bounds(NamedTuple):
    """One limit in force, for one unit of work (``each``) and for all work together (``group``). None: no limit.

    People read the texts in place of the numbers; ``note`` is added to the message about a memory limit.
    """

    each: int | None = None
    group: int | None = None
    each_text: str = ""
    group_text: str = ""
    note: str = ""


class LimitsInForce(NamedTuple):
    """The limits in force when work ended.

    ``pids`` is None where a failed fork does not explain the end. ``timeout`` is the wall time limit as people read
    it, ``timeout_key`` the key that it is written under. ``grace`` is the time between SIGTERM and SIGKILL after that
    limit, likewise. ``ends_all``: an OOM kill of one process ends all of the work, so a command is not ``"ok"`` after
    that, even if it exits before it is killed. ``cpu_time`` is the RLIMIT_CPU of its processes in seconds, or None.
    """

    memory: Bounds = Bounds()
    pids: Bounds | None = None
    timeout: str = ""
    timeout_key: str = "each.timeout"
    grace: str = ""
    ends_all: bool = False
    cpu_time: float | None = None


class End(NamedTuple):
    """How work ended; ``limit`` is the limit that ended it as a policy spells it, ``detail`` one line for people.

    ``needed_kill`` is as in `rcon_plugins.outcome.Outcome`.
    """

    ending: Ending
    limit: str | None = None
    signal: int | None = None
    detail: str = ""
    needed_kill: bool | None = None


def explain_end(
    before: Snapshot,
    after: Snapshot,
    status: int | None,
    limits: LimitsInForce,
    *,
    cause: Cause | None = None,
    is_command: bool = False,
    needed_kill: bool | None = None,
) -> End:
    """Explain the end of a process that did work.

    ``before`` and ``after`` are the counters around the work. ``status`` is the wait status; None if unknown.
    ``cause`` is why the host stopped the work itself. A command may exit by itself: with ``is_command`` its exit
    status decides between ``"ok"`` and ``"error"``. ``needed_kill``: after a grace at the wall time limit, SIGKILL
    ended a process; None without a grace. The detail names OOM kills, whatever the ending is.
    """
    end = _explain(before, after, status, limits, cause, is_command)
    if needed_kill is not None and end.ending == "timeout":
        how = "killed after" if needed_kill else "ended within"
        end = end._replace(detail=f"{end.detail}; {how} the grace of {limits.grace}", needed_kill=needed_kill)
    return end._replace(detail=with_oom_kills(end.detail, oom_kills_between(before, after), end.ending))


def oom_kills_between(before: Snapshot, after: Snapshot) -> int | None:
    """Return the number of processes that the OOM killer ended between two snapshots; None if unknown."""
    counts = (kills_between(before.each, after.each), kills_between(before.group, after.group))
    # The counter of a group includes what is below it.
    return max((count for count in counts if count is not None), default=None)


def kills_between(before: Reading, after: Reading) -> int | None:
    """Return the number of processes that the OOM killer ended between two readings; None if unknown."""
    return None if after.oom_kills is None else max(0, after.oom_kills - (before.oom_kills or 0))


def with_oom_kills(detail: str, kills: int | None, ending: Ending) -> str:
    """Return ``detail`` with the number of OOM kills. The detail of the ending ``memory`` says so already."""
    if not kills or ending == "memory":
        return detail
    killed = "1 process was" if kills == 1 else f"{kills} processes were"
    separator = "; " if detail and not detail.endswith(": ") else ""
    return f"{detail}{separator}{killed} killed at the memory limit"


def _explain(
    before: Snapshot,
    after: Snapshot,
    status: int | None,
    limits: LimitsInForce,
    cause: Cause | None,
    is_command: bool,
) -> End:
    number = os.WTERMSIG(status) if status is not None and os.WIFSIGNALED(status) else None
    if cause == "timeout":
        return End("timeout", limits.timeout_key, number, f"wall time limit {limits.timeout} reached")
    if cause == "aborted":
        return End("aborted", None, number)
    survived = limits.ends_all and _ran_out_of_memory(before, after, limits.memory)
    if is_command and status == 0 and not survived:
        return End("ok")
    if number not in _REQUESTED:  # else: whatever limits it reached before
        if _ran_out_of_memory(before, after, limits.memory):
            return _memory_end(after, limits.memory, number)
        if limits.pids is not None and (limit := pids_limit_hit(before, after, limits.pids)) is not None:
            return End("pids", limit, number, pids_detail(limit, limits.pids))
    if number is not None:
        if _spent_cpu_time(after, limits.cpu_time, number):
            text = f"CPU time limit {limits.cpu_time:g}s of a process reached (rlimits.cpu, or ulimit -t)"
            return End("killed", "rlimits.cpu", number, text)
        return End("killed", None, number, f"ended by {_signal_name(number)}")
    if is_command:
        return End("error")
    if cause == "protocol":
        return End("killed", None, None, "broke the protocol between host and executor")
    if status is None:
        return End("killed", None, None, "ended, and its exit status is unknown")
    return End("killed", None, None, f"exited with status {os.waitstatus_to_exitcode(status)}")


def _spent_cpu_time(after: Snapshot, limit: float | None, number: int) -> bool:
    """Return whether RLIMIT_CPU ended the process: by SIGXCPU, and at a hard limit by SIGKILL (setrlimit(2))."""
    if limit is None or number not in (signal.SIGXCPU, signal.SIGKILL):
        return False
    spent = max(after.each.cpu_seconds or 0, after.group.cpu_seconds or 0)
    return number == signal.SIGXCPU or spent >= _SPENT * limit


def pids_limit_hit(before: Snapshot, after: Snapshot, pids: Bounds) -> str | None:
    """Return the pids limit that refused a fork between two snapshots, as a policy spells it; None without any."""
    hit_each = _rose(before.each.pids_limit_hits, after.each.pids_limit_hits)
    if not hit_each and not _rose(before.group.pids_limit_hits, after.group.pids_limit_hits):
        return None
    return "each.pids" if pids.each is not None and (pids.group is None or hit_each) else "pids"


def pids_detail(limit: str, pids: Bounds) -> str:
    """Return the sentence for a pids limit that refused a fork. ``limit`` is what `pids_limit_hit` returned."""
    bound = pids.each if limit == "each.pids" else pids.group
    which = "of a group around it" if bound is None else str(bound)
    return f"pids limit {which} reached: no more processes or threads could be started"


def _ran_out_of_memory(before: Snapshot, after: Snapshot, memory: Bounds) -> bool:
    each, group = after.each.oom_kills, _rose(before.group.oom_kills, after.group.oom_kills)
    if _rose(before.each.oom_kills, each):
        return True
    if each is None:
        return group  # not counted apart
    # A victim in a group nested below, beside the cgroup of the work: that group's own limit, unless this one is full.
    peak = after.group.memory_peak
    return group and memory.group is not None and peak is not None and peak >= _REACHED * memory.group


def _memory_end(after: Snapshot, memory: Bounds, number: int | None) -> End:
    peak = after.each.memory_peak
    hit_each = memory.each is not None and (
        memory.group is None or (peak is not None and peak >= max(1, _REACHED * memory.each))
    )
    if hit_each:
        key, bound, text = "each.memory", memory.each, memory.each_text
    else:
        key, bound, text = "memory", memory.group, memory.group_text
    if not hit_each and after.group.memory_peak is not None:
        peak = after.group.memory_peak
    if bound is None or (peak is not None and peak < _ELSEWHERE * bound):
        return End(
            "memory", None, number, f"memory limit of a group around it reached (peak {_rounded(peak)})"
        )
    peak = None if peak is None else min(peak, bound)
    return End("memory", key, number, f"memory limit {text} reached (peak {_rounded(peak)}{memory.note})")


def _rose(before: int | None, after: int | None) -> bool:
    return after is not None and after > (before or 0)


def _rounded(count: int | None) -> str:
    if count is None:
        return "unknown"
    name, unit = next((one for one in _UNITS if count >= one[1]), _UNITS[-1])
    return f"{count / unit:.1f} {name}"


def format_memory(count: int) -> str:
    """Return bytes as people write them: ``100 KiB``, ``1.5 GiB``, ``1025 MiB``. What is no whole page is rounded."""
    for name, unit in _UNITS:
        tenths = count * 10 / unit
        if count >= unit and tenths == int(tenths):
            return f"{tenths / 10:.1f} {name}".replace(".0 ", " ")
    return _rounded(count)


def _signal_name(number: int) -> str:
    try:
        return f"{signal.Signals(number).name} ({signal.strsignal(number)})"
    except ValueError:
        return f"signal {number}"
