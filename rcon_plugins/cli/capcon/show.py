"""``capcon show``: the user, groups and capability sets of a process or thread, as a table and as JSON."""

from __future__ import annotations

import errno
import grp
import json
import shutil
import textwrap
from collections.abc import Callable
from typing import Any

from rcon_plugins.cli.exit import Refused
from rcon_plugins.cli.request import find_account
from rcon_plugins.errors import KernelError
from rcon_plugins.kernel.capability import Capabilities, Ids, State, read_state

SETS = ("permitted", "effective", "inheritable", "ambient", "bounding")
SECUREBITS = (
    "noroot",
    "noroot_locked",
    "no_setuid_fixup",
    "no_setuid_fixup_locked",
    "keep_caps",
    "keep_caps_locked",
    "no_cap_ambient_raise",
    "no_cap_ambient_raise_locked",
)
_WIDTH = 100  # if standard output is not a terminal


def show(pid: int | None, as_json: bool) -> str:
    """Return the state of a process or thread, by default of this one, as text. Raises `Refused`."""
    try:
        state = read_state(pid)
    except KernelError as error:
        if error.errno in (errno.ESRCH, errno.ENOENT):
            raise Refused(f"there is no process {pid} (ps -e lists the processes)") from None
        raise
    return as_text(data(state)) if as_json else table(state)


def as_text(value: dict[str, Any]) -> str:
    """Return JSON text."""
    return json.dumps(value, indent=2)


def data(state: State) -> dict[str, Any]:
    """Return a state as data for JSON."""
    return {
        "uid": state.uids._asdict(),
        "gid": state.gids._asdict(),
        "groups": list(state.groups),
        **{name: list(getattr(state, name).names()) for name in SETS},
        "securebits": None if state.securebits is None else securebits(state.securebits),
        "no_new_privs": state.no_new_privs,
    }


def table(state: State) -> str:
    """Return a state as lines of labels and values, wrapped to the width of the terminal."""
    bits = (
        "unknown for other processes" if state.securebits is None else ", ".join(securebits(state.securebits))
    )
    rows = [
        ("uid", ids(state.uids, user_name)),
        ("gid", ids(state.gids, group_name)),
        ("groups", ", ".join(named(number, group_name) for number in state.groups) or "none"),
        *((name, listed(getattr(state, name))) for name in SETS),
        ("securebits", bits or "none"),
        ("no_new_privs", "yes" if state.no_new_privs else "no"),
    ]
    return "\n".join(row(*pair) for pair in rows)


def listed(capabilities: Capabilities) -> str:
    """Return the names, separated by commas. If nearly all capabilities are present, name the missing ones."""
    known = Capabilities.known()
    missing = known - capabilities
    if not missing:
        return f"all {len(capabilities)} capabilities"
    if len(missing) < len(known) // 4:
        return f"all capabilities but {', '.join(missing.names())}"
    return ", ".join(capabilities.names()) or "none"


def width() -> int:
    """Return the width of the terminal in columns."""
    return max(shutil.get_terminal_size((_WIDTH, 24)).columns, 40)


def row(label: str, value: str) -> str:
    """Return a line of a table, wrapped."""
    return textwrap.fill(
        value, width(), initial_indent=f"{label:<14}", subsequent_indent=" " * 14, break_on_hyphens=False
    )


def securebits(bits: int) -> list[str]:
    """Return the names of the bits that are set, from capabilities(7), in lower case and without SECBIT_."""
    names = [name for bit, name in enumerate(SECUREBITS) if bits >> bit & 1]
    rest = bits >> len(SECUREBITS) << len(SECUREBITS)
    return [*names, *([hex(rest)] if rest else [])]


def ids(numbers: Ids, name: Callable[[int], str | None]) -> str:
    """Return the four ids, or only one if all are equal."""
    if len(set(numbers)) == 1:
        return named(numbers.effective, name)
    return ", ".join(f"{which} {named(number, name)}" for which, number in numbers._asdict().items())


def named(number: int, name: Callable[[int], str | None]) -> str:
    """Return ``33 (www-data)``, or the number if it has no name."""
    found = name(number)
    return f"{number} ({found})" if found else str(number)


def user_name(uid: int) -> str | None:
    """Return the name of the account, or None."""
    account = find_account(uid)
    return None if account is None else account.pw_name


def group_name(gid: int) -> str | None:
    """Return the name of the group, or None."""
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return None
