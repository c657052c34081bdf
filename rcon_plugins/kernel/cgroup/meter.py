"""Read the usage of a cgroup on the hot path, from files that stay open, with ``pread`` and little parsing."""

from __future__ import annotations

import errno
import itertools
import os
import posix
from collections.abc import Callable
from types import TracebackType
from typing import NamedTuple

from rcon_plugins.errors import KernelError
from rcon_plugins.kernel import files
from rcon_plugins.kernel.cgroup import swap

Fields = list[float | int | None]
#: How to read one file: it is one number, for the field of this index; or a function that parses it into the fields.
Parser = int | Callable[[bytes, Fields], None]


class Reading(NamedTuple):
    """The usage of a cgroup and all below it since it was made. ``None`` means not accounted here.

    ``oom_kills`` counts the processes that the OOM killer ended in this cgroup or below; on v1 only in this cgroup
    itself. One incident may count twice.

    ``memory_limit_hits`` counts how often usage reached the limit of this cgroup; on v2 also the limits of those below.
    v1 of Linux 6.18 counts none if ``swap_max`` is 0.

    ``swap_peak`` is the most swap, exactly so on v2 since Linux 6.5. Older kernels have no such file. There it is the
    least that the peak can have been: on v2 what is in swap now; on v1 the peak of memory and swap together, less that
    of memory, less what each CPU charges ahead. If that is nothing, it is None, or 0 on a machine without swap.

    ``pids_limit_hits`` counts failed forks. On v1, and on v2 before 6.11, these are the forks by processes of this
    cgroup itself, whichever limit stopped them. Since 6.11 these are the forks stopped at the limit of this cgroup or
    one below.
    """

    cpu_seconds: float | None = None
    memory_current: int | None = None
    memory_peak: int | None = None
    swap_peak: int | None = None
    io_read_bytes: int | None = None
    io_write_bytes: int | None = None
    pids_current: int | None = None
    oom_kills: int | None = None
    memory_limit_hits: int | None = None
    pids_limit_hits: int | None = None


def value_of(data: bytes, key: bytes) -> int | None:
    """Return the number after ``key`` in a flat keyed file; None if the key is missing."""
    mark = key + b" "
    start = 0 if data.startswith(mark) else data.find(b"\n" + mark) + 1
    if start == 0 and not data.startswith(mark):
        return None
    start += len(mark)
    end = data.find(b"\n", start)
    return int(data[start:] if end < 0 else data[start:end])


def io_stat_totals(data: bytes) -> tuple[int, int]:
    """Return the bytes read and written of ``io.stat``, all devices together.

    A write through device-mapper counts for both the upper and the lower device.
    """
    return _sum_after(data, b" rbytes="), _sum_after(data, b" wbytes=")


def blkio_totals(data: bytes) -> tuple[int, int]:
    """Return the bytes read and written of a ``blkio.throttle.io_service_bytes*`` file, all devices together."""
    return _sum_after(data, b" Read "), _sum_after(data, b" Write ")


def _sum_after(data: bytes, key: bytes) -> int:
    total = 0
    start = data.find(key)
    while start >= 0:
        start += len(key)
        end = start
        while data[end : end + 1].isdigit():
            end += 1
        total += int(data[start:end] or 0)
        start = data.find(key, end)
    return total


# The index of each field of Reading in the list that the parsers fill.
(_CPU, _MEMORY, _PEAK, _SWAP, _IO_READ, _IO_WRITE, _PIDS, _OOM, _MEMORY_HITS, _PIDS_HITS) = range(10)
_COUNT = len(Reading._fields)


def _cpu_stat(data: bytes, found: Fields) -> None:
    microseconds = value_of(data, b"usage_usec")
    found[_CPU] = None if microseconds is None else microseconds / 1e6


def _cpuacct_usage(data: bytes, found: Fields) -> None:
    found[_CPU] = int(data) / 1e9


def _io_stat(data: bytes, found: Fields) -> None:
    found[_IO_READ], found[_IO_WRITE] = io_stat_totals(data)


def _blkio(data: bytes, found: Fields) -> None:
    found[_IO_READ], found[_IO_WRITE] = (0, 0) if data == b"Total 0\n" else blkio_totals(data)


def _memory_events(data: bytes, found: Fields) -> None:
    found[_OOM] = value_of(data, b"oom_kill")
    found[_MEMORY_HITS] = value_of(data, b"max")


def _oom_control(data: bytes, found: Fields) -> None:
    found[_OOM] = value_of(data, b"oom_kill")  # kernel 4.13


def _failcnt(data: bytes, found: Fields) -> None:
    found[_MEMORY_HITS] = (found[_MEMORY_HITS] or 0) + int(data)


def _pids_events(data: bytes, found: Fields) -> None:
    found[_PIDS_HITS] = value_of(data, b"max")


def _memory_and_swap_peak(data: bytes, found: Fields) -> None:
    memory = found[_PEAK]
    found[_SWAP] = 0 if memory is None else swap.least_peak(int(data), int(memory))


