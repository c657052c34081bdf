"""Count in a file that other processes read: its content as words of 64 bits, mapped shared (mmap(2), madvise(2)).

Only the process that mapped it has the mapping. Its forks do not have it, and no descriptor stays open through which
they could map it again. Python's `mmap.mmap` keeps one, and when it is closed or collected in a fork, it unmaps
whatever is at that address there.
"""

from __future__ import annotations

import os

from rcon_plugins.errors import KernelError
from rcon_plugins.kernel.syscalls import (
    MAP_SHARED,
    PROT_READ,
    PROT_WRITE,
    keep_from_forks,
    map_memory,
    unmap_memory,
    words_at,
)

WORD_SIZE = 8


class SharedWords:
    """A file of ``count`` words, mapped to read and to write. ``words`` is a view of them, as unsigned integers.

    Only the process that made the object may use the view: in a fork the memory is not there, and the access would end
    it (SIGSEGV).
    """

    def __init__(self, descriptor: int, count: int) -> None:
        """Give the file its length and its memory, and map it. The caller may close ``descriptor`` then.

        The memory is allocated at once, because a later write without it would end this process (SIGBUS). Raises
        `KernelError`, for example ENOSPC.
        """
        size = count * WORD_SIZE
        try:
            os.posix_fallocate(descriptor, 0, size)
        except OSError as error:
            raise KernelError.from_oserror(error, path="posix_fallocate") from None
        self._pid = os.getpid()
        self._size = size
        self._address = map_memory(0, size, PROT_READ | PROT_WRITE, MAP_SHARED, descriptor, 0)
        try:
            keep_from_forks(self._address, size)
        except BaseException:
            unmap_memory(self._address, size)
            raise
        self.words = words_at(self._address, count)

    @property
    def is_ours(self) -> bool:
        """Whether the mapping exists in this process: not in a fork, and not after `close`."""
        return self._pid == os.getpid() and self._address != 0

    def close(self) -> None:
        """Unmap the file. The view must not be used any more. Does nothing in a fork, or when called again."""
        if not self.is_ours:
            return
        address, self._address = self._address, 0
        self.words = memoryview(b"").cast("Q")
        unmap_memory(address, self._size)
