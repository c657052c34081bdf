"""Read the tallies of a server, while it counts or after its end. It needs no more than the files.

A file may belong to another user, and change or shrink at any moment. So it is read, never mapped, and never trusted.
"""

from __future__ import annotations

import contextlib
import os
import posix  # gevent replaces `os.close`
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from rcon_plugins.kernel import proc
from rcon_plugins.kernel.shared_words import WORD_SIZE
from rcon_plugins.tally.layout import (
    ENDINGS,
    HEADER_WORDS,
    MAGIC,
    NAME_WORDS,
    RECORD_WORDS,
    REFUSALS,
    VERSION,
    Column,
    Header,
    Name,
    name_at,
    name_of,
    record_at,
    sequence_at,
    unpack_name,
    words_of,
)
from rcon_plugins.tree import runtime
from rcon_plugins.tree.owner import Owner

#: How often to read what a writer is changing, before it is taken as it is.
MOST_TRIES = 100
#: The endings and refusals that count as a limit that was reached.
_LIMITS = ("memory", "timeout", "pids", "result")
_FULL = ("concurrency", "budget", "processes", "pids")
#: What counts all that found no record.
_REST = Name("", None, "other")
#: The words of the header that change when another process takes the slot over, or when records get other names.
_OWNER = (Header.SEQUENCE, Header.PID, Header.STARTED, Header.TAKEOVERS)
#: More records than any writer makes. A file that claims more is not read.
_MOST_RECORDS = 1_000_000
#: Our numbers for processes of other PID namespaces, and the most that are kept.
_visible: dict[tuple[int, int, int], int] = {}
_MOST_VISIBLE = 10_000


class Counts(msgspec.Struct, frozen=True, kw_only=True):
    """What was counted for one policy and key, since the server began. Add two with ``+``.

    ``endings`` and ``refusals`` have every name of `layout.ENDINGS` and `layout.REFUSALS`. ``lost`` is the number of
    units of work whose server process died; None where it is unknown whether that process lives. The usage is that of
    ended work; None where it was never measured. ``memory_peak`` is the highest peak of one unit of work in bytes,
    ``memory_peak_sum`` the sum of the peaks.
    """

    begun: int = 0
    lost: int | None = 0
    endings: dict[str, int] = msgspec.field(default_factory=lambda: dict.fromkeys(ENDINGS, 0))
    refusals: dict[str, int] = msgspec.field(default_factory=lambda: dict.fromkeys(REFUSALS, 0))
    evictions: int = 0
    executor_evictions: int = 0
    spawns: int = 0
    memory_replacements: int = 0
    wall_seconds: float = 0.0
    cpu_seconds: float | None = None
    memory_peak: int | None = None
    memory_peak_sum: int | None = None
    oom_kills: int | None = None

    def __add__(self, other: Counts) -> Counts:
        together: dict[str, Any] = {
            field: _together(field, getattr(self, field), getattr(other, field))
            for field in self.__struct_fields__
        }
        return Counts(**together)

    @property
    def under_way(self) -> int | None:
        """The units of work that have begun and not ended; None where `lost` is unknown."""
        return None if self.lost is None else max(0, self.begun - self.lost - sum(self.endings.values()))

    @property
    def limit_hits(self) -> int:
        """How often a limit ended a unit of work, or kept it from beginning."""
        ended = sum(self.endings.get(name, 0) for name in _LIMITS)
        return ended + sum(self.refusals.get(name, 0) for name in _FULL)

    def to_data(self) -> dict[str, Any]:
        """Return the fields as built-in types, for JSON."""
        found: dict[str, Any] = msgspec.to_builtins(self)
        return found


class TallyOfServer(NamedTuple):
    """The tallies of all processes of a server, added up by policy and key.

    ``processes`` is the number of slots read. ``torn`` counts the records that a writer left in the middle when it
    died, and ``unsettled`` those that changed all the time while they were read. They are included as they were found.
    """

    counts: Mapping[Name, Counts]
    processes: int
    torn: int = 0
    unsettled: int = 0

    def of(self, policy: str, key: str | None) -> Counts | None:
        """Return the counts of a policy and key; None if they are unknown, as they may be among the others."""
        found = self.counts.get(name_of(policy, key))
        if found is None and self.may_hide(policy, key):
            return None
        return found or Counts()

    @property
    def unroutable(self) -> int:
        """How many units of work were refused because no route names them. They have no policy."""
        return sum(its.refusals["unroutable"] for its in self.counts.values())

    def may_hide(self, policy: str, key: str | None) -> bool:
        """Return whether a policy and key without a record may have been counted among others."""
        if key is not None and policy and Name(policy, None, "other") in self.counts:
            return True
        return self.counts.get(_REST, Counts()) != Counts()


