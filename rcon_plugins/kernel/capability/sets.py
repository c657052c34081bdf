"""Represent sets of capabilities as values, with their names (capabilities(7)) and the text form of libcap.

The text form describes three sets, as in cap_from_text(3) and cap_to_text(3): ``cap_chown,cap_net_raw=ep cap_kill+i``.
White space separates the clauses. A clause is a list of capabilities, then operators with the sets that they change.
``all``, or an empty list, stands for all capabilities. ``=`` clears and then raises, ``+`` raises, ``-`` lowers. The
sets are ``e``\\ ffective, ``i``\\ nheritable and ``p``\\ ermitted.
"""

from __future__ import annotations

import os
import posix
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

from rcon_plugins.errors import KernelError

CAP_CHOWN = 0
CAP_DAC_OVERRIDE = 1
CAP_DAC_READ_SEARCH = 2
CAP_FOWNER = 3
CAP_FSETID = 4
CAP_KILL = 5
CAP_SETGID = 6
CAP_SETUID = 7
CAP_SETPCAP = 8
CAP_LINUX_IMMUTABLE = 9
CAP_NET_BIND_SERVICE = 10
CAP_NET_BROADCAST = 11
CAP_NET_ADMIN = 12
CAP_NET_RAW = 13
CAP_IPC_LOCK = 14
CAP_IPC_OWNER = 15
CAP_SYS_MODULE = 16
CAP_SYS_RAWIO = 17
CAP_SYS_CHROOT = 18
CAP_SYS_PTRACE = 19
CAP_SYS_PACCT = 20
CAP_SYS_ADMIN = 21
CAP_SYS_BOOT = 22
CAP_SYS_NICE = 23
CAP_SYS_RESOURCE = 24
CAP_SYS_TIME = 25
CAP_SYS_TTY_CONFIG = 26
CAP_MKNOD = 27
CAP_LEASE = 28
CAP_AUDIT_WRITE = 29
CAP_AUDIT_CONTROL = 30
CAP_SETFCAP = 31
CAP_MAC_OVERRIDE = 32
CAP_MAC_ADMIN = 33
CAP_SYSLOG = 34
CAP_WAKE_ALARM = 35
CAP_BLOCK_SUSPEND = 36
CAP_AUDIT_READ = 37
CAP_PERFMON = 38  # Linux 5.8
CAP_BPF = 39  # Linux 5.8
CAP_CHECKPOINT_RESTORE = 40  # Linux 5.9

#: The names as libcap writes them, indexed by number.
NAMES: tuple[str, ...] = tuple(
    name.lower()
    for name, _ in sorted(
        ((name, number) for name, number in globals().items() if name.startswith("CAP_")),
        key=lambda item: item[1],
    )
)
NUMBERS: dict[str, int] = {name: number for number, name in enumerate(NAMES)}

#: The number of bits in a capability set of the kernel.
BITS = 64

_LAST = "/proc/sys/kernel/cap_last_cap"


def name_of(number: int) -> str:
    """Return the name, such as ``cap_net_raw``, or the number of a capability without a name here, as libcap does."""
    return NAMES[number] if number < len(NAMES) else str(number)


def number_of(name: str) -> int:
    """Return the number of ``cap_net_raw``, ``net_raw`` or ``13``, in upper or lower case. Raises `ValueError`."""
    text = name.strip().lower()
    if text.isascii() and text.isdigit() and int(text) < BITS:
        return int(text)
    number = NUMBERS.get(text, NUMBERS.get(f"cap_{text}"))
    if number is None:
        raise ValueError(
            f"{name!r} is not a capability; capabilities(7) lists them, for example net_bind_service"
        )
    return number


@cache
def last() -> int:
    """Return the highest capability of the running kernel (``/proc/sys/kernel/cap_last_cap``, Linux 3.2).

    Raises `KernelError` if the file cannot be read.
    """
    try:
        descriptor = os.open(_LAST, os.O_RDONLY | os.O_CLOEXEC)
        try:
            return int(os.read(descriptor, 32))
        finally:
            posix.close(descriptor)
    except OSError as error:
        raise KernelError.from_oserror(error, path=_LAST, hint="mount proc at /proc") from None


@dataclass(frozen=True, slots=True)
class Capabilities:
    """A set of capabilities: immutable, hashable, picklable. ``mask`` has bit N set for capability number N.

    ``|``, ``&`` and ``-`` combine two sets; ``<=`` and ``>=`` compare as sets do; ``in`` takes a number. Iteration
    yields the numbers in ascending order. Numbers without a name here are kept.
    """

    mask: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.mask < 1 << BITS:
            raise ValueError(f"{self.mask:#x} is no set of capabilities: it has {BITS} bits")

    @classmethod
    def none(cls) -> Capabilities:
        """Return the empty set."""
        return cls()

    @classmethod
    def known(cls) -> Capabilities:
        """Return all capabilities of the running kernel, also those without a name here."""
        return cls((1 << last() + 1) - 1)

    @classmethod
    def of(cls, *capabilities: str | int) -> Capabilities:
        """Return the set of these names and numbers. Raises `ValueError`.

        A name may lack ``cap_`` and may be in upper or lower case.
        """
        mask = 0
        for capability in capabilities:
            number = number_of(capability) if isinstance(capability, str) else capability
            if not 0 <= number < BITS:
                raise ValueError(f"{number} is not a capability: they have numbers from 0 to {BITS - 1}")
            mask |= 1 << number
        return cls(mask)

    @classmethod
    def parse(cls, text: str) -> Capabilities:
        """Parse ``"net_raw,cap_chown,41"``, ``"all"`` (of the running kernel), ``"none"`` or ``""``.

        Raises `ValueError`.
        """
        found = cls()
        if text.strip().lower() in ("", "none"):
            return found
        for part in text.split(","):
            found |= cls.known() if part.strip().lower() == "all" else cls.of(part)
        return found

    def names(self) -> tuple[str, ...]:
        """Return the names, such as ``("cap_chown", "41")``, in ascending order; a number where there is no name."""
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
        """Return the names separated by commas, as libcap does; ``none`` for the empty set. `parse` reads it."""
        return ",".join(self.names()) or "none"

    def __repr__(self) -> str:
        return f"Capabilities.parse({str(self)!r})" if self else "Capabilities()"


