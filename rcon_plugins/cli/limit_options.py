"""The options that set limits, the same for every command that takes them: ``--cpu 30% --memory 512M``.

Units, checks and remedies are those of a policy file: an option becomes the policy's key, and a fault in it names the
option::

    @click.command()
    @limit_options
    def run(**options: Any) -> int:
        limits = limits_of(options)
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import click

from rcon_plugins.errors import SettingsError
from rcon_plugins.settings.limit_table import BY_KEY, OPTIONS
from rcon_plugins.settings.limit_words import IO_KEYS, value_of
from rcon_plugins.settings.policy import Policy

_EXPANSION = ("expand", "up_to")
#: Policies that commands make have this name; it is not shown.
_POLICY = "command"


def limit_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Give a click command all of `OPTIONS`, as text and None where not given."""
    return _with_options(function, hidden=())


def limit_options_at_once(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same where nobody watches: those that expand are taken, to be refused with a reason, and are in no help."""
    return _with_options(function, hidden=_EXPANSION)


def _with_options(function: Callable[..., Any], hidden: Collection[str]) -> Callable[..., Any]:
    for option in reversed(OPTIONS):
        function = click.option(
            option.flag, metavar=option.metavar, help=option.help, hidden=option.key in hidden
        )(function)
    return function


def limits_of(options: Mapping[str, Any], **more: object) -> Policy:
    """The limits that the options ask for, checked as a policy file's are.

    ``options`` may hold others besides, which are left alone; ``more`` are further keys of a policy. Raises
    `click.UsageError`, in one line that begins with the option and has the remedy.
    """
    try:
        return Policy.make(_POLICY, **policy_keys(options), **more)
    except SettingsError as error:
        raise refused(error) from None


def policy_keys(options: Mapping[str, Any]) -> dict[str, object]:
    """What a policy file would hold for these options; nothing in it is checked. Raises `click.UsageError`."""
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
        raise click.UsageError("--device without --read, --write, --read-iops or --write-iops limits nothing")
    expansion = {key: given.pop(key) for key in _EXPANSION if key in given}
    if expansion:
        for key in ("memory", *_EXPANSION):
            if key not in expansion and key not in given:
                others = " and ".join(BY_KEY[one].flag for one in expansion)
                raise click.UsageError(f"{others} without {BY_KEY[key].flag} expands nothing: add it")
        given["memory"] = {"limit": given["memory"], **expansion}
    return given


def refused(error: SettingsError, others: Mapping[str, str] | None = None) -> click.UsageError:
    """The fault in a policy made of options, told of the option. ``others``: flags of further keys of the policy."""
    flag = _flag((error.key or "").removeprefix(f"policy.{_POLICY}."), others or {})
    hint = f" ({error.hint})" if error.hint else ""
    return click.UsageError(f"{flag}: {error.problem}{hint}" if flag else f"{error.problem}{hint}")


def flags_of(keys: Iterable[str]) -> list[str]:
    """The flags of keys of a policy, as ``io./srv.read``, for messages; a key without one stays as it is."""
    return [_flag(key, {}) or key for key in keys]


def _flag(key: str, others: Mapping[str, str]) -> str | None:
    if key in others:
        return others[key]
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
        raise click.UsageError(f"{BY_KEY[key].flag}: {error}") from None


def _device(named: object) -> str:
    """As the policy spells it: MAJ:MIN stays, and a path becomes an absolute one."""
    text = "." if named is None else str(named)
    if not text:
        raise click.UsageError(
            "--device: the path is empty: name a file or folder on the disk, or MAJOR:MINOR"
        )
    return text if ":" in text and "/" not in text else str(Path(text).absolute())