#: The controller and the parser of each file.
V2_FILES: dict[str, tuple[str, Parser]] = {
    "cpu.stat": ("cpu", _cpu_stat),
    "memory.current": ("memory", _MEMORY),
    "memory.peak": ("memory", _PEAK),  # kernel 5.19
    "memory.swap.peak": ("memory", _SWAP),  # kernel 6.5
    "memory.swap.current": ("memory", _SWAP),
    "memory.events": ("memory", _memory_events),
    "io.stat": ("io", _io_stat),
    "pids.current": ("pids", _PIDS),
    "pids.events": ("pids", _pids_events),
}
V1_FILES: dict[str, tuple[str, Parser]] = {
    "cpuacct.usage": ("cpu", _cpuacct_usage),
    "memory.usage_in_bytes": ("memory", _MEMORY),
    "memory.max_usage_in_bytes": ("memory", _PEAK),
    "memory.memsw.max_usage_in_bytes": ("memory", _memory_and_swap_peak),
    "memory.oom_control": ("memory", _oom_control),
    "memory.failcnt": ("memory", _failcnt),
    # If the limit on memory and swap together is as low, this file counts instead of memory.failcnt.
    "memory.memsw.failcnt": ("memory", _failcnt),
    "blkio.throttle.io_service_bytes_recursive": ("io", _blkio),  # kernel 4.16
    "pids.current": ("pids", _PIDS),
    "pids.events": ("pids", _pids_events),
}
#: The text that resets the peak, by file.
_PEAKS = {
    "memory.peak": b"reset\n",
    "memory.swap.peak": b"reset\n",
    "memory.max_usage_in_bytes": b"0",
    "memory.memsw.max_usage_in_bytes": b"0",
}
#: A file that is read only where the kernel does not have another.
_INSTEAD_OF = {"memory.swap.current": "memory.swap.peak"}
#: Files that count only how often a memory limit was reached.
MEMORY_LIMIT_HITS = frozenset({"memory.failcnt", "memory.memsw.failcnt"})
#: They tell the least that ``swap_peak`` can have been.
_LEAST_SWAP = ("memory.swap.current", "memory.memsw.max_usage_in_bytes")


class Meter:
    """Open fds of a cgroup's usage files. Reading is cheap enough before and after every request.

    Any thread may use it. ``exec`` closes the fds, ``fork`` inherits them.
    """

    def __init__(self, targets: list[tuple[str, str, Parser]]):
        """Open ``targets``, which are (directory, file, parser), without missing files. Raises KernelError."""
        self._files: list[tuple[int, str, Parser]] = []
        self._peaks: list[tuple[int, bytes]] = []
        self._swap_areas: int | None = None
        try:
            for directory, some in itertools.groupby(targets, lambda target: target[0]):
                with files.Directory(directory) as opened:
                    for _, name, parser in some:
                        self._open(opened, directory, name, parser)
        except BaseException:
            self.close()
            raise

    def _open(self, opened: files.Directory, directory: str, name: str, parser: Parser) -> None:
        path = f"{directory}/{name}"
        better = _INSTEAD_OF.get(name)
        if better and any(known == f"{directory}/{better}" for _, known, _ in self._files):
            return
        fd: int | None = None
        if name in _PEAKS:
            # A reset peak shows only through the fd that reset it (v2, kernel 6.12).
            try:
                fd = opened.open(name, os.O_RDWR)
                self._peaks.append((fd, _PEAKS[name]))
            except KernelError as error:
                if not (files.gone(error) or files.refused(error)):
                    raise
        if fd is None:
            try:
                fd = opened.open(name, os.O_RDONLY)
            except KernelError as error:
                if error.errno == errno.ENOENT and files.is_directory(directory):
                    return
                raise
        self._files.append((fd, path, parser))
        if name in _LEAST_SWAP:
            self._swap_areas = files.open_file(*os.path.split(swap.AREAS))

    def read(self) -> Reading:
        """Return the usage until now. Raises KernelError (ENODEV: the cgroup was deleted)."""
        found: Fields = [None] * _COUNT
        read = os.pread
        given_up: tuple[int, str, Parser] | None = None
        for one in self._files:
            fd, path, parser = one
            try:
                data = read(fd, 4096, 0)
            except OSError as error:
                if parser is not _blkio or error.errno != errno.ENODEV:
                    raise files.failure(error, path) from None
                given_up = one
                continue
            if isinstance(parser, int):
                found[parser] = int(data)
            else:
                parser(data, found)
        if given_up is not None:
            # On v1 the IO of a cgroup counts in the one above as soon as that has IO limits. The other counters remain.
            self._files.remove(given_up)
            posix.close(given_up[0])
        if found[_SWAP] == 0 and self._swap_areas is not None:
            try:
                areas = os.pread(self._swap_areas, 4096, 0)
            except OSError as error:
                raise files.failure(error, swap.AREAS) from None
            if swap.any_area(areas):
                found[_SWAP] = None
        return Reading._make(found)

    def oom_kills(self) -> int | None:
        """Return ``oom_kills`` alone, from one file. Raises KernelError (ENODEV: the cgroup was deleted)."""
        for fd, path, parser in self._files:
            if parser in (_oom_control, _memory_events):
                try:
                    return value_of(os.pread(fd, 4096, 0), b"oom_kill")
                except OSError as error:
                    raise files.failure(error, path) from None
        return None

    def reset_peak(self) -> bool:
        """Reset ``memory_peak`` and ``swap_peak``.

        Return False if the kernel cannot (v2 before 6.12), or this user may not.
        """
        try:
            for fd, value in self._peaks:
                os.write(fd, value)
        except OSError as error:
            if files.refused(error):
                self._peaks.clear()
            return False
        return bool(self._peaks)

    def close(self) -> None:
        """Close the fds. Calling it again does nothing."""
        self._peaks.clear()
        while self._files:
            posix.close(self._files.pop()[0])
        if self._swap_areas is not None:
            posix.close(self._swap_areas)
            self._swap_areas = None

    def __enter__(self) -> Meter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
