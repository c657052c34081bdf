"""The budget: the memory that may be reserved on a machine at once. ``[budget]`` in the settings."""

from __future__ import annotations

import re
from decimal import Decimal
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Self

import msgspec
from msgspec import Meta

from rcon_plugins.errors import SettingsError
from rcon_plugins.settings.conversion import Duration, Written
from rcon_plugins.settings.units import UNITS, format_size, parse_size, show

if TYPE_CHECKING:
    from rcon_plugins.settings.policy import Policy

#: The limit to name when a request or task does not fit.
BUDGET = "budget.memory"
_SHARE = r"\d{1,3}(?:\.\d{1,3})?%"


class Portion(Written, str):
    """A part of the memory of a machine: ``"80%"`` of what it has, or a size, ``"6G"``."""

    __slots__ = ()
    schema: ClassVar[dict[str, Any]] = {
        "anyOf": [{"type": "string", "pattern": rf"^{_SHARE}$"}, *UNITS["size"].schema["anyOf"]]
    }
    _hint = 'write "80%" of the memory of the machine, or a size, "6G"'

    @classmethod
    def parse(cls, value: object) -> Self:
        if isinstance(value, cls):
            return value
        if not isinstance(value, str) or not value.endswith("%"):
            size = parse_size(value)
            if size < 2**20:
                raise SettingsError(
                    f"{show(value)} is less than 1M, in which it is counted", value=value, hint=cls._hint
                )
            return cls(format_size(size))
        if not re.fullmatch(_SHARE, value, re.ASCII) or not 0 < Decimal(value[:-1]) <= 100:
            raise SettingsError(f"{show(value)} is no share of the memory", value=value, hint=cls._hint)
        return cls(value)

    def of(self, total: int) -> int:
        """Return the number of bytes, on a machine with ``total`` bytes of memory."""
        return int(Decimal(self[:-1]) / 100 * total) if self.endswith("%") else parse_size(str(self))


class Budget(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The memory that all requests and tasks under way may reserve together."""

    memory: Annotated[
        Portion,
        Meta(
            description="Memory for all requests and tasks under way: a share of the machine's memory, or a size.",
            examples=["80%"],
        ),
    ]
    wait: Annotated[
        Duration,
        Meta(
            description="How long to wait for memory; then a request gets 503, and a task goes back to its queue.",
            examples=["30s"],
        ),
    ] = msgspec.field(default_factory=lambda: 10.0)  # not in the schema, where it would have no unit


def promised(policy: Policy) -> int | None:
    """Return the most memory, in bytes, that one request or task of a policy may use; None without a limit.

    That is ``each.memory``, else ``memory``. For a limit that expands it is the upper bound.
    """
    limit = policy.each.memory or policy.memory
    return None if limit is None else limit.most
