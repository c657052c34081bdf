"""One executor process, seen from the host."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from rcon_plugins.executors.channel import Channel

if TYPE_CHECKING:
    from rcon_plugins.executors.monitor import Monitored
    from rcon_plugins.kernel.capability import Identity
    from rcon_plugins.kernel.cgroup import Cgroup, Meter, Reading
    from rcon_plugins.settings.policy import Policy

#: Tells work that its time, or its memory, will soon be over. Only for services that expect it.
SOFT_TIME = signal.SIGUSR1
SOFT_MEMORY = signal.SIGUSR2


#: A confinement by name, and who its work is: what an executor, process or thread, serves all its life.
Key = tuple[str, "Identity | None"]


class Executor:
    """The host's side of one executor process, which serves one policy (and key) as one identity all its life.

    ``fate`` is why the host killed it, if it did. ``told`` is set when the fork server told its end, ``status`` is its
    wait status then (None if nobody could tell); ``ended`` when it is gone, with all it started and its cgroup.
    """

    def __init__(
        self,
        number: int,
        name: str,
        policy: Policy,
        identity: Identity | None,
        group: Cgroup,
        leaf: Cgroup,
        meter: Meter,
        channel: Channel,
    ) -> None:
        self.number = number
        self.name = name
        self.policy = policy
        self.identity = identity
        #: The cgroup of its confinement, and its own below that.
        self.group = group
        self.leaf = leaf
        self.channel = channel
        #: Where somebody wants to know what happens to its cgroup.
        self.monitored: Monitored | None = None
        self.pid = 0
        self.works = 0
        self.fate: str | None = None
        self.told = False
        self.status: int | None = None
        self.ended = threading.Event()
        #: When its cgroup was last killed, and since when it is dying (`time.monotonic`).
        self.killed_at = 0.0
        self.dying_since: float | None = None
        #: Whether the log was told that it does not end.
        self.complained = False
        #: Whether it has served a work, and has not said yet that it waits for another.
        self.away = False
        #: When it was given back last (`time.monotonic`).
        self.given_back = 0.0
        #: Whether what it started may outlive it: its cgroup stays until that has ended, or the host does.
        self.spared = False
        #: Whether it was made by limits that its policy no longer has.
        self.stale = False
        #: Whether it counts among the executor processes there may be.
        self.counted = True
        #: The deadline of the work it serves, and when the alarm that is set for it will ring.
        self.deadline: tuple[float, Callable[[], object]] | None = None
        self.alarm: float | None = None
        self._meter: Meter | None = meter
        #: Guards the meter, the callbacks, and who settles the work under way. Held for moments.
        self.lock = threading.Lock()
        self._exit_callbacks: list[Callable[[], object]] = []
        #: What its cgroup had used after its last work, or at its end.
        self.reading: Reading = meter.read()

    @property
    def key(self) -> Key:
        """What it serves."""
        return self.name, self.identity

    def read(self) -> Reading:
        """What its cgroup has used; the last reading once it has ended. Raises `KernelError`."""
        with self.lock:
            return self.reading if self._meter is None else self._meter.read()

    def begin_work(self) -> Reading:
        """Count one more work, and begin a new memory peak where the kernel can. What was used before it."""
        with self.lock:
            if self.works and self._meter is not None:
                self._meter.reset_peak()
        self.works += 1
        self.away = True
        return self.reading

    def shut(self) -> None:
        """Take the last reading and close what it is read by. Raises `KernelError`, and is shut all the same."""
        with self.lock:
            meter, self._meter = self._meter, None
            if meter is not None:
                try:
                    self.reading = meter.read()
                finally:
                    meter.close()

    def is_alone(self, reading: Reading) -> bool:
        """Whether the executor process is the only one left in its leaf: the work left nothing running."""
        if reading.pids_current == 1:
            return True
        # More than one task: its own threads are its own affair, other processes are not.
        return self.leaf.processes() == [self.pid]

    def when_ended(self, action: Callable[[], object]) -> None:
        """Have ``action`` called once the executor has ended, by the supervisor; or at once if it has."""
        with self.lock:
            if not self.ended.is_set():
                self._exit_callbacks.append(action)
                return
        action()

    def end(self) -> list[Callable[[], object]]:
        """Set ``ended``; what is now to be called."""
        with self.lock:
            self.ended.set()
            mourners, self._exit_callbacks = self._exit_callbacks, []
        return mourners

    def dies(self) -> float:
        """Since how many seconds it has been dying; 0 at first."""
        now = time.monotonic()
        if self.dying_since is None:
            self.dying_since = now
        return now - self.dying_since
