"""Bound what it costs to decode an answer, before the decoder begins. A decoder in our own process cannot be stopped.

One pass over the bytes counts what a decoder would make of them. `check` refuses data that would take

- more memory than `MEMORY_FACTOR` times its length; data below `SMALL` bytes counts as so long;
- more CPU time than `MAX_SECONDS`, for data of the usual length;
- containers nested deeper than `MAX_DEPTH`: what is decoded must also be encoded again for the result backend.

The costs were measured with CPython 3.11. They are upper bounds: every value counts as the most expensive one of its
kind. ``python -m tests.fuzz decoding`` searches for inputs that cost more.

Only the formats that Celery itself brings are known: JSON, YAML, msgpack. Pickle is code, and runs as long as it likes;
an application that accepts it trusts its tasks. Of what a serializer of the application itself reads, ``max_result``
bounds the length alone. A worker names both at its start.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from typing import Final, NamedTuple

#: The most memory that decoded data takes, as a multiple of its length.
MEMORY_FACTOR: Final = 8
#: Shorter data may take as much memory as data of so many bytes.
SMALL: Final = 2**20
#: The most CPU time that the check and the decoder take for data up to ``USUAL`` bytes, the default of ``max_result``;
#: seconds. It grows with longer data: who raises ``max_result`` allows more time, too. What is left of 0.2 s is for
#: receiving an answer, and for encoding it again for the result backend.
MAX_SECONDS: Final = 0.13
USUAL: Final = 16 * 2**20
#: The deepest nesting of lists and mappings.
MAX_DEPTH: Final = 100
#: The longest YAML, bytes, and the most brackets in it. Its decoder is written in Python and takes up to 20
#: microseconds for a byte, 35 for a bracket. Merged keys cost the square of the length.
MAX_YAML, _MAX_YAML_BRACKETS = 6 * 1024, 1000
#: The most aliases of YAML with more than one merged key. PyYAML before 6.0.4 copies what such a key names, so that
#: each mapping that merges another twice has twice as much. No serializer writes merged keys.
_MAX_MERGED_ALIASES: Final = 10

Data = bytes | bytearray

JSON: Final = "application/json"
YAML: Final = "application/x-yaml"
MSGPACK: Final = "application/x-msgpack"
PICKLE: Final = "application/x-python-serialize"

#: Data with at most so many bytes needs no check of its cost, only of its depth.
_HARMLESS: Final = 32 * 1024
#: How many bytes to take apart at once.
_PIECE: Final = 64 * 1024
#: Numbers with so many characters are long. What a number costs for each character grows with its length.
_LONG_NUMBER: Final = 33
#: The most digits of a number. Python's own limit is the same, but an application can lift it.
_MAX_DIGITS: Final = 4300
#: What it costs to look at one value of msgpack, nanoseconds; at one with a length; to make one of an extension type,
#: which is code in Python, and to encode it again.
_NS_MSGPACK, _NS_MSGPACK_SIZED, _NS_MSGPACK_EXTENSION = 500, 900, 3000
#: The most distinct keys that are remembered while keys are counted.
_MAX_KEYS: Final = 10_000

#: Numbers with so many characters, digits and a point, have more than a double holds and need long arithmetic.
_INEXACT: Final = 18
#: What such a number costs more, and one with an exponent, such as 1e-400. What it costs to make an object that kombu
#: writes as a mapping of ``__type__`` and ``__value__``, such as a UUID, and to encode it again. Nanoseconds.
_NS_INEXACT, _NS_EXPONENT, _NS_OBJECT = 150, 1000, 4000
#: How somebody hides the key ``__type__`` who escapes a character of it, U+005F or U+0065 to U+0079. Nobody else does.
_HIDDEN: Final = (rb"\u005", rb"\u006", rb"\u007")

# Memory, in bytes. A mapping of one key has the size of one of five; ``_MORE_KEYS`` is for each further key.
_LIST, _DICT, _MORE_KEYS, _DISTINCT_KEY, _SLOT, _VALUE, _STRING = 96, 192, 24, 128, 10, 32, 64
_EXTENSION: Final = 160
# CPU time of the check and the decoder together, in nanoseconds.
_NS_CONTAINER, _NS_KEY, _NS_ITEM, _NS_STRING, _NS_LONG_NUMBER, _NS_BYTE, _NS_MEMORY = (
    360,
    120,
    80,
    100,
    1300,
    4,
    1,
)
#: For a backslash, in the pass that finds the ends of strings, and for each string that may have one, nanoseconds.
_NS_ESCAPE, _NS_ESCAPED_STRING = 12, 150

_DIGITS: Final = bytes(0x30 if chr(byte) in "0123456789.eE+-" else byte for byte in range(256))
_BRACKETS: Final = bytes({0x5B: 1, 0x7B: 1, 0x5D: 0xFF, 0x7D: 0xFF}.get(byte, 0) for byte in range(256))
_NOT_BRACKETS: Final = bytes(byte for byte in range(256) if byte not in b"[]{}")
_CONTINUATIONS: Final = bytes(range(0x80, 0xC0))


class TooCostly(Exception):
    """Raised for data that would cost too much to decode. The message says what it has too much of."""


class _Counts(NamedTuple):
    """What a decoder makes of some data.

    ``items`` are the elements and values of all containers, ``strings`` those among them, ``text`` the bytes that the
    characters of strings take in memory.
    """

    lists: int = 0
    dicts: int = 0
    keys: int = 0
    distinct_keys: int = 0
    items: int = 0
    strings: int = 0
    text: int = 0
    long_numbers: int = 0
    escapes: int = 0
    inexact: int = 0
    exponents: int = 0
    objects: int = 0
    extensions: int = 0

    def memory(self) -> int:
        return (
            self.lists * _LIST
            + self.dicts * _DICT
            + max(0, self.keys - 5 * self.dicts) * _MORE_KEYS
            + self.distinct_keys * _DISTINCT_KEY
            + self.items * _SLOT
            + max(0, self.items - self.lists - self.dicts - self.strings) * _VALUE
            + self.strings * _STRING
            + self.extensions * _EXTENSION
            + self.text
        )

    def nanoseconds(self) -> int:
        return (
            (self.lists + self.dicts) * _NS_CONTAINER
            + self.keys * _NS_KEY
            + self.items * _NS_ITEM
            + (self.strings + self.keys) * _NS_STRING
            + self.long_numbers * _NS_LONG_NUMBER
            + self.escapes * _NS_ESCAPE
            + min(self.escapes, self.strings) * _NS_ESCAPED_STRING
            + self.inexact * _NS_INEXACT
            + self.exponents * _NS_EXPONENT
            + self.objects * _NS_OBJECT
            + self.extensions * _NS_MSGPACK_EXTENSION
        )

    def judge(self, size: int, document: int) -> None:
        """Raise `TooCostly` if it costs too much. ``document``: the bytes of what the decoder reads."""
        memory, most = document + self.memory(), MEMORY_FACTOR * max(size, SMALL)
        seconds = (size * _NS_BYTE + memory * _NS_MEMORY + self.nanoseconds()) / 1e9
        values = (
            f"{size} bytes with {self.lists + self.dicts} lists and mappings and {self.items} values in them"
        )
        if memory > most:
            raise TooCostly(
                f"{values} take up to {memory / 2**20:.1f} MiB to decode, more than {most / 2**20:.1f} MiB"
            )
        allowed = MAX_SECONDS * max(size, USUAL) / USUAL
        if seconds > allowed:
            raise TooCostly(f"{values} take up to {seconds:.2f} s to decode, more than {allowed:.2f} s")


def check(content_type: str, data: Data) -> None:
    """Raise `TooCostly` if decoding the data would cost too much. The data may be malformed."""
    checked = _CHECKS.get(content_type)
    if checked is not None:
        checked(data)


def check_decoded(content_type: str, value: object) -> None:
    """Raise `TooCostly` for a decoded value that is nested too deeply, or that grows when it is encoded again.

    Only YAML, which is short, can name the same value several times.
    """
    if content_type == YAML:
        _check_expanded(value)


def is_known(content_type: str) -> bool:
    """Return whether this module bounds the cost of this content type."""
    return content_type in _CHECKS


def _check_json(data: Data) -> None:
    size = len(data)
    if size <= _HARMLESS and data.count(b"[") + data.count(b"{") <= MAX_DEPTH:
        return
    escapes = _count(data, b"\\")
    # The decoder reads text, in which all characters are as wide as the widest one.
    if data.isascii():
        document = size
        width = 1 if not escapes else 4 if b"\\ud" in data or b"\\uD" in data else 2 if b"\\u" in data else 1
    else:
        width = 4 if any(bytes((lead,)) in data for lead in range(0xF0, 0xF5)) else 2
        document = width * len(data.translate(None, _CONTINUATIONS))
    objects = _count(data, b"__type__")
    if escapes and rb"\u00" in data:
        objects += sum(map(data.count, _HIDDEN))
    _Counts(escapes=escapes, objects=objects).judge(size, document)
    if escapes:
        # JSON allows neither of the two bytes, so distinct keys stay distinct.
        data = data.replace(b"\\\\", b"\1").replace(b'\\"', b"\2")
    strings = _count(data, b'"') // 2 + 1
    _Counts(strings=strings - strings // 2, keys=strings // 2, escapes=escapes).judge(size, document)
    outside, keys, distinct_keys, text = _taken_apart(data, width)
    lists, dicts, colons, commas = (_count(outside, byte) for byte in (b"[", b"{", b":", b","))
    counts = _Counts(
        lists,
        dicts,
        colons,
        distinct_keys + colons - keys,
        commas + lists + dicts + 1,
        max(0, strings - colons),
        text,
        escapes=escapes,
        objects=objects,
    )
    counts.judge(size, document)
    numbers = outside.translate(_DIGITS)
    if b"0" * (_MAX_DIGITS + 1) in numbers:
        raise TooCostly(f"a number of more than {_MAX_DIGITS} digits")
    exponents = _count(outside, b"E")
    if b"e" in outside:
        exponents += outside.count(b"e") - sum(map(outside.count, (b"true", b"false")))
    counts._replace(
        long_numbers=numbers.count(b"0" * _LONG_NUMBER),
        inexact=numbers.count(b"0" * _INEXACT),
        exponents=exponents,
    ).judge(size, document)
    if lists + dicts > MAX_DEPTH:
        changes = outside.translate(_BRACKETS, _NOT_BRACKETS)
        _check_depth(max(accumulate(memoryview(changes).cast("b"))))


def _count(data: Data, what: bytes) -> int:
    """Count as `bytes.count` does. What is not there at all is found ten times as fast."""
    return data.count(what) if what[:1] in data else 0


def _taken_apart(data: Data, width: int) -> tuple[bytes, int, int, int]:
    """Take JSON apart at its quotes. Return what is outside of strings, and three numbers.

    These are: keys found, distinct keys among them, and bytes of memory for the characters of strings, where a string
    has characters of up to ``width`` bytes. A key with a blank before its colon, or cut in two here, is not found.
    """
    outside: list[bytes] = []
    keys = more_keys = text = inside = 0
    seen: set[bytes] = set()
    for start in range(0, len(data), _PIECE):
        pieces = bytes(data[start : start + _PIECE]).split(b'"')
        texts, following = pieces[1 - inside :: 2], pieces[2 - inside :: 2]
        outside.append(b" ".join(pieces[inside::2]))
        found = [key for key, after in zip(texts, following, strict=False) if after[:1] == b":"]
        keys += len(found)
        if len(seen) < _MAX_KEYS:
            seen.update(found)
        else:
            more_keys += len(found)
        if width > 1:
            # A string that is cut in two may have its wide character in the other part.
            cut = [texts.pop(0)] if inside else []
            cut += [texts.pop()] if texts and len(pieces) % 2 != inside else []
            text += width * sum(map(len, cut))
            wide = [each for each in texts if b"\\u" in each or not each.isascii()]
            text += (width - 1) * sum(map(len, wide))
        text += sum(map(len, texts))
        inside ^= (len(pieces) - 1) & 1
    return b" ".join(outside), keys, len(seen) + more_keys, text


def _check_msgpack(data: Data) -> None:
    """Walk over the values. A decoder reserves memory for the number that a container announces."""
    size, position, items, lists, dicts, keys, strings, text = len(data), 0, 1, 0, 0, 0, 0, 0
    extensions = spent = 0
    left = [1]  # of each container that is open, how many values are to come
    while left and position < size:
        if left[-1] == 0:
            left.pop()
            continue
        left[-1] -= 1
        first = data[position]
        kind, fixed, length_size = _MSGPACK[first]
        position += 1
        length = fixed
        if length_size:
            length += int.from_bytes(data[position : position + length_size], "big")
            position += length_size
        spent += _NS_MSGPACK
        if kind == "scalar":
            position += length
        elif kind == "extension":
            extensions, text, position = extensions + 1, text + length, position + length
            spent += _NS_MSGPACK_EXTENSION
        elif kind == "text":
            spent += _NS_MSGPACK_SIZED
            piece = data[position : position + length]
            strings, text, position = (
                strings + 1,
                text + length * (1 if piece.isascii() else 5),
                position + length,
            )
        else:
            pairs = kind == "map"
            lists, dicts, keys = lists + (not pairs), dicts + pairs, keys + length * pairs
            items += length
            left.append(length * (2 if pairs else 1))
            spent += _NS_MSGPACK_SIZED
            _check_depth(len(left) - 1)
            if items + keys > size:
                raise TooCostly(f"{items + keys} values announced in {size} bytes")
        if max(spent, items * _NS_MSGPACK) > MAX_SECONDS * 1e9:
            raise TooCostly(
                f"more than {strings + lists + dicts + extensions} texts, lists, mappings and extensions among "
                f"{items + keys} values, whose check alone takes more than {MAX_SECONDS:g} s"
            )
    _Counts(lists, dicts, keys, keys, items, strings, text, extensions=extensions).judge(size, size)


def _msgpack_kinds() -> list[tuple[str, int, int]]:
    """Return, for each first byte: the kind of value, its length in bytes or values, and the bytes of a length."""
    kinds = [("scalar", 0, 0)] * 256
    for low in range(32):
        kinds[0xA0 + low] = ("text", low, 0)
    for low in range(16):
        kinds[0x80 + low], kinds[0x90 + low] = ("map", low, 0), ("list", low, 0)
    for number, width in enumerate((1, 2, 4)):
        kinds[0xC4 + number] = kinds[0xD9 + number] = ("text", 0, width)
        kinds[0xC7 + number] = ("extension", 1, width)
    for number in range(2):
        kinds[0xDC + number], kinds[0xDE + number] = ("list", 0, 2 << number), ("map", 0, 2 << number)
    kinds[0xCA], kinds[0xCB] = ("scalar", 4, 0), ("scalar", 8, 0)
    for number in range(4):
        kinds[0xCC + number] = kinds[0xD0 + number] = ("scalar", 1 << number, 0)
    for number in range(5):
        kinds[0xD4 + number] = ("extension", 1 + (1 << number), 0)
    return kinds


def _check_yaml(data: Data) -> None:
    if len(data) > MAX_YAML:
        raise TooCostly(
            f"{len(data)} bytes of YAML, which are slow to decode: the most is {MAX_YAML}, or use JSON"
        )
    if data.count(b"[") + data.count(b"{") > _MAX_YAML_BRACKETS:
        raise TooCostly(f"YAML with more than {_MAX_YAML_BRACKETS} brackets")
    if data.count(b"<<") > 1 and data.count(b"*") > _MAX_MERGED_ALIASES:
        raise TooCostly(f"YAML with merged keys and more than {_MAX_MERGED_ALIASES} aliases")


def _check_expanded(value: object) -> None:
    """Count each value as often as it is named."""
    cost, waiting = 0, [(value, 1)]
    while waiting:
        each, depth = waiting.pop()
        cost += 64
        if isinstance(each, str | bytes):
            cost += len(each)
        elif isinstance(each, dict | list | tuple | set):
            _check_depth(depth)
            cost += 64 * len(each)
            waiting += [(inner, depth + 1) for inner in each]
            if isinstance(each, dict):
                waiting += [(inner, depth + 1) for inner in each.values()]
        if cost > MEMORY_FACTOR * SMALL:
            raise TooCostly("YAML that names the same values too many times")


def _check_depth(depth: int) -> None:
    if depth > MAX_DEPTH:
        raise TooCostly(f"lists and mappings nested more than {MAX_DEPTH} deep")


_MSGPACK: Final = _msgpack_kinds()
_CHECKS: Final[dict[str, Callable[[Data], None]]] = {
    JSON: _check_json,
    MSGPACK: _check_msgpack,
    YAML: _check_yaml,
}
