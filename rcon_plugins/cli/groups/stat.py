"""``rcon stat``: one group with its limits, usage, pressure and processes."""

from __future__ import annotations

import json

import click

from rcon_plugins.cli.columns import (
    UNKNOWN,
    count,
    limits_as_json,
    limits_in_words,
    percent,
    printable,
    seconds,
    size,
    table,
    terminal_width,
)
from rcon_plugins.cli.groups.ls import name_data
from rcon_plugins.groups.find import Group, Owner
from rcon_plugins.identity import userdb
from rcon_plugins.kernel.cgroup import Reading
from rcon_plugins.kernel.cgroup.statistics import Pressure, Stall
from rcon_plugins.tally.reader import Counts

_KINDS = {
    "work": "work: processes that end with their owner",
    "host": "host: threads of the server itself, which join and leave",
    "attached": "attached: running processes that rcon attach moved here",
    "shared": "shared: commands of rcon run --in, which have these limits together",
}


def stat(group: Group, as_json: bool) -> int:
    """Print one group. Raises KernelError, also where the group has gone meanwhile."""
    usage, statistics, pressure = group.usage(), group.statistics(), group.pressure()
    limits, processes, tally = group.limits(), group.processes(), group.tally()
    if as_json:
        click.echo(
            json.dumps(
                {
                    **name_data(group),
                    "directories": group.cgroup.directories,
                    "frozen": group.is_frozen(),
                    "limits": limits_as_json(limits),
                    "usage": usage._asdict(),
                    "tally": None if tally is None else tally.to_data(),
                    "unroutable": group.unroutable(),
                    "statistics": statistics._asdict(),
                    "pressure": {name: _pressure_as_json(one) for name, one in pressure.items()},
                    "processes": [process._asdict() for process in processes],
                },
                indent=2,
            )
        )
        return 0
    lines = [
        _line("group", group.label + ("" if group.policy is None else f" (policy {group.policy})")),
        _line("kind", _KINDS[group.kind]),
        _line("cgroup", group.cgroup.path),
        _line("owner", _owner(group.owner)),
        _line("limits", ", ".join(limits_in_words(limits)) or "none"),
        _line("frozen", "yes" if group.is_frozen() else "no"),
        "",
        *_usage_lines(usage, group),
    ]
    lines += _pressure_lines(pressure)
    lines += _tally_lines(tally, group)
    unroutable = group.unroutable()
    if unroutable is not None:
        lines.append(_line("unroutable", f"{unroutable} refused by the whole server, as no route names them"))
    lines.append("")
    if processes:
        rows = [
            [str(one.pid), user(one.uid), one.state, str(one.threads), size(one.memory), one.command]
            for one in processes
        ]
        heads = (">PID", "USER", "STATE", ">THREADS", ">MEMORY", "COMMAND")
        lines.append(table(heads, rows, terminal_width()))
    else:
        lines.append("no processes")
    click.echo("\n".join(lines))
    return 0


def user(uid: int | None) -> str:
    """Return the name of the account, or the uid where there is none."""
    if uid is None:
        return UNKNOWN
    account = userdb.user(uid)
    return str(uid) if account is None else account.name


def _owner(owner: Owner) -> str:
    if owner.alive is None:
        return f"{owner.pid} (unknown: it is in a PID namespace that cannot be seen from here)"
    if not owner.alive:
        return f"{owner.pid} (has ended; rcon gc, or the next start of a server, removes the group)"
    return f"{owner.pid} ({user(owner.uid)}) {owner.command or '?'}"


def _usage_lines(usage: Reading, group: Group) -> list[str]:
    statistics = group.statistics()
    limits = group.limits()
    cpu = f"{seconds(usage.cpu_seconds)} s"
    if statistics.cpu_user_seconds is not None:
        cpu += (
            f" (user {seconds(statistics.cpu_user_seconds)}, system {seconds(statistics.cpu_system_seconds)})"
        )
    memory = f"{size(usage.memory_current)}, peak {size(usage.memory_peak)}"
    if isinstance(limits.memory_max, int) and usage.memory_current is not None and limits.memory_max:
        memory += f", {percent(usage.memory_current / limits.memory_max)} of its limit"
    if statistics.memory_anon is not None:
        memory += f" (anonymous {size(statistics.memory_anon)}, files {size(statistics.memory_file)})"
    pids = count(usage.pids_current)
    if statistics.pids_peak is not None:
        pids += f", peak {statistics.pids_peak}"
    throttled = UNKNOWN
    if statistics.cpu_periods is not None:
        throttled = (
            f"{count(statistics.cpu_throttled)} of {statistics.cpu_periods} periods,"
            f" {seconds(statistics.cpu_throttled_seconds)} s"
        )
    return [
        _line("cpu", cpu),
        _line("throttled", throttled),
        _line("memory", memory),
        _line("swap", f"{size(statistics.swap_current)}, peak {size(usage.swap_peak)}"),
        _line("limit hits", f"memory {count(usage.memory_limit_hits)}, pids {count(usage.pids_limit_hits)}"),
        _line("memory-high", f"reached {count(statistics.memory_high_hits)} times"),
        _line("OOM kills", count(usage.oom_kills)),
        _line("io", f"read {size(usage.io_read_bytes)}, written {size(usage.io_write_bytes)}"),
        _line("pids", pids),
    ]


def _tally_lines(tally: Counts | None, group: Group) -> list[str]:
    """Return what the server counted; "unknown" for a server whose tally this user cannot read."""
    if tally is None:
        return [_line("served", "unknown")] if group.is_of_server() else []
    return [
        _line(
            "served",
            f"{_numbers(tally.endings)}; {count(tally.under_way)} under way, {count(tally.lost)} lost",
        ),
        _line("refused", _numbers(tally.refusals)),
        _line(
            "executors",
            f"{tally.spawns} made, {tally.executor_evictions} given up for others,"
            f" {tally.memory_replacements} kept too much memory; its cgroup given up {tally.evictions} times",
        ),
    ]


def _numbers(counts: dict[str, int]) -> str:
    """Return the counts that are not zero, as ``3 ok, 1 memory``."""
    return ", ".join(f"{number} {name}" for name, number in counts.items() if number) or "0"


def _pressure_lines(pressure: dict[str, Pressure]) -> list[str]:
    if not pressure:
        return [_line("pressure", "not available (needs cgroup v2, and a kernel booted with psi=1)")]
    return [
        _line(f"{name} stalled", f"some processes {_stall(one.some)}; all {_stall(one.full)}")
        for name, one in pressure.items()
    ]


def _stall(stall: Stall | None) -> str:
    if stall is None:
        return UNKNOWN
    return f"{percent(stall.share)} of the last 10 s, {seconds(stall.seconds)} s in total"


def _pressure_as_json(pressure: Pressure) -> dict[str, object]:
    return {
        "some": None if pressure.some is None else pressure.some._asdict(),
        "full": None if pressure.full is None else pressure.full._asdict(),
    }


def _line(label: str, value: str) -> str:
    return f"{label:<15}{printable(value)}"
