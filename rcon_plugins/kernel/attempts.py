"""When to try a failed kernel call again: at growing intervals, as long as the server lives."""

from __future__ import annotations

import time

#: The pause after the first failure, and the longest one, seconds. Each is twice the one before.
FIRST_PAUSE = 0.01
LONGEST_PAUSE = 5.0


class Attempts:
    """The failed attempts of one call. The first failure is due for a log line, the others are only counted."""

    __slots__ = ("due", "failures", "pause")

    def __init__(self) -> None:
        self.failures = 0
        self.pause = 0.0
        #: The time of the next attempt (`time.monotonic`).
        self.due = 0.0

    def failed(self) -> bool:
        """Count one failure, and set the time of the next attempt. Return whether it is the first failure."""
        pause = min(FIRST_PAUSE * 2 ** min(self.failures, 16), LONGEST_PAUSE)
        self.failures += 1
        self.pause = pause
        self.due = time.monotonic() + pause
        return self.failures == 1

    @property
    def is_due(self) -> bool:
        """Whether to try now."""
        return time.monotonic() >= self.due
