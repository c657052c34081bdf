"""Options that set limits as a policy: ``--cpu 30% --memory 512M``.

Units, checks and remedies are those of a policy file: an option becomes the key of a policy, and an error names the
option.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rcon_plugins.cli.exit import BadUsage
from rcon_plugins.errors import SettingsError
from rcon_plugins.settings.limit_table import BY_KEY, OPTIONS
from rcon_plugins.settings.limit_text import IO_KEYS, value_of
from rcon_plugins.settings.policy import Policy

_EXPANSION = ("expand", "up_to")
#: The name of the policy that the options make; messages leave it out.
_POLICY = "command"


def limits_of(options: Mapping[str, Any], **more: object) -> Policy:
    """Return the policy that the options set, checked as one of a policy file is.

    Other ``options`` are ignored; ``more`` are further keys of a policy. Raises `BadUsage`: one line that begins with
    the option and ends with the remedy.
    """
    try:
        return Policy.make(_POLICY, **policy_keys(options), **more)
    except SettingsError as error:
        raise refused(error) from None


def policy_keys(options: Mapping[str, Any]) -> dict[str, object]:
    """Return what a policy file would hold for these options, unchecked. Raises `BadUsage`."""
    given = {
        option.key: _value(option.key, str(options[option.key]))
        for option in OPTIONS
        if options.get(option.key) is not None
    }
    limits = {key: given.pop(key) for key in IO_KEYS if key in given}
    device = given.pop("device", None)
    if limits:
        given["io"] = {_device(device): limits}
    elif device is not None:
        raise BadUsage("--device limits nothing by itself (add --read, --write, --read-iops or --write-iops)")
    expansion = {key: given.pop(key) for key in _EXPANSION if key in given}
    if expansion:
        for key in ("memory", *_EXPANSION):
            if key not in expansion and key not in given:
                others = " and ".join(BY_KEY[one].flag for one in expansion)
                raise BadUsage(f"{others} needs {BY_KEY[key].flag} (add it)")
        given["memory"] = {"limit": given["memory"], **expansion}
    return given


def refused(error: SettingsError) -> BadUsage:
    """Return the error in a policy made of options, with the flag of its key."""
    flag = _flag((error.key or "").removeprefix(f"policy.{_POLICY}."))
    hint = f" ({error.hint})" if error.hint else ""
    return BadUsage(f"{flag}: {error.problem}{hint}" if flag else f"{error.problem}{hint}")


def _flag(key: str) -> str | None:
    if key.startswith("io."):
        last = key.rpartition(".")[2]
        return BY_KEY[last].flag if last in IO_KEYS else "--device"
    if key.startswith("memory.") and (last := key.rpartition(".")[2]) in _EXPANSION:
        return BY_KEY[last].flag
    first = key.partition(".")[0].partition("[")[0]
    return BY_KEY[first].flag if first in BY_KEY else None


def _value(key: str, text: str) -> object:
    try:
        return text if key in ("device", *_EXPANSION) else value_of(key, text)
    except SettingsError as error:
        raise BadUsage(f"{BY_KEY[key].flag}: {error}") from None


def _device(named: object) -> str:
    """As the policy spells it: MAJ:MIN stays, and a path becomes an absolute one."""
    text = "." if named is None else str(named)
    if not text:
        raise BadUsage("--device: the path is empty: name a file or folder on the disk, or MAJOR:MINOR")
    return text if ":" in text and "/" not in text else str(Path(text).absolute())
