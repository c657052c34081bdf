"""The format of a tally file, version 1. All numbers are unsigned words of 64 bits, in the machine's byte order.

A file is a *slot*: its name is a number, and one process of the server at a time writes it. When that has ended, the
next one takes the slot over and counts on. So totals never fall, and there are as many files as processes at one time.

::

    header                         64 words: see `Header`
    sequences                      one word a record
    records                        40 words each: see `Column`
    names                          41 words each: what the record counts
    slots of sparse histograms     none in version 1

The sequence of a record is odd while several of its words are being written; one alone may change at any time. The
sequence of the table, in the header, is odd while records get another name or are added to each other. A reader copies
a record between two readings of its sequence, and tries again if these differ or are odd. It bounds its tries: a writer
can die in the middle. What it left odd is taken as it is, and counted as torn.

A plain store of a word is atomic, and other CPUs see the stores of one CPU in order, on x86-64. On ARM the lock around
each update, and the interpreter's own, are barriers; the format relies on no more.
"""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import Final, Literal, NamedTuple

MAGIC: Final = int.from_bytes(b"rcontaly", "little")
VERSION: Final = 1
#: The most records of a file, unless the writer is told otherwise.
DEFAULT_RECORDS: Final = 1000

HEADER_WORDS: Final = 64
RECORD_WORDS: Final = 40
NAME_WORDS: Final = 41

#: The endings of work that began, in the order of their columns.
ENDINGS: Final = ("ok", "error", "memory", "timeout", "pids", "result", "killed", "aborted")
#: Why work did not begin, in the order of their columns.
REFUSALS: Final = ("concurrency", "budget", "processes", "pids", "forbidden", "unroutable", "refused")

Refusal = Literal[
    "concurrency",  # as many run as the policy allows
    "budget",  # the memory budget of the machine has no room
    "processes",  # all executor processes of the server process are busy
    "pids",  # its confinement has as many processes as it may
    "forbidden",  # its identity is not allowed
    "unroutable",  # no route names it
    "refused",  # it could not be confined, for another reason
]


class Header(IntEnum):
    """The words of the header. The first six describe the file and never change."""

    MAGIC = 0
    VERSION = 1
    RECORDS = 2
    RECORD_WORDS = 3
    NAME_WORDS = 4
    #: The number of slots for sparse histograms, behind the names.
    HISTOGRAM_SLOTS = 5
    #: The process that writes, by its pid and its start time (proc(5), stat); 0 when the slot is free.
    PID = 6
    STARTED = 7
    #: The sequence of the table.
    SEQUENCE = 8
    #: The records from here on were never used.
    USED = 9
    #: How often a process took the slot over from another, and how many sequences the others left odd.
    TAKEOVERS = 10
    TORN = 11
    #: How many keys were added to the record of the other keys of their policy.
    FOLDED = 12


class Column(IntEnum):
    """The words of a record. Twelve are set apart for endings and for refusals each; the last two are free."""

    BEGUN = 0
    #: Begun, and neither ended nor going on: its process died.
    LOST = 1
    ENDINGS = 2
    REFUSALS = 14
    #: Confinements, and waiting executor processes, that were given up to make room for others.
    EVICTIONS = 26
    EXECUTOR_EVICTIONS = 27
    #: Executor processes made.
    SPAWNS = 28
    WALL_MICROSECONDS = 29
    CPU_MICROSECONDS = 30
    #: How many of the ended units of work have a known CPU time; likewise for memory and OOM kills.
    CPU_KNOWN = 31
    #: Bytes: the highest peak, and the sum of all peaks.
    MEMORY_PEAK = 32
    MEMORY_PEAK_SUM = 33
    MEMORY_KNOWN = 34
    OOM_KILLS = 35
    OOM_KNOWN = 36
    #: Executor processes that were replaced because of the memory that they kept.
    MEMORY_REPLACEMENTS = 37


#: What a name is of. A policy without keys, one of its keys, or all its keys that have no record of their own.
Kind = Literal["policy", "key", "other"]
KINDS: Final[tuple[Kind, ...]] = ("policy", "key", "other")

_POLICY_BYTES, _KEY_BYTES = 64, 256
_NAME = struct.Struct(f"=BBHI{_POLICY_BYTES}s{_KEY_BYTES}s")


class Name(NamedTuple):
    """What a record counts: a policy, or one of its keys. ``policy`` is "" for work that got none.

    ``key`` is None for a policy without keys, and for its other keys together.
    """

    policy: str
    key: str | None = None
    kind: Kind = "policy"


def name_of(policy: str, key: str | None) -> Name:
    """Return the name for a policy and a key. A key that is too long ends with its hash instead."""
    return Name(policy) if key is None else Name(policy, key, "key")


def pack_name(name: Name) -> bytes:
    """Return the words of a name."""
    policy = name.policy.encode(errors="surrogatepass")[:_POLICY_BYTES]
    key = b"" if name.key is None else name.key.encode(errors="surrogatepass")
    if len(key) > _KEY_BYTES:
        import hashlib

        key = key[: _KEY_BYTES - 41] + b"~" + hashlib.blake2b(key, digest_size=20).hexdigest().encode()
    return _NAME.pack(1 + KINDS.index(name.kind), len(policy), len(key), 0, policy, key)


def unpack_name(words: bytes) -> Name | None:
    """Return the name in these words; None if the record is not used. Raises ValueError if the words are none."""
    kind, policy_length, key_length, _, policy, key = _NAME.unpack(words)
    if kind == 0:
        return None
    if kind > len(KINDS):
        raise ValueError(f"no kind of name: {kind}")
    of = KINDS[kind - 1]
    return Name(
        policy[:policy_length].decode(errors="replace"),
        _decoded(key[:key_length]) if of == "key" else None,
        of,
    )


def _decoded(key: bytes) -> str:
    try:
        return key.decode(errors="surrogatepass")
    except UnicodeDecodeError:  # cut within a character
        return key.decode(errors="replace")


def sequence_at(record: int) -> int:
    """Return the index of the word with the sequence of a record."""
    return HEADER_WORDS + record


def record_at(record: int, records: int) -> int:
    """Return the index of the first word of a record, in a file of so many records."""
    return HEADER_WORDS + records + record * RECORD_WORDS


def name_at(record: int, records: int) -> int:
    """Return the index of the first word of the name of a record."""
    return HEADER_WORDS + records + records * RECORD_WORDS + record * NAME_WORDS


def words_of(records: int) -> int:
    """Return the number of words of a file."""
    return name_at(records, records)
