"""How the tasks of a worker ended that did not end by themselves: counted by all processes of its pool together."""

from __future__ import annotations

import fcntl
import os
from collections import Counter
from typing import Final

from rcon_plugins.outcome import Outcome

#: What is counted; each death is one byte, the place of its ending here.
_COUNTED: Final = ("memory", "timeout", "pids", "killed", "refused", "forbidden")


class EndingCounters:
    """Deaths, in a file in memory that grows by a byte with each. Made before the pool forks; safe in every process."""

    def __init__(self) -> None:
        self.file = os.memfd_create("rcon-deaths")
        fcntl.fcntl(self.file, fcntl.F_SETFL, os.O_APPEND)

    def add(self, outcome: Outcome) -> None:
        """Count an outcome, if it is one that is counted."""
        if outcome.ending in _COUNTED:
            os.write(self.file, bytes([_COUNTED.index(outcome.ending)]))

    def read(self) -> dict[str, int]:
        """How many there were of each."""
        counts: Counter[int] = Counter()
        offset = 0
        while chunk := os.pread(self.file, 65536, offset):
            counts.update(chunk)
            offset += len(chunk)
        return {_COUNTED[number]: count for number, count in sorted(counts.items())}
