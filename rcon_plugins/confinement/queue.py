"""Wait before work runs: for a free slot of its confinement, and for its share of the memory budget."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

import msgspec

from rcon_plugins.errors import ConcurrencyLimitExceeded, ConfinementError
from rcon_plugins.settings.budget import BUDGET, promised
from rcon_plugins.settings.units import format_size

if TYPE_CHECKING:
    from rcon_plugins.confinement.budget import MemoryBudget
    from rcon_plugins.settings.policy import Policy
    from rcon_plugins.tally.writer import Record
    from rcon_plugins.tree.locks import Allocation, ByteLocks

_T = TypeVar("_T")
#: How long waiting work sleeps between two attempts: the first time, and at most. In seconds.
_SHORTEST_WAIT = 0.01
_LONGEST_WAIT = 0.25


class Reservation(msgspec.Struct):
    """The slot and the memory of the budget that one unit of work holds while it runs. Each is None if not needed.

    ``record`` counts it, from its beginning to its outcome.
    """

    record: Record | None = None
    slot: Allocation | None = None
    memory: Allocation | None = None


class Reservations:
    """Hands out reservations in one process. Thread-safe.

    ``slots`` are the locks that all processes of the server share (`Instance.locks`). ``is_open`` returns whether work
    should still wait.
    """

    def __init__(self, slots: ByteLocks, budget: MemoryBudget | None, is_open: Callable[[], bool]) -> None:
        self._slots = slots
        self._budget = budget
        self._is_open = is_open

    def reserve(
        self, reservation: Reservation, policy: Policy, first_slot: int, memory: int | None, *, wait: bool
    ) -> None:
        """Reserve a slot and budget. On failure the reservation still lists what was taken: release it in any case.

        ``first_slot`` is that of the confinement. ``memory``, in bytes, replaces ``each.memory`` of the policy. With
        ``wait``, wait for a slot instead of raising. In both cases the budget's own ``wait`` bounds the wait for
        memory. Raises `ConcurrencyLimitExceeded`, `ConfinementError`.
        """
        concurrency = policy.concurrency
        if concurrency is not None:
            reservation.slot = self.retry(wait, lambda: self._reserve_slot(first_slot, concurrency))
        if self._budget is not None:
            size = promised(policy) if memory is None else memory
            if size is not None:
                reservation.memory = self._reserve_memory(self._budget, size)

    def release(self, reservation: Reservation) -> None:
        """Release the slot and memory that the reservation lists."""
        if reservation.memory is not None and self._budget is not None:
            self._budget.release(reservation.memory)
        if reservation.slot is not None:
            self._slots.release(reservation.slot)

    def retry(self, wait: bool, action: Callable[[], _T]) -> _T:
        """Return what ``action`` returns; with ``wait``, repeat it while it raises `ConcurrencyLimitExceeded`."""
        pause = _SHORTEST_WAIT
        while True:
            try:
                return action()
            except ConcurrencyLimitExceeded:
                if not wait or not self._is_open():
                    raise
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_WAIT)

    def _reserve_slot(self, first: int, limit: int) -> Allocation:
        slot = self._slots.reserve_one(first, first + limit)
        if slot is None:
            raise ConcurrencyLimitExceeded(
                f"concurrency limit reached: {limit} already running", limit="concurrency"
            )
        return slot

    def _reserve_memory(self, budget: MemoryBudget, size: int) -> Allocation:
        if size > budget.whole:
            raise ConfinementError(
                f"its memory limit {format_size(size)} exceeds the whole budget of {format_size(budget.whole)}"
            )
        until = time.monotonic() + budget.wait
        pause = _SHORTEST_WAIT
        while (allocation := budget.reserve(size)) is None:
            left = until - time.monotonic()
            if left <= 0 or not self._is_open():
                raise ConcurrencyLimitExceeded(
                    f"the memory budget of {format_size(budget.whole)} has less than {format_size(size)} left",
                    limit=BUDGET,
                )
            time.sleep(min(pause, left))
            pause = min(2 * pause, _LONGEST_WAIT)
        return allocation
