"""The built-in behaviour, as plugins on the same hooks that third parties get."""

from __future__ import annotations

from rcon_plugins.settings.units import Size


def in_bytes(size: Size | None) -> int | None:
    """The plain number: a `Size` turns into text as settings spell it, ``64M``, which is not what the kernel reads."""
    return None if size is None else int(size)
