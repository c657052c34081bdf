"""A memory limit, which may expand: ``memory = "256M"``, or ``{ limit = "256M", expand = "2x", up_to = "1G" }``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, ClassVar, Final, Self, TypeVar

import msgspec
from msgspec import Meta

from rcon_plugins.errors import SettingsError
from rcon_plugins.settings.conversion import Factor, MemorySize, Written
from rcon_plugins.settings.limit_table import PAGE
from rcon_plugins.settings.units import UNITS, format_size, parse_factor, parse_memory

_T = TypeVar("_T")
_EXAMPLES: Final = {"limit": '"256M"', "expand": '"2x"', "up_to": '"1G"'}
_TABLE: Final = '{ limit = "256M", expand = "2x", up_to = "1G" }'
_SIZE: Final = UNITS["memory"].schema


class Memory(msgspec.Struct, Written, frozen=True):
    """A memory limit in bytes, which may expand. `parse` makes one of text: ``Memory.parse("256M")``.

    ``limit`` is multiplied by ``expand`` each time it is hit, up to ``up_to`` bytes; both are None where it does not
    expand.
    """

    limit: int
    expand: float | None = None
    up_to: int | None = None

    schema: ClassVar[dict[str, Any]] = {
        "anyOf": [
            *_SIZE["anyOf"],
            {
                "type": "object",
                "properties": {
                    "limit": {**_SIZE, "description": "Bytes at the start.", "examples": ["256M"]},
                    "expand": {
                        **UNITS["factor"].schema,
                        "description": "Factor by which the limit grows each time it is hit.",
                        "examples": ["2x"],
                    },
                    "up_to": {
                        **_SIZE,
                        "description": "Bytes up to which the limit grows. The kernel kills processes that need more.",
                        "examples": ["1G"],
                    },
                },
                "required": ["limit", "expand", "up_to"],
                "additionalProperties": False,
            },
        ]
    }

    @classmethod
    def parse(cls, value: object) -> Self:
        """Return the limit that ``value`` means in a settings file: a size, or a table that says how it expands.

        Raises `SettingsError`, with the key within the table.
        """
        if isinstance(value, cls):
            return value
        if not isinstance(value, Mapping):
            return cls(parse_memory(value))
        for key in value:
            if key not in _EXAMPLES:
                raise SettingsError("unknown key", key=str(key), value=value[key], hint=f"as in {_TABLE}")
        for key, example in _EXAMPLES.items():
            if key not in value:
                raise SettingsError(f"the key {key!r} is missing", hint=f"{key} = {example}, as in {_TABLE}")
        limit, up_to = _parsed(value, "limit", parse_memory), _parsed(value, "up_to", parse_memory)
        expand = _parsed(value, "expand", parse_factor)
        if up_to <= limit:
            raise SettingsError(
                f"{format_size(up_to)} is not above limit = {format_size(limit)}",
                key="up_to",
                value=up_to,
                hint="name more, or leave expand out",
            )
        return cls(limit, expand, up_to)

    @property
    def most(self) -> int:
        """The final bound in bytes: ``up_to``, or the limit itself if it does not expand."""
        return self.limit if self.up_to is None else self.up_to

    @property
    def expands(self) -> bool:
        """Whether the limit expands."""
        return self.up_to is not None

    def after(self, limit: int) -> int:
        """Return the next limit after a limit of ``limit`` bytes was hit, in bytes: whole pages, at most `most`."""
        if self.expand is None:
            return self.limit
        grown = int(limit * self.expand)
        return min(self.most, max(grown, limit + PAGE) // PAGE * PAGE)

    def describe(self) -> str:
        """Return the bound for a message: ``1G (up_to; expanded 4 times from 64M)``."""
        first = format_size(self.limit)
        if not self.expands:
            return first
        count, limit = 0, self.limit
        while limit < self.most:
            limit = self.after(limit)
            count += 1
        times = "once" if count == 1 else f"{count} times"
        return f"{format_size(self.most)} (up_to; expanded {times} from {first})"


def check_a_page(size: int | None, key: str) -> None:
    """Raise `SettingsError` for a memory limit below one page; None is "not set"."""
    if size is not None and size < PAGE:
        text = format_size(size)
        hint = f'write "{text}M"?' if size and text.isdigit() else 'at least "4K"'
        raise SettingsError(f"{size} bytes are less than one page", key=key, value=size, hint=hint)


class OnMemory(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The memory of a task that ran out of it and is retried: ``expand`` times as much, up to ``up_to``."""

    expand: Annotated[
        Factor,
        Meta(
            description="Factor by which the memory grows each time the task ran out of it.", examples=["2x"]
        ),
    ]
    up_to: Annotated[
        MemorySize,
        Meta(
            description="Bytes up to which it grows. A task that needs more is not retried.", examples=["2G"]
        ),
    ]

    def after(self, limit: int, deaths: int) -> int:
        """Return the memory, in bytes, after so many kills of a task whose limit was ``limit`` bytes at the start."""
        most = max(self.up_to, limit)
        try:
            return int(min(limit * self.expand**deaths, most))
        except OverflowError:
            return most


def _parsed(table: Mapping[str, object], key: str, parse: Callable[[object], _T]) -> _T:
    try:
        return parse(table[key])
    except SettingsError as error:
        error.key = key
        raise
