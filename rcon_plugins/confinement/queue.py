"""What work waits for before it runs: that not too much of its kind is under way, and that it fits into the budget."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from rcon_plugins.errors import ConcurrencyLimitExceeded, ConfinementError
from rcon_plugins.settings.budget import BUDGET, promised
from rcon_plugins.settings.units import Size

if TYPE_CHECKING:
    from rcon_plugins.confinement.confinement import Confinement
    from rcon_plugins.tree.ledger import Allocation, Ledger
    from rcon_plugins.tree.slots import Slots

_T = TypeVar("_T")
#: How often work that waits for its turn looks whether it has come, seconds.
_SHORTEST_WAIT = 0.01
_LONGEST_WAIT = 0.25


class MemoryBudget(NamedTuple):
    """The budget in force: its account, how many bytes it is in all, and how long work waits for some, seconds."""

    ledger: Ledger
    whole: int
    wait: float


class Reservation:
    """What one work holds while it is under way."""

    __slots__ = ("share", "slot")

    def __init__(self) -> None:
        self.slot: int | None = None
        self.share: Allocation | None = None


class Reservations:
    """Gives turns to the work of one process. Thread-safe. ``is_open``: whether anybody still waits for work."""

    def __init__(self, slots: Slots, purse: MemoryBudget | None, is_open: Callable[[], bool]) -> None:
        self._slots = slots
        self._purse = purse
        self._is_open = is_open

    def take(self, turn: Reservation, confinement: Confinement, memory: int | None, wait: bool) -> None:
        """Take what a work needs; ``turn`` has what was taken also where the rest was not to be had.

        ``memory``: what the work has in the place of ``each.memory``. With ``wait`` it waits for a slot; for the budget
        it always does, for so long as that says. Raises `ConcurrencyLimitExceeded`, `ConfinementError`.
        """
        concurrency = confinement.policy.concurrency
        if concurrency is not None:
            turn.slot = self.wait(wait, lambda: self._slot(confinement, concurrency))
        if self._purse is not None:
            size = promised(confinement.policy) if memory is None else Size(memory)
            if size is not None:
                turn.share = self._share(self._purse, size)

    def give_back(self, turn: Reservation) -> None:
        """The work is over, or does not run."""
        if turn.share is not None and self._purse is not None:
            self._purse.ledger.give_back(turn.share)
        if turn.slot is not None:
            self._slots.release(turn.slot)

    def wait(self, wait: bool, action: Callable[[], _T]) -> _T:
        """What ``action`` returns; with ``wait`` it is tried until there is room."""
        pause = _SHORTEST_WAIT
        while True:
            try:
                return action()
            except ConcurrencyLimitExceeded:
                if not wait or not self._is_open():
                    raise
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_WAIT)

    def _slot(self, confinement: Confinement, limit: int) -> int:
        slot = self._slots.take(confinement.first_slot, limit)
        if slot is None:
            raise ConcurrencyLimitExceeded(
                f"{limit} works are under way, which is the most", limit="concurrency"
            )
        return slot

    def _share(self, purse: MemoryBudget, size: Size) -> Allocation:
        if size > purse.whole:
            raise ConfinementError(f"its memory, {size}, is more than the whole budget, {Size(purse.whole)}")
        until = time.monotonic() + purse.wait
        pause = _SHORTEST_WAIT
        while (share := purse.ledger.take(size, purse.whole)) is None:
            left = until - time.monotonic()
            if left <= 0 or not self._is_open():
                raise ConcurrencyLimitExceeded(
                    f"{size} of memory did not fit into what is left of the budget, {Size(purse.whole)}",
                    limit=BUDGET,
                )
            time.sleep(min(pause, left))
            pause = min(2 * pause, _LONGEST_WAIT)
        return share
