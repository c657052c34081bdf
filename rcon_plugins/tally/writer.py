"""The server's side of the tally: one process counts what it admits, refuses and makes.

Safe in every thread, and in signal handlers. A fork of the process counts nothing.
"""

from __future__ import annotations

import _thread
import contextlib
import errno
import fcntl
import os
import posix  # gevent replaces `os.close`
import struct
import time
from collections.abc import Iterator
from os import getpid
from typing import TYPE_CHECKING, Final

from rcon_plugins.errors import KernelError
from rcon_plugins.kernel import proc
from rcon_plugins.kernel.shared_words import WORD_SIZE, SharedWords
from rcon_plugins.tally.layout import (
    DEFAULT_RECORDS,
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
    Refusal,
    name_at,
    name_of,
    pack_name,
    record_at,
    sequence_at,
    unpack_name,
    words_of,
)

if TYPE_CHECKING:
    from rcon_plugins.outcome import Outcome

#: How long to wait while another process looks for a slot, seconds.
_LOCK_SECONDS = 2.0
#: Enough for all processes that a server has at one time.
_MOST_SLOTS = 4096
#: The least used share of the records that is folded when all are in use.
_FOLDED_SHARE = 5
_SIZE: Final = struct.Struct("=6Q")
_ENDING_COLUMNS: Final = {ending: Column.ENDINGS + index for index, ending in enumerate(ENDINGS)}
_REFUSAL_COLUMNS: Final = {refusal: Column.REFUSALS + index for index, refusal in enumerate(REFUSALS)}
_ABORTED = _ENDING_COLUMNS["aborted"]
#: Plain numbers: a member of an enum costs more on the hot path.
_BEGUN, _WALL, _CPU, _CPU_KNOWN = (
    int(Column.BEGUN), int(Column.WALL_MICROSECONDS), int(Column.CPU_MICROSECONDS), int(Column.CPU_KNOWN)
)  # fmt: skip
_PEAK, _PEAK_SUM, _MEMORY_KNOWN = (
    int(Column.MEMORY_PEAK), int(Column.MEMORY_PEAK_SUM), int(Column.MEMORY_KNOWN)
)  # fmt: skip
_OOM, _OOM_KNOWN = int(Column.OOM_KILLS), int(Column.OOM_KNOWN)


class Record:
    """The place that counts for one policy and key: the indexes of its sequence and of its first word.

    It moves when the key is folded into the others.
    """

    __slots__ = ("at", "index", "sequence")

    def __init__(self, index: int, records: int) -> None:
        self.move(index, records)

    def move(self, index: int, records: int) -> None:
        """Move it to the record ``index`` of a file of so many records."""
        self.index = index
        self.sequence = sequence_at(index)
        self.at = record_at(index, records)


