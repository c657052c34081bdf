"""Limits as they are said where there is nothing but text: options of a command, a command to workers far away."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from typing import Any, Final

import msgspec

from rcon_plugins.errors import SettingsError
from rcon_plugins.settings.conversion import one_of
from rcon_plugins.settings.limit_table import BY_KEY, IO_LIMITS
from rcon_plugins.settings.memory import Memory
from rcon_plugins.settings.units import parse

#: For what is to have no limit any more.
NO_LIMIT: Final = "max"
#: Keys of ``io``.
IO_KEYS: Final = tuple(limit.key for limit in IO_LIMITS)


def removes(key: str, text: str) -> bool:
    """Whether the text removes this limit: it is ``max``, and the limit can be removed."""
    return text == NO_LIMIT and key in BY_KEY and BY_KEY[key].removable


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
    if key not in BY_KEY or BY_KEY[key].unit != "count":
        return text
    return parse("count", text)


def device_and_key(name: str) -> tuple[str, str | None]:
    """What ``io.DEVICE.read`` names, without the ``io.``: device and key; None for all of the device.

    The device may be quoted as in a settings file. Raises `SettingsError`.
    """
    device, _, key = name.rpartition(".")
    if key not in IO_KEYS:
        device, key = name, ""
    device = device.removeprefix('"').removesuffix('"')
    if not device:
        raise SettingsError("no device is named", hint=f"io.DEVICE.KEY, the KEY {one_of(IO_KEYS)}")
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
