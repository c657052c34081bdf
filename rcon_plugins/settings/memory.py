"""A memory limit, which may expand: ``memory = "256M"``, or ``{ limit = "256M", expand = "2x", up_to = "1G" }``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from decimal import Decimal
from typing import Annotated, Any, ClassVar, Self, SupportsFloat, TypeVar

import msgspec
from msgspec import Meta

from rcon_plugins.errors import SettingsError
from rcon_plugins.settings.units import Size, WrittenNumber, show

_PAGE = 4096
_TIMES = r"\d{1,3}(?:\.\d{1,3})?x"


class Factor(WrittenNumber, float):
    """A factor: ``"2x"``, ``"1.5x"``. At least 1.1, at most 100."""

    __slots__ = ()
    schema: ClassVar[dict[str, Any]] = {"type": "string", "pattern": rf"^{_TIMES}$"}
    _hint = '"2x" is twice as much each time, "1.5x" half as much again'

    @classmethod
    def parse(cls, value: object) -> Self:
        if isinstance(value, cls):
            return value
        if not isinstance(value, str) or not re.fullmatch(_TIMES, value, re.ASCII):
            raise SettingsError(f"{show(value)} does not say how many times", value=value, hint=cls._hint)
        times = Decimal(value[:-1])
        if not Decimal("1.1") <= times <= 100:
            raise SettingsError(f"{show(value)} is not between 1.1x and 100x", value=value, hint=cls._hint)
        return cls(float(times))

    def __str__(self) -> str:
        return f"{float(self):g}x"


class Memory(Size):
    """Bytes of memory, as a `Size`, which may expand.

    The limit is multiplied by ``expand`` each time it is hit, up to ``up_to``; both are None where it does not expand.
    ``most`` is the final bound. As a number, and as text, it is the limit at the start.
    """

    expand: Factor | None
    up_to: Size | None

    schema: ClassVar[dict[str, Any]] = {
        "anyOf": [
            *Size.schema["anyOf"],
            {
                "type": "object",
                "properties": {
                    "limit": {**Size.schema, "description": "Bytes at the start.", "examples": ["256M"]},
                    "expand": {
                        **Factor.schema,
                        "description": "Factor by which the limit grows each time it is hit.",
                        "examples": ["2x"],
                    },
                    "up_to": {
                        **Size.schema,
                        "description": "Bytes up to which the limit grows. The kernel kills processes that need more.",
                        "examples": ["1G"],
                    },
                },
                "required": ["limit", "expand", "up_to"],
                "additionalProperties": False,
            },
        ]
    }
    _keys: ClassVar[dict[str, str]] = {"limit": '"256M"', "expand": '"2x"', "up_to": '"1G"'}
    _example: ClassVar[str] = '{ limit = "256M", expand = "2x", up_to = "1G" }'

    def __new__(
        cls, value: str | SupportsFloat, expand: Factor | None = None, up_to: Size | None = None
    ) -> Self:
        made = super().__new__(cls, value)
        if isinstance(value, Memory) and expand is None and up_to is None:
            expand, up_to = value.expand, value.up_to
        if expand is not None or up_to is not None:
            made.expand, made.up_to = expand, up_to
        elif "expand" not in vars(made):
            made.expand = made.up_to = None
        return made

    @property
    def most(self) -> Size:
        """The final bound: ``up_to``, or the limit itself if it does not expand."""
        return self if self.up_to is None else self.up_to

    @property
    def expands(self) -> bool:
        """Whether the limit expands."""
        return self.up_to is not None

    def after(self, limit: int) -> int:
        """Return the next limit after a limit of ``limit`` bytes was hit, in bytes: whole pages, at most `most`."""
        if self.expand is None:
            return int(self)
        grown = int(limit * self.expand)
        return min(int(self.most), max(grown, limit + _PAGE) // _PAGE * _PAGE)

    def describe(self) -> str:
        """Return the bound for a message: ``1G (up_to; expanded 4 times from 64M)``."""
        if not self.expands:
            return str(self)
        count, limit = 0, int(self)
        while limit < self.most:
            limit = self.after(limit)
            count += 1
        return f"{self.most} (up_to; expanded {'once' if count == 1 else f'{count} times'} from {self})"

    @classmethod
    def parse(cls, value: object) -> Self:
        if isinstance(value, cls):
            return value
        if not isinstance(value, Mapping):
            return cls(int(Size.parse(value)))
        for key in value:
            if key not in cls._keys:
                raise SettingsError(
                    "unknown key", key=str(key), value=value[key], hint=f"as in {cls._example}"
                )
        for key, example in cls._keys.items():
            if key not in value:
                raise SettingsError(
                    f"the key {key!r} is missing", hint=f"{key} = {example}, as in {cls._example}"
                )
        limit, up_to = _part(value, "limit", Size), _part(value, "up_to", Size)
        expand = _part(value, "expand", Factor)
        if up_to <= limit:
            raise SettingsError(
                f"{up_to} is not above limit = {limit}",
                key="up_to",
                value=up_to,
                hint="name more, or leave expand out",
            )
        return cls(int(limit), expand, up_to)

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Memory):
            return (int(self), self.expand, self.up_to) == (int(other), other.expand, other.up_to)
        return int(self) == other

    def __ne__(self, other: object) -> bool:
        return not self == other  # int.__ne__ would compare the numbers alone

    def __hash__(self) -> int:
        return hash(int(self))

    def __repr__(self) -> str:
        if self.up_to is None:
            return super().__repr__()
        return f"Memory({str(self)!r}, expand={self.expand!r}, up_to={self.up_to!r})"


class OnMemory(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The memory of a task that ran out of it and is retried: ``expand`` times as much, up to ``up_to``."""

    expand: Annotated[
        Factor,
        Meta(
            description="Factor by which the memory grows each time the task ran out of it.", examples=["2x"]
        ),
    ]
    up_to: Annotated[
        Size,
        Meta(
            description="Bytes up to which it grows. A task that needs more is not retried.", examples=["2G"]
        ),
    ]

    def after(self, limit: Memory, deaths: int) -> int:
        """Return the memory, in bytes, after so many kills of a task whose limit was ``limit`` at the start."""
        return min(int(limit * self.expand**deaths), max(self.up_to, limit))


_Part = TypeVar("_Part", Size, Factor)


def _part(value: Mapping[str, object], key: str, kind: type[_Part]) -> _Part:
    try:
        return kind.parse(value[key])
    except SettingsError as error:
        error.key = key
        raise
