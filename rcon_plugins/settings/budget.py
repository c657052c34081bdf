"""The budget: how much memory the work of a machine may be promised at once. ``[budget]`` in the settings."""

from __future__ import annotations

import re
from decimal import Decimal
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Self

import msgspec
from msgspec import Meta

from rcon_plugins.errors import SettingsError
from rcon_plugins.settings.units import Duration, Size, Written, show

if TYPE_CHECKING:
    from rcon_plugins.settings.policy import Policy

#: The limit that is named where work does not fit.
BUDGET = "budget.memory"
_SHARE = r"\d{1,3}(?:\.\d{1,3})?%"


class Portion(Written, str):
    """So much of the memory of a machine: ``"80%"`` of what it has, or a size, ``"6G"``."""

    __slots__ = ()
    schema: ClassVar[dict[str, Any]] = {
        "anyOf": [{"type": "string", "pattern": rf"^{_SHARE}$"}, *Size.schema["anyOf"]]
    }
    _hint = 'write "80%" of the memory of the machine, or a size, "6G"'

    @classmethod
    def parse(cls, value: object) -> Self:
        if isinstance(value, cls):
            return value
        if not isinstance(value, str) or not value.endswith("%"):
            size = Size.parse(value)
            if size < 2**20:
                raise SettingsError(
                    f"{show(value)} is less than 1M, in which it is counted", value=value, hint=cls._hint
                )
            return cls(str(size))
        if not re.fullmatch(_SHARE, value, re.ASCII) or not 0 < Decimal(value[:-1]) <= 100:
            raise SettingsError(f"{show(value)} is no share of the memory", value=value, hint=cls._hint)
        return cls(value)

    def of(self, total: int) -> int:
        """Bytes, on a machine that has ``total``."""
        return int(Decimal(self[:-1]) / 100 * total) if self.endswith("%") else int(Size.parse(str(self)))


class Budget(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What all the work that is under way at once may be promised together."""

    memory: Annotated[
        Portion,
        Meta(
            description="The memory limits of all single works together: of the machine's memory, or a size.",
            examples=["80%"],
        ),
    ]
    wait: Annotated[
        Duration,
        Meta(
            description="How long work waits until it fits in; then a request gets 503, a task goes back to its queue.",
            examples=["30s"],
        ),
    ] = msgspec.field(default_factory=lambda: Duration(10))


def promised(policy: Policy) -> Size | None:
    """The memory, in bytes, that one work of a policy may come to use; None where nothing limits it.

    Its own limit, else that of all the policy's work together; of one that expands, the most it becomes.
    """
    limit = policy.each.memory or policy.memory
    return None if limit is None else limit.most
