"""A plain ``rcon run``: limits, a timeout, a report, a new group and a command, all well-formed, and nothing else.

Whatever is not that is left to `rcon_plugins.cli.run.run`, which knows all options and says what is wrong with
them. What it would make of a plain command line is made here too, by the same types (a test compares the two), without
loading what reads policies.
"""

from __future__ import annotations

import os
from functools import partial
from typing import TYPE_CHECKING, Any

from rcon_plugins.cli.run.execution import execute, open_report
from rcon_plugins.command.run import Order, check_group_name, group_name
from rcon_plugins.errors import KernelError, RconError
from rcon_plugins.kernel.cgroup import Hierarchy, IoMax, Resources, device_of
from rcon_plugins.kernel.proc import find_program, original_environment

if TYPE_CHECKING:
    from collections.abc import Callable

    from rcon_plugins.kernel.cgroup import Cgroup

_PAGE = 4096
_HIGHEST = {"cpu_weight": 10_000, "pids": 4_194_304, "riops": 2**63 - 1, "wiops": 2**63 - 1}
_IO = {"--read": "rbps", "--write": "wbps", "--read-iops": "riops", "--write-iops": "wiops"}


def _count(name: str) -> Callable[[str], int]:
    def parse(text: str) -> int:
        number = int(text) if text.isascii() and text.isdigit() and len(text) < 20 else 0
        if not 1 <= number <= _HIGHEST[name]:
            raise ValueError(text)
        return number

    return parse


def _bytes(text: str) -> int:
    from rcon_plugins.settings.units import Size

    return int(Size.parse(text))


def _memory(text: str) -> int:
    size = _bytes(text)
    if size < _PAGE:
        raise ValueError(text)
    return size


def _cpus(text: str) -> str:
    from rcon_plugins.settings.units import CpuList

    return str(CpuList.parse(text))


def _share(text: str) -> float:
    from rcon_plugins.settings.units import Cpus

    return float(Cpus.parse(text))


def _seconds(text: str) -> float:
    from rcon_plugins.settings.units import Duration

    return float(Duration.parse(text))


#: By option: the name of what it becomes, and how. No other option is plain.
_PLAIN: dict[str, tuple[str, Callable[[str], Any]]] = {
    "--cpu": ("cpu_quota", _share),
    "--cpu-weight": ("cpu_weight", _count("cpu_weight")),
    "--cpus": ("cpus", _cpus),
    "--memory": ("memory_max", _memory),
    "--swap": ("swap_max", _bytes),
    "--pids": ("pids_max", _count("pids")),
    "--read": ("rbps", _bytes),
    "--write": ("wbps", _bytes),
    "--read-iops": ("riops", _count("riops")),
    "--write-iops": ("wiops", _count("wiops")),
    "--device": ("device", str),
    "--timeout": ("timeout", _seconds),
    "--json": ("json", str),
    "--group": ("group", check_group_name),
}


def run(words: list[str]) -> int | None:
    """Run what the words after ``rcon run`` ask for; the exit status. None: not plain, and nothing was done."""
    if os.environ.get("RCON_CGROUP"):
        return None
    try:
        found = parse(words)
        if found is None:
            return None
        options, arguments = found
        resources = resources_of(options)
        program = find_program(arguments[0])
        hierarchy = Hierarchy.discover()
        group = options.get("group")
        if (
            program is None
            or hierarchy.refusals(resources)
            or not (group is None or _is_new(group, hierarchy))
        ):
            return None
        report = open_report(options["json"]) if "json" in options else None
    except (RconError, ValueError, OSError):
        return None  # from_options says what is wrong
    order = Order(
        program=program,
        arguments=tuple(arguments),
        variables=original_environment(),
        group=group or group_name(arguments[0]),
        resources=resources,
        configure=partial(_configure, resources=resources),
        timeout=options.get("timeout"),
    )
    return execute(order, hierarchy, report=report)


def _is_new(group: str, hierarchy: Hierarchy) -> bool:
    """Whether no group of this name is there, of whomever. Raises KernelError."""
    from rcon_plugins.tree.survey import survey

    kinds = [
        f"{path}/{kind}" for path in survey(hierarchy).instances for kind in ("work", "host", "attached")
    ]
    return not any(group in hierarchy.cgroup(kind).children() for kind in kinds)


def parse(words: list[str]) -> tuple[dict[str, Any], list[str]] | None:
    """The options, by the names of `_PLAIN`, and the command; None: not plain. Raises `SettingsError`, ValueError."""
    options: dict[str, Any] = {}
    index = 0
    while index < len(words) and words[index].startswith("-"):
        word = words[index]
        index += 1
        if word == "--":
            break
        flag, equals, value = word.partition("=")
        if flag not in _PLAIN:
            return None
        if not equals:
            if index == len(words):
                return None
            value = words[index]
            index += 1
        name, read = _PLAIN[flag]
        options[name] = read(value)
    arguments = words[index:]
    return (options, arguments) if arguments and arguments[0] else None


def resources_of(options: dict[str, Any]) -> Resources:
    """The limits. Raises KernelError, ValueError."""
    io = {name: options[name] for name in _IO.values() if name in options}
    device = options.get("device", ".")
    if not device or (not io and "device" in options):
        raise ValueError("device")
    limits = {
        name: options[name] for name, _ in _PLAIN.values() if name in Resources._fields and name in options
    }
    if not io:
        return Resources(**limits)
    if ":" in device and "/" not in device:
        return Resources(io={device_of(device): IoMax(**io)}, **limits)
    if not os.path.exists(device):  # noqa: PTH110  pathlib loads slowly
        raise KernelError(f"there is no {device}")
    return Resources(io={device_of(device): IoMax(**io)}, **limits)


def _configure(cgroup: Cgroup, resources: Resources) -> None:
    cgroup.configure(resources)