class Tally:
    """The tally of one process, in a slot of the server's directory. Without a directory it counts for nobody.

    Get the record of a policy and a key from `record`, and give it to the other methods.
    """

    def __init__(self, slot: SharedWords | None, records: int) -> None:
        """Use `take` or `nowhere`."""
        self._slot = slot
        #: The process that counts; 0 when none does. Then there are no words.
        self._pid = 0 if slot is None else os.getpid()
        self._words = memoryview(bytearray()).cast("Q") if slot is None else slot.words
        self._most = records
        #: Reentrant, because a signal handler may count in the middle of an update. The interpreter's own, because
        #: gevent's hangs when three native threads want it at once. No update switches greenlets.
        self._lock = _thread.RLock()
        self._records: dict[tuple[str, str | None], Record] = {}
        self._others: dict[str, Record] = {}
        self._free: list[int] = []
        self._nowhere = Record(0, self._most)

    @classmethod
    def nowhere(cls) -> Tally:
        """Return a tally that counts nothing."""
        return cls(None, 0)

    @classmethod
    def take(cls, directory: str, records: int = DEFAULT_RECORDS) -> Tally:
        """Take a slot in the directory that no living process has, or make one. Raises `KernelError`."""
        try:
            at = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise KernelError.from_oserror(error, path=directory) from None
        try:
            _lock(at)  # one process at a time looks for a slot
            for number in range(_MOST_SLOTS):
                tally = cls._take_slot(at, str(number), records)
                if tally is not None:
                    return tally
        except OSError as error:
            if isinstance(error, KernelError):
                raise
            raise KernelError.from_oserror(error, path=directory) from None
        finally:
            posix.close(at)
        raise KernelError(f"{directory} has {_MOST_SLOTS} slots in use", errno=errno.EMFILE, path=directory)

    @classmethod
    def _take_slot(cls, directory: int, name: str, records: int) -> Tally | None:
        """Take one slot; return None if a living process has it, or its format or size is another."""
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(name, flags, 0o640, dir_fd=directory)
        try:
            header = os.pread(descriptor, HEADER_WORDS * WORD_SIZE, 0)
            words = memoryview(header.ljust(HEADER_WORDS * WORD_SIZE, b"\0")).cast("Q")
            is_new = words[Header.MAGIC] == 0
            if not is_new and not _fits(words, records, os.fstat(descriptor).st_size):
                return None
            if words[Header.PID] and proc.start_time(words[Header.PID]) == words[Header.STARTED]:
                return None
            os.fchmod(descriptor, 0o640)  # whatever the umask is
            try:
                slot = SharedWords(descriptor, words_of(records))
            except BaseException:
                if is_new:
                    os.unlink(name, dir_fd=directory)
                raise
        finally:
            posix.close(descriptor)
        tally = cls(slot, records)
        tally._begin(is_new=is_new)
        return tally

    def _begin(self, *, is_new: bool) -> None:
        words = self._words
        if is_new:
            with self._table():
                self._name(0, Name("", None, "other"))
            described = _SIZE.pack(MAGIC, VERSION, self._most, RECORD_WORDS, NAME_WORDS, 0)
            words[:6] = memoryview(described).cast("Q")
        else:
            self._take_over()
        words[Header.STARTED] = proc.start_time(os.getpid()) or 0
        words[Header.PID] = os.getpid()
        self._others.setdefault("", Record(0, self._most))

    def _take_over(self) -> None:
        """Count on from the process that had the slot."""
        words = self._words
        words[Header.TAKEOVERS] += 1
        if words[Header.SEQUENCE] % 2:
            words[Header.TORN] += 1
            words[Header.SEQUENCE] += 1
        for index in range(words[Header.USED]):
            if words[sequence_at(index)] % 2:
                words[Header.TORN] += 1
            with self._writing(index) as at:
                begun, lost = words[at + Column.BEGUN], words[at + Column.LOST]
                ended = sum(words[at + Column.ENDINGS : at + Column.REFUSALS])
                words[at + Column.LOST] = max(lost, begun - ended)
                name = self._name_of(index)
                if name is None:
                    self._free.append(index)
                elif name.kind == "other":
                    self._others[name.policy] = Record(index, self._most)
                else:
                    self._records[name.policy, name.key] = Record(index, self._most)

    @property
    def is_kept(self) -> bool:
        """Whether others can read what this process counts."""
        return self._pid == os.getpid()

    def close(self) -> None:
        """Give the slot back. What is counted later is lost. Does nothing in a fork."""
        if self._slot is None or not self.is_kept:
            return
        with self._lock:
            self._words[Header.PID] = 0
            self._pid = 0
            self._words = memoryview(bytearray()).cast("Q")
            self._slot.close()

    def record(self, policy: str, key: str | None) -> Record:
        """Return the record of a policy and a key. If all are in use, add the least used keys to the others first."""
        found = self._records.get((policy, key))
        if found is not None:
            return found
        if self._pid != getpid():
            return self._nowhere
        with self._lock:
            if not self._words:
                return self._nowhere
            found = self._records.get((policy, key))
            if found is None:
                index = self._new(name_of(policy, key))
                if index is None:
                    return self._others.get(policy) or self._others[""]
                found = self._records[policy, key] = Record(index, self._most)
            return found

    def begin(self, record: Record) -> None:
        """Count a unit of work that begins."""
        self._count(record, _BEGUN)

    def end(self, record: Record, outcome: Outcome) -> None:
        """Count the outcome of a unit of work that began, and what it used."""
        if self._pid != getpid():
            return
        usage = outcome.usage
        peak, kills = usage.memory_peak, usage.oom_kills
        wall = int(usage.wall_seconds * 1e6)
        cpu = None if usage.cpu_seconds is None else int(usage.cpu_seconds * 1e6)
        with self._lock:
            words, sequence, at = self._words, record.sequence, record.at
            if not words:
                return
            words[sequence] = (words[sequence] + 1) | 1
            try:
                words[at + _ENDING_COLUMNS.get(outcome.ending, _ABORTED)] += 1
                if wall > 0:
                    words[at + _WALL] += wall
                if cpu is not None:
                    words[at + _CPU_KNOWN] += 1
                    if cpu > 0:
                        words[at + _CPU] += cpu
                if peak is not None:
                    words[at + _PEAK_SUM] += peak
                    words[at + _MEMORY_KNOWN] += 1
                    if peak > words[at + _PEAK]:
                        words[at + _PEAK] = peak
                if kills is not None:
                    words[at + _OOM_KNOWN] += 1
                    if kills:
                        words[at + _OOM] += kills
            finally:
                words[sequence] = (words[sequence] | 1) + 1

    def refuse(self, record: Record, reason: Refusal) -> None:
        """Count a unit of work that does not begin."""
        self._count(record, _REFUSAL_COLUMNS[reason])

    def evict(self, record: Record) -> None:
        """Count a confinement that was given up to make room for another."""
        self._count(record, Column.EVICTIONS)

    def evict_executor(self, record: Record) -> None:
        """Count a waiting executor process that was ended to make room for another."""
        self._count(record, Column.EXECUTOR_EVICTIONS)

    def spawn(self, record: Record) -> None:
        """Count an executor process that was made."""
        self._count(record, Column.SPAWNS)

    def replace_for_memory(self, record: Record) -> None:
        """Count an executor process that was replaced because of the memory that it kept."""
        self._count(record, Column.MEMORY_REPLACEMENTS)

    def _count(self, record: Record, column: int) -> None:
        if self._pid != getpid():  # before the lock, which another thread may have held at the fork
            return
        with self._lock:
            words = self._words
            if words:
                words[record.at + column] += 1  # one word alone: without the sequence

    def _writing(self, index: int) -> _Writing:
        return _Writing(self._words, sequence_at(index), record_at(index, self._most))

    @contextlib.contextmanager
    def _table(self) -> Iterator[None]:
        """Change names, or add records to each other, in the block."""
        words = self._words
        words[Header.SEQUENCE] = (words[Header.SEQUENCE] + 1) | 1
        try:
            yield
        finally:
            words[Header.SEQUENCE] = (words[Header.SEQUENCE] | 1) + 1

    def _new(self, name: Name) -> int | None:
        """Return a new record of this name; None if all are in use and none can be folded."""
        used = self._words[Header.USED]
        if not self._free and used >= self._most:
            self._fold()
        with self._table():
            if self._free:
                index = self._free.pop()
            elif used < self._most:
                index = used
            else:
                return None
            self._name(index, name)
        return index

    def _name(self, index: int, name: Name | None) -> None:
        """Name a record; None: it is free. Call it in a block of `_table`."""
        words, at = self._words, name_at(index, self._most)
        packed = bytes(NAME_WORDS * WORD_SIZE) if name is None else pack_name(name)
        words[at : at + NAME_WORDS] = memoryview(packed).cast("Q")
        words[Header.USED] = max(words[Header.USED], index + 1)

    def _name_of(self, index: int) -> Name | None:
        at = name_at(index, self._most)
        try:
            return unpack_name(self._words[at : at + NAME_WORDS].tobytes())
        except ValueError:
            return None

    def _fold(self) -> None:
        """Add the least used keys to the record of the other keys of their policy, and free their records."""
        keys = [one for one in self._records.items() if one[0][1] is not None]
        keys.sort(key=lambda one: self._uses(one[1].index))
        for (policy, key), record in keys[: max(2, len(keys) // _FOLDED_SHARE)]:
            index = record.index
            other = self._others.get(policy)
            if other is None:
                # The record itself becomes that of the others.
                with self._table():
                    self._name(index, Name(policy, None, "other"))
                self._others[policy] = record
            else:
                with self._table():
                    self._add(index, other.index)
                    self._name(index, None)
                record.move(other.index, self._most)  # work under way is counted there
                self._free.append(index)
            del self._records[policy, key]
            self._words[Header.FOLDED] += 1

    def _uses(self, index: int) -> int:
        words, at = self._words, record_at(index, self._most)
        return words[at + _BEGUN] + sum(words[at + Column.REFUSALS : at + Column.EVICTIONS])

    def _add(self, index: int, to: int) -> None:
        words = self._words
        with self._writing(index) as source, self._writing(to) as target:
            for column in range(RECORD_WORDS):
                if column == Column.MEMORY_PEAK:
                    words[target + column] = max(words[target + column], words[source + column])
                else:
                    words[target + column] += words[source + column]
                words[source + column] = 0


class _Writing:
    """A block that writes a record. It gives the index of the first word. Hold the lock of the tally."""

    __slots__ = ("_at", "_sequence", "_words")

    def __init__(self, words: memoryview, sequence: int, at: int) -> None:
        self._words = words
        self._sequence = sequence
        self._at = at

    def __enter__(self) -> int:
        words, sequence = self._words, self._sequence
        words[sequence] = (words[sequence] + 1) | 1
        return self._at

    def __exit__(self, *_: object) -> None:
        words, sequence = self._words, self._sequence
        words[sequence] = (words[sequence] | 1) + 1


def _lock(directory: int) -> None:
    """Lock the directory, flock(2). Raises OSError if another process holds the lock too long.

    Who holds it looks for a slot. But code that runs as the server's user can hold it, too.
    """
    until = time.monotonic() + _LOCK_SECONDS
    while True:
        try:
            return fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > until:
                raise
        time.sleep(0.005)


def _fits(header: memoryview, records: int, size: int) -> bool:
    described = (header[Header.MAGIC], header[Header.VERSION], header[Header.RECORDS], size)
    return described == (MAGIC, VERSION, records, words_of(records) * WORD_SIZE)
