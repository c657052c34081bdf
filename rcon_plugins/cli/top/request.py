"""A source of samples that is asked in a thread of its own: one that is slow to answer keeps no key waiting."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterable

from rcon_plugins.groups.sample import Sample


class Asked:
    """Asks ``source`` one time after the other, always in the same thread. Of the thread that made it."""

    def __init__(self, source: Callable[[], Iterable[Sample]]) -> None:
        self._source = source
        self._orders: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[list[Sample] | BaseException] = queue.SimpleQueue()
        self._since: float | None = None
        # A daemon: nobody waits at the end for an answer that does not come.
        threading.Thread(target=self._serve, name="rcon-samples", daemon=True).start()

    @property
    def waits(self) -> float | None:
        """For how many seconds an answer is waited for; None where none is."""
        return None if self._since is None else time.monotonic() - self._since

    def ask(self) -> None:
        """Begin to ask, if that is not under way."""
        if self._since is None:
            self._since = time.monotonic()
            self._orders.put(None)

    def answer(self) -> list[Sample] | None:
        """The answer, once; None where there is none yet. Raises what the source raised."""
        try:
            answer = self._answers.get_nowait()
        except queue.Empty:
            return None
        self._since = None
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def _serve(self) -> None:
        while True:
            self._orders.get()
            try:
                self._answers.put(list(self._source()))
            except BaseException as error:  # noqa: BLE001 - it is raised where it is asked for
                self._answers.put(error)
