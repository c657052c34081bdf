"""Sets of capabilities, as values."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from rcon_plugins.kernel.capability.names import BITS, last, name_of, number_of


@dataclass(frozen=True, slots=True)
class Capabilities:
    """A set of capabilities: immutable, hashable, picklable. ``mask`` has bit N set for capability number N.

    ``|``, ``&`` and ``-`` combine, ``<=`` and ``>=`` compare as sets do, ``in`` takes a number, iterating gives the
    numbers from the lowest. Numbers that have no name here are kept.
    """

    mask: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.mask < 1 << BITS:
            raise ValueError(f"{self.mask:#x} is no set of capabilities: it has {BITS} bits")

    @classmethod
    def none(cls) -> Capabilities:
        """The empty set."""
        return cls()

    @classmethod
    def known(cls) -> Capabilities:
        """All that the running kernel has, named here or not."""
        return cls((1 << last() + 1) - 1)

    @classmethod
    def of(cls, *capabilities: str | int) -> Capabilities:
        """The set of these names (with ``cap_`` or without, in any case) and numbers. Raises `ValueError`."""
        mask = 0
        for capability in capabilities:
            number = number_of(capability) if isinstance(capability, str) else capability
            if not 0 <= number < BITS:
                raise ValueError(f"{number} is not a capability: they have numbers from 0 to {BITS - 1}")
            mask |= 1 << number
        return cls(mask)

    @classmethod
    def parse(cls, text: str) -> Capabilities:
        """``"net_raw,cap_chown,41"``, ``"all"`` (of this kernel), ``"none"`` or ``""``. Raises `ValueError`."""
        found = cls()
        if text.strip().lower() in ("", "none"):
            return found
        for part in text.split(","):
            found |= cls.known() if part.strip().lower() == "all" else cls.of(part)
        return found

    def names(self) -> tuple[str, ...]:
        """``("cap_chown", "41")``, from the lowest number; a number where there is no name."""
        return tuple(name_of(number) for number in self)

    def __or__(self, other: Capabilities) -> Capabilities:
        return Capabilities(self.mask | other.mask)

    def __and__(self, other: Capabilities) -> Capabilities:
        return Capabilities(self.mask & other.mask)

    def __sub__(self, other: Capabilities) -> Capabilities:
        return Capabilities(self.mask & ~other.mask)

    def __le__(self, other: Capabilities) -> bool:
        return not self.mask & ~other.mask

    def __ge__(self, other: Capabilities) -> bool:
        return other <= self

    def __contains__(self, number: object) -> bool:
        return isinstance(number, int) and 0 <= number < BITS and bool(self.mask >> number & 1)

    def __len__(self) -> int:
        return self.mask.bit_count()

    def __iter__(self) -> Iterator[int]:
        return (number for number in range(self.mask.bit_length()) if self.mask >> number & 1)

    def __str__(self) -> str:
        """Names with commas between them, as libcap writes a list; ``none`` for the empty set. `parse` reads it."""
        return ",".join(self.names()) or "none"

    def __repr__(self) -> str:
        return f"Capabilities.parse({str(self)!r})" if self else "Capabilities()"
