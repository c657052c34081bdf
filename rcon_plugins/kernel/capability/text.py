"""Three sets in the text form of libcap, both ways: cap_from_text(3), cap_to_text(3).

``cap_chown,cap_net_raw=ep cap_kill+i``: clauses with white space between them, each a list of capabilities (``all`` or
nothing for all) and operators with the sets they act on: ``=`` clears, then raises, ``+`` raises, ``-`` lowers in
``e``\\ ffective, ``i``\\ nheritable, ``p``\\ ermitted.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from rcon_plugins.kernel.capability.names import BITS, NUMBERS, last, name_of
from rcon_plugins.kernel.capability.sets import Capabilities

_LETTERS = ("e", "p", "i")  # bits 1, 2, 4 of a combination, in the order in which libcap counts
_WRITTEN = ((1, "e"), (4, "i"), (2, "p"))

_CLAUSE = re.compile(r"(?P<list>[A-Za-z0-9_,]*)(?P<actions>(?:(?:=[+-]|[=+-])[eip]*)+)")
_ACTION = re.compile(r"(=[+-]|[=+-])([eip]*)")


class Sets(NamedTuple):
    """The three sets that libcap's text form is about."""

    permitted: Capabilities = Capabilities()
    effective: Capabilities = Capabilities()
    inheritable: Capabilities = Capabilities()

    def text(self) -> str:
        """As cap_to_text(3) of libcap 2.66 writes it: ``cap_chown,cap_net_raw=ep``; ``=`` for nothing."""
        known = last() + 1
        found = [self._combination(number) for number in range(BITS)]
        counts = [found[:known].count(combination) for combination in range(8)]
        # What most have stands first, and of equals the smallest; the rest is told as what differs from it.
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
            # Beyond what the kernel knows, nothing prevails but their absence.
            unknown = [str(n) for n in range(known, BITS) if found[n] == combination]
            if unknown:
                text += " " + ",".join(unknown) + "+" + _letters(combination)
        return text

    def _combination(self, number: int) -> int:
        members = (self.effective, self.permitted, self.inheritable)
        return sum(1 << bit for bit, capabilities in enumerate(members) if number in capabilities)


def parse_text(text: str) -> Sets:
    """The sets that a text for cap_from_text(3) describes. ``all`` is what the running kernel has.

    Raises `ValueError` naming the clause.
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
    """As strtoul(3) with base 0 reads it: decimal, octal after 0, hexadecimal after 0x."""
    if re.fullmatch(r"0x[0-9a-f]+", text):
        return int(text, 16)
    if re.fullmatch(r"0[0-7]*", text):
        return int(text, 8)
    return int(text) if re.fullmatch(r"[1-9][0-9]*", text) else None