# -- the text form of libcap

_LETTERS = ("e", "p", "i")  # bits 1, 2, 4 of a combination, in libcap's order
_WRITTEN = ((1, "e"), (4, "i"), (2, "p"))

_CLAUSE = re.compile(r"(?P<list>[A-Za-z0-9_,]*)(?P<actions>(?:(?:=[+-]|[=+-])[eip]*)+)")
_ACTION = re.compile(r"(=[+-]|[=+-])([eip]*)")


class Sets(NamedTuple):
    """The three sets that libcap's text form describes."""

    permitted: Capabilities = Capabilities()
    effective: Capabilities = Capabilities()
    inheritable: Capabilities = Capabilities()

    def text(self) -> str:
        """Return the text that cap_to_text(3) of libcap 2.66 writes: ``cap_chown,cap_net_raw=ep``; ``=`` if empty."""
        known = last() + 1
        found = [self._combination(number) for number in range(BITS)]
        counts = [found[:known].count(combination) for combination in range(8)]
        # The most frequent combination comes first (of equals the smallest); the others are written as differences.
        most = min(range(8), key=lambda combination: (-counts[combination], combination))
        text = "=" + _letters(most)
        for combination in reversed(range(8)):
            if combination == most or not counts[combination]:
                continue
            text += " " + ",".join(name_of(n) for n in range(known) if found[n] == combination)
            raised, lowered = combination & ~most, most & ~combination
            if raised:
                # "= cap_chown+ep" is written "cap_chown=ep".
                shorter = text.startswith("= ")
                text = (text[2:] + "=" if shorter else text + "+") + _letters(raised)
            if lowered:
                text += "-" + _letters(lowered)
        for combination in reversed(range(1, 8)):
            # Capabilities that the kernel does not know are written only where they are set.
            unknown = [str(n) for n in range(known, BITS) if found[n] == combination]
            if unknown:
                text += " " + ",".join(unknown) + "+" + _letters(combination)
        return text

    def _combination(self, number: int) -> int:
        members = (self.effective, self.permitted, self.inheritable)
        return sum(1 << bit for bit, capabilities in enumerate(members) if number in capabilities)


def parse_text(text: str) -> Sets:
    """Parse a text for cap_from_text(3). ``all`` stands for all capabilities of the running kernel.

    Raises `ValueError`, which names the clause.
    """
    masks = dict.fromkeys(_LETTERS, 0)
    for clause in text.split():
        found = _CLAUSE.fullmatch(clause)
        if found is None:
            raise ValueError(f"{clause!r} is not a clause such as cap_chown,cap_net_raw=ep: cap_from_text(3)")
        listed = _listed(found["list"], clause)
        for position, (operator, letters) in enumerate(_ACTION.findall(found["actions"])):
            _check(operator, letters, position, bool(found["list"]), clause)
            if operator.startswith("="):
                for letter in _LETTERS:
                    masks[letter] &= ~listed
            for letter in letters:
                if operator.endswith("-"):
                    masks[letter] &= ~listed
                else:
                    masks[letter] |= listed
    return Sets(Capabilities(masks["p"]), Capabilities(masks["e"]), Capabilities(masks["i"]))


def _letters(combination: int) -> str:
    return "".join(letter for bit, letter in _WRITTEN if combination & bit)


def _check(operator: str, letters: str, position: int, has_list: bool, clause: str) -> None:
    if position > 0 and operator.startswith("="):
        raise ValueError(f"{clause!r}: = can only be the first operator of a clause")
    if operator != "=" and not letters:
        raise ValueError(f"{clause!r}: only = can stand without a letter of e, i, p")
    if not has_list and (operator != "=" or position > 0):
        raise ValueError(f"{clause!r}: {operator} needs capabilities before it, or all")


def _listed(text: str, clause: str) -> int:
    if not text:
        return Capabilities.known().mask
    mask = 0
    for name in text.lower().split(","):
        if name == "all":
            mask |= Capabilities.known().mask
            continue
        number = NUMBERS.get(name)
        if number is None:
            number = _number(name)
        if number is None or number >= BITS:
            raise ValueError(f"{clause!r}: {name!r} is not a capability")
        mask |= 1 << number
    return mask


def _number(text: str) -> int | None:
    """Parse a number as strtoul(3) with base 0 does: decimal, octal after 0, hexadecimal after 0x."""
    if re.fullmatch(r"0x[0-9a-f]+", text):
        return int(text, 16)
    if re.fullmatch(r"0[0-7]*", text):
        return int(text, 8)
    return int(text) if re.fullmatch(r"[1-9][0-9]*", text) else None
