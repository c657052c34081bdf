"""Limits as they are said where there is nothing but text: options of a command, a command to workers far away."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from typing import Any, Final

import msgspec

from rcon_plugins.errors import SettingsError
from rcon_plugins.settings.conversion import one_of
from rcon_plugins.settings.memory import Memory

#: For what is to have no limit any more.
NO_LIMIT: Final = "max"
#: Keys of a policy, of its ``each`` and of ``io``, that can be without a limit again.
LIFTED: Final = frozenset(
    {
        *("cpu", "memory", "memory_high", "swap", "pids", "read", "write", "read_iops", "write_iops"),
        *("timeout", "timeout_soft", "memory_soft"),
    }
)
#: Keys of ``io``.
OF_IO: Final = ("read", "write", "read_iops", "write_iops")
#: What a settings file has as a number.
_NUMBERS: Final = frozenset({"cpu_weight", "pids", "read_iops", "write_iops"})


def is_lifted(key: str, text: str) -> bool:
    """Whether the text says that there is to be no limit."""
    return text == NO_LIMIT and key in LIFTED


def value_of(key: str, text: str) -> object:
    """What a settings file would hold for a key; a table is written as there. Raises `SettingsError`."""
    if text.startswith("{"):
        try:
            return tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            raise SettingsError(
                f"{text!r} is no table",
                value=text,
                hint='as in a settings file: { limit = "256M", expand = "2x", up_to = "1G" }',
            ) from None
    if key not in _NUMBERS:
        return text
    if not (text.isascii() and text.isdigit() and len(text) < 20):
        raise SettingsError(f"{text!r} is not a whole number", value=text, hint="for example 100")
    return int(text)


def device_and_key(name: str) -> tuple[str, str | None]:
    """What ``io.DEVICE.read`` names, without the ``io.``: device and key; None for all of the device.

    The device may be quoted as in a settings file. Raises `SettingsError`.
    """
    device, _, key = name.rpartition(".")
    if key not in OF_IO:
        device, key = name, ""
    device = device.removeprefix('"').removesuffix('"')
    if not device:
        raise SettingsError("no device is named", hint=f"io.DEVICE.KEY, the KEY {one_of(OF_IO)}")
    return device, key or None


def as_written(value: Any) -> Any:
    """A limit as plain data, spelled as a settings file has it; None where there is none."""
    if isinstance(value, Memory) and value.expands:
        return {"limit": str(value), "expand": str(value.expand), "up_to": str(value.up_to)}
    if isinstance(value, msgspec.Struct):
        told = msgspec.to_builtins(value, enc_hook=str)
        return {key: one for key, one in told.items() if one is not None}
    if isinstance(value, Mapping):
        return {key: as_written(one) for key, one in value.items()}
    return value if value is None or type(value) is int else str(value)
