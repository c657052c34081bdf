"""Limits as text: the options of a command, remote-control commands, and their spelling in a settings file."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from typing import Any, Final

import msgspec

from rcon_plugins.errors import SettingsError
from rcon_plugins.settings.conversion import one_of
from rcon_plugins.settings.limit_table import BY_KEY, IO_LIMITS
from rcon_plugins.settings.memory import Memory
from rcon_plugins.settings.units import format_factor, format_size, format_value, parse_count, show

#: The text that removes a limit.
NO_LIMIT: Final = "max"
#: Keys of ``io``.
IO_KEYS: Final = tuple(limit.key for limit in IO_LIMITS)


def removes(key: str, text: str) -> bool:
    """Return whether the text removes this limit: it is ``max``, and the limit can be removed."""
    return text == NO_LIMIT and key in BY_KEY and BY_KEY[key].removable


def value_of(key: str, text: str) -> object:
    """Return a key's value in the form of a settings file. ``text`` may be a TOML table. Raises `SettingsError`."""
    if text.startswith("{"):
        try:
            return tomllib.loads(f"value = {text}")["value"]
        except (ValueError, RecursionError):  # also of integers that Python does not read, and of deep tables
            raise SettingsError(
                f"{show(text)} is no table",
                value=text,
                hint='as in a settings file: { limit = "256M", expand = "2x", up_to = "1G" }',
            ) from None
    if key not in BY_KEY or BY_KEY[key].unit != "count":
        return text
    return parse_count(text)


def device_and_key(name: str) -> tuple[str, str | None]:
    """Split ``DEVICE.read`` into device and key; the key is None if the text names the whole device.

    The device may be quoted as in a settings file. Raises `SettingsError`.
    """
    device, _, key = name.rpartition(".")
    if key not in IO_KEYS:
        device, key = name, ""
    device = device.removeprefix('"').removesuffix('"')
    if not device:
        raise SettingsError("no device is named", hint=f"io.DEVICE.KEY, the KEY {one_of(IO_KEYS)}")
    return device, key or None


def as_written(key: str, value: Any) -> Any:
    """Return the value of a policy's key as plain data, spelled as in a settings file; None if it is not set."""
    if isinstance(value, Memory):
        if value.expand is None or value.up_to is None:
            return format_size(value.limit)
        return {
            "limit": format_size(value.limit),
            "expand": format_factor(value.expand),
            "up_to": format_size(value.up_to),
        }
    if isinstance(value, msgspec.Struct):
        fields = msgspec.structs.asdict(value)
        return {name: as_written(name, one) for name, one in fields.items() if one is not None}
    if isinstance(value, Mapping):
        return {device: as_written(key, one) for device, one in value.items()}
    if value is None or key not in BY_KEY or BY_KEY[key].unit == "count":
        return value
    return format_value(BY_KEY[key].unit, value)
