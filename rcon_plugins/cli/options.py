"""The options of ``rcon run``, ``rcon attach`` and ``capcon``, and the parser of ``rcon run`` and ``capcon``.

Imports no click: `rcon_plugins.cli.completion.with_options` declares the same options to click, for help and
completion.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, NamedTuple

from rcon_plugins.cli.exit import BadUsage
from rcon_plugins.errors import SettingsError
from rcon_plugins.settings import limit_table

#: The variable that names the base cgroup for all commands of a shell; an option, or a settings file, comes first.
CGROUP_VARIABLE = "RCON_CGROUP"


class Option(NamedTuple):
    """An option: its flags, the long one first; ``metavar`` is empty for a switch, which takes no value.

    ``several``: the option may be given more than once. ``completes`` says what its value is completed to: a key of
    `rcon_plugins.cli.completion.KNOWN`, or ``path``. ``hidden``: not in the help.
    """

    flags: tuple[str, ...]
    metavar: str
    help: str
    several: bool = False
    completes: str = ""
    hidden: bool = False

    @property
    def name(self) -> str:
        """The long flag as an identifier: ``read_only``."""
        return self.flags[0].removeprefix("--").replace("-", "_")


class HelpRequested(Exception):
    """Raised by `parse` for ``--help``."""


_LIMITS = tuple(Option((row.flag,), row.metavar, row.help) for row in limit_table.OPTIONS)
CGROUP = Option(
    ("--cgroup",),
    "PATH",
    f"Make groups in this cgroup: /rcon. By default ${CGROUP_VARIABLE}, else the first usable.",
)
_USER = Option(
    ("--user", "-u"),
    "NAME|UID",
    "Run as this user, without capabilities except those of --cap.",
    completes="user",
)
_CAP = Option(
    ("--cap", "-c"), "NAME,...", "Run with only these capabilities: net_bind_service,net_raw.",
    several=True, completes="capabilities",
)  # fmt: skip

RUN_OPTIONS = (
    *_LIMITS,
    _USER,
    _CAP,
    Option(
        ("--group", "-g"), "NAME",
        "Name the group of this command alone; by default its name and a number. --in shares one.",
    ),
    Option(
        ("--in",), "NAME",
        "Share the group NAME and its limits with other commands; the first makes it, the last removes it.",
    ),
    Option(("--policy",), "NAME", "Apply the limits, user and rights of this policy; options override its limits."),
    Option(("--settings",), "FILE", "The settings file that contains the policy.", completes="path"),
    Option(
        ("--export-cpus",), "",
        "Set PYTHON_CPU_COUNT and OMP_NUM_THREADS to the number of CPUs that --cpu and --cpus leave.",
    ),
    Option(("--timeout",), "TIME", "Kill the command, and all it started, after this time: 20s, 5m, 1h."),
    Option(("--grace",), "TIME", limit_table.BY_KEY["grace"].help),
    Option(
        ("--oom",), "group|process",
        "End all of the command after an OOM kill, or only that process; default: group, process on a terminal.",
        completes="oom",
    ),
    Option(
        ("--on-event",), "CMD", "Run CMD for each event, with the event as JSON on its input; it may print new limits."
    ),
    Option(
        ("--json",), "FILE", "Write the result and the usage to FILE; - is standard output.", completes="path"
    ),
    CGROUP,
)  # fmt: skip

ATTACH_OPTIONS = (
    *_LIMITS,
    Option(("--group", "-g"), "NAME", "Name the group; by default the first command's name and its pid."),
    Option(("--children",), "", "Include all descendants of the processes."),
    Option(("--release",), "", "Move processes, or all of a group, back to their previous cgroups."),
    CGROUP,
)

#: A memory limit expands only where rcon watches: rcon set refuses these two with the reason.
SET_OPTIONS = tuple(option._replace(hidden=option.name in ("expand", "up_to")) for option in _LIMITS)

CAPCON_OPTIONS = (
    _USER,
    Option(("--group", "-g"), "NAME|GID", "Use this group instead of the user's own.", completes="group"),
    Option(
        ("--groups",), "NAME,...", "Use only these supplementary groups instead of the user's; '' for none.",
        completes="groups",
    ),
    _CAP,
    Option(("--drop-all",), "", "Run without any capability."),
    Option(("--no-new-privs",), "", "Ignore setuid bits and file capabilities of all programs it runs."),
    Option(
        ("--read-only",), "PATH", "Allow reading and executing below PATH, and no other file (Landlock).",
        several=True, completes="path",
    ),
    Option(
        ("--write",), "PATH", "Allow reading and changing below PATH, and no other file (Landlock).",
        several=True, completes="path",
    ),
    Option(("--keep-env",), "", "Keep HOME, USER, LOGNAME and SHELL as they are."),
)  # fmt: skip

EXPLAIN_OPTIONS = (Option(("--json",), "", "Print JSON."), *CAPCON_OPTIONS)


class CommandLine(NamedTuple):
    """The values of the options that are given, by name, and the command to run.

    A value is text, True for a switch, or a list of texts for an option that may be given more than once.
    """

    options: dict[str, Any]
    command: tuple[str, ...]


def parse(words: Sequence[str], options: Sequence[Option]) -> CommandLine:
    """Parse options and then a command: the first word that is no option, or what follows ``--``.

    A value is the next word, or follows ``=`` (``--cpu=30%``) or a short flag (``-uwww-data``). The last value of an
    option counts. Values are not checked. Raises `BadUsage`, `HelpRequested`.
    """
    by_flag = {flag: option for option in options for flag in option.flags}
    given: dict[str, Any] = {}
    index = 0
    while index < len(words) and words[index].startswith("-") and words[index] != "-":
        word = words[index]
        index += 1
        if word == "--":
            break
        if word in ("--help", "-h"):
            raise HelpRequested
        flag, attached, value = _split(word)
        option = by_flag.get(flag)
        if option is None:
            raise BadUsage(_unknown(flag, by_flag))
        if not option.metavar:
            if attached:
                raise BadUsage(f"{flag} takes no value (leave out {value!r})")
            given[option.name] = True
            continue
        if not attached:
            if index == len(words):
                raise BadUsage(f"{flag} needs a value ({flag} {option.metavar})")
            value = words[index]
            index += 1
        if option.several:
            given.setdefault(option.name, []).append(value)
        else:
            given[option.name] = value
    command = tuple(words[index:])
    if not command:
        raise BadUsage("the command is missing (name a program after --)")
    if not command[0]:
        raise BadUsage("the command is empty (name a program after --)")
    return CommandLine(given, command)


def _split(word: str) -> tuple[str, bool, str]:
    """Return the flag, whether a value is attached to it, and that value."""
    if word.startswith("--"):
        flag, equals, value = word.partition("=")
        return flag, bool(equals), value
    return word[:2], len(word) > 2, word[2:]


def _unknown(flag: str, known: dict[str, Option]) -> str:
    import difflib

    near = difflib.get_close_matches(flag, [one for one in known if one.startswith("--")], n=1)
    return f"unknown option {flag!r} ({f'did you mean {near[0]}?' if near else 'a command goes after --'})"


def seconds_of(key: str, text: str) -> float:
    """Return the value of the option ``--key``, which takes a time, in seconds. Raises `BadUsage`."""
    try:
        return float(limit_table.BY_KEY[key].parse(text))
    except SettingsError as error:
        raise BadUsage(f"--{key}: {error}") from None


def named_base(option: str | None, setting: str | None = None) -> str | None:
    """Return the base cgroup of ``--cgroup``, the settings or the environment, in this order; None where none is named.

    The environment variable counts only outside of groups: inside, it would name a cgroup of another group. Raises
    `BadUsage` for a value that is not the path of a cgroup.
    """
    if option is not None:
        return _checked("--cgroup", option)
    if setting is not None:
        return setting
    variable = os.environ.get(CGROUP_VARIABLE)
    if not variable:
        return None
    from rcon_plugins.kernel.cgroup import Hierarchy
    from rcon_plugins.tree.nested import own_location

    location = own_location(Hierarchy.discover())
    return (
        None
        if location is not None and location.boundary is not None
        else _checked(CGROUP_VARIABLE, variable)
    )


def _checked(source: str, path: str) -> str:
    from rcon_plugins.settings.file import check_cgroup

    try:
        check_cgroup(path)
    except SettingsError as error:
        raise BadUsage(f"{source}: {error.problem} ({error.hint})") from None
    return path