def read(instance: str, owner: int | None = None) -> TallyOfServer | None:
    """Return the tally of the running server with this instance; None if there is none that this user can read.

    ``owner`` is the uid of the server, if it is known. The tally of a server that has ended is not its successor's,
    whose instance may have the same name: read it with `read_directory`.
    """
    for folder in runtime.folders(owner):
        path = f"{folder}/{instance}"
        found = None if runtime.has_ended(path) else read_directory(path)
        if found is not None:
            return found
    return None


def read_directory(path: str) -> TallyOfServer | None:
    """Return the tally in a runtime directory; None if there is none, or this user may not read one of its files."""
    counts: dict[Name, Counts] = {}
    processes = torn = unsettled = 0
    owner = Owner.of(Path(path).name)
    try:
        names = [entry.name for entry in Path(path).iterdir() if entry.name.isdigit()]
        for name in sorted(names, key=int):
            slot = _Slot.open(f"{path}/{name}", owner and owner.namespace)
            if slot is None:
                continue
            try:
                for one, its in slot.read():
                    counts[one] = counts[one] + its if one in counts else its
            finally:
                slot.close()
            processes, torn, unsettled = processes + 1, torn + slot.torn, unsettled + slot.unsettled
    except OSError:
        return None
    return TallyOfServer(counts, processes, torn, unsettled) if processes else None


class _Slot:
    """One file, open to read."""

    def __init__(self, descriptor: int, records: int, namespace: int | None) -> None:
        self._file = descriptor
        self._records = records
        self._namespace = namespace
        self.torn = 0
        self.unsettled = 0

    @classmethod
    def open(cls, path: str, namespace: int | None = None) -> _Slot | None:
        """Open a slot; None if the file is none of version 1. Raises OSError.

        ``namespace`` is the PID namespace of its server; None is our own.
        """
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
        with contextlib.ExitStack() as undo:
            undo.callback(posix.close, descriptor)
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                return None
            slot = cls(descriptor, 0, namespace)
            header = slot._words(0, HEADER_WORDS)
            records = header[Header.RECORDS]
            expected = (MAGIC, VERSION, RECORD_WORDS, NAME_WORDS)
            found = (
                header[Header.MAGIC],
                header[Header.VERSION],
                header[Header.RECORD_WORDS],
                header[Header.NAME_WORDS],
            )
            if found != expected or records > _MOST_RECORDS or status.st_size < words_of(records) * WORD_SIZE:
                return None
            slot._records = records
            undo.pop_all()
            return slot
        return None

    def close(self) -> None:
        posix.close(self._file)

    def read(self) -> list[tuple[Name, Counts]]:
        """Return the counts of each record. Raises OSError if the file is shorter than it was."""
        found, torn, unsettled, header = self._read_once()
        for _ in range(MOST_TRIES):
            after = self._words(0, HEADER_WORDS)
            if all(header[word] == after[word] for word in _OWNER) and not after[Header.SEQUENCE] % 2:
                break
            if after[Header.SEQUENCE] % 2 and self._is_written(after) is False:
                torn += 1
                break
            found, torn, unsettled, header = self._read_once()
        else:
            unsettled += 1
        self.torn, self.unsettled = torn + header[Header.TORN], unsettled
        return found

    def _read_once(self) -> tuple[list[tuple[Name, Counts]], int, int, memoryview]:
        header = self._words(0, HEADER_WORDS)
        # Before the records are read: what a process that is dead by now counted does not change any more.
        is_written = self._is_written(header)
        used = min(header[Header.USED], self._records)
        before = self._words(sequence_at(0), used)
        records = self._words(record_at(0, self._records), used * RECORD_WORDS)
        names = self._words(name_at(0, self._records), used * NAME_WORDS)
        after = self._words(sequence_at(0), used)
        found = []
        torn = unsettled = 0
        for index in range(used):
            words = records[index * RECORD_WORDS : (index + 1) * RECORD_WORDS]
            if before[index] != after[index] or after[index] % 2:
                words, settled = self._settled(index)
                if not settled:
                    if is_written is False:
                        torn += 1
                    else:
                        unsettled += 1
            try:
                name = unpack_name(names[index * NAME_WORDS : (index + 1) * NAME_WORDS].tobytes())
            except ValueError:
                continue  # its name is being written: the table has changed, and is read again
            if name is not None:
                found.append((name, _counts_of(words, is_written)))
        return found, torn, unsettled, header

    def _settled(self, index: int) -> tuple[memoryview, bool]:
        """Return a record, and whether its writer has left it alone while it was read."""
        words = self._words(record_at(index, self._records), RECORD_WORDS)
        for _ in range(MOST_TRIES):
            before = self._words(sequence_at(index), 1)[0]
            words = self._words(record_at(index, self._records), RECORD_WORDS)
            if not before % 2 and self._words(sequence_at(index), 1)[0] == before:
                return words, True
        return words, False

    def _is_written(self, header: memoryview) -> bool | None:
        """Return whether the process that writes the slot is alive; None if that cannot be seen from here."""
        pid, started = header[Header.PID], header[Header.STARTED]
        if pid == 0:
            return False
        own = proc.pid_namespace()
        namespace = own if self._namespace is None else self._namespace
        if namespace != own and (seen := _visible_pid(pid, started, namespace)) is not None:
            return proc.start_time(seen) == started
        return proc.is_alive(pid, started, namespace)

    def _words(self, at: int, count: int) -> memoryview:
        data = b""
        size = count * WORD_SIZE
        while len(data) < size:
            more = os.pread(self._file, size - len(data), at * WORD_SIZE + len(data))
            if not more:
                raise OSError("the file is shorter than it was")
            data += more
        return memoryview(data).cast("Q")


def _visible_pid(pid: int, started: int, namespace: int) -> int | None:
    """Return our number for a process of another PID namespace; None if it cannot be seen.

    Look each one up once: that takes a pass over all processes.
    """
    process = pid, started, namespace
    if process not in _visible:
        found = proc.visible_pid(*process)
        if found is None:
            return None
        if len(_visible) >= _MOST_VISIBLE:
            _visible.clear()
        _visible[process] = found
    return _visible[process]


def _counts_of(words: memoryview, is_written: bool | None) -> Counts:
    """Return the counts of a record. ``is_written``: whether its writer lives. What a dead one left is lost."""
    lost: int | None = words[Column.LOST]
    ended = sum(words[Column.ENDINGS + index] for index in range(len(ENDINGS)))
    if not is_written and (left := words[Column.BEGUN] - ended) > words[Column.LOST]:
        lost = None if is_written is None else left

    def known(column: Column, counted: Column) -> int | None:
        return words[column] if words[counted] else None

    cpu = known(Column.CPU_MICROSECONDS, Column.CPU_KNOWN)
    return Counts(
        begun=words[Column.BEGUN],
        lost=lost,
        endings={name: words[Column.ENDINGS + index] for index, name in enumerate(ENDINGS)},
        refusals={name: words[Column.REFUSALS + index] for index, name in enumerate(REFUSALS)},
        evictions=words[Column.EVICTIONS],
        executor_evictions=words[Column.EXECUTOR_EVICTIONS],
        spawns=words[Column.SPAWNS],
        memory_replacements=words[Column.MEMORY_REPLACEMENTS],
        wall_seconds=words[Column.WALL_MICROSECONDS] / 1e6,
        cpu_seconds=None if cpu is None else cpu / 1e6,
        memory_peak=known(Column.MEMORY_PEAK, Column.MEMORY_KNOWN),
        memory_peak_sum=known(Column.MEMORY_PEAK_SUM, Column.MEMORY_KNOWN),
        oom_kills=known(Column.OOM_KILLS, Column.OOM_KNOWN),
    )


def _together(field: str, mine: Any, theirs: Any) -> Any:
    if isinstance(mine, dict):
        return {name: number + theirs[name] for name, number in mine.items()}
    if field == "lost" and (mine is None or theirs is None):
        return None
    if mine is None or theirs is None:
        return theirs if mine is None else mine
    return max(mine, theirs) if field == "memory_peak" else mine + theirs
