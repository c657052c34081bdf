"""Kill and stop processes of a server at random, and let the stopped ones go on."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Mapping
from random import Random

from tests.processes import children

#: What is done, and how often in comparison. The workers of Celery are the processes of its pool.
ACTS = {
    "kill executor": 40,
    "stop executor": 24,
    "kill fork server": 8,
    "stop fork server": 10,
    "kill worker": 6,
    "stop worker": 8,
}
RELOADS = {"reload": 2}
#: The longest stop, seconds. gunicorn ends a worker that is silent for 30.
LONGEST_STOP = 4.0


class Harm:
    """A thread that harms a server until it is paused or ended. ``acts`` is one of `ACTS`, or more."""

    def __init__(self, pid: int, acts: Mapping[str, int], random: Random) -> None:
        self.done: Counter[str] = Counter()
        self._server = pid
        self._acts = acts
        self._random = random
        self._goes_on = threading.Event()
        self._ending = threading.Event()
        self._stopped: dict[int, float] = {}
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def go_on(self) -> None:
        """Begin, or begin again."""
        self._goes_on.set()

    def pause(self) -> None:
        """Harm nobody for a while. All stopped processes go on."""
        self._goes_on.clear()
        with self._lock:
            self._continue(everything=True)

    def end(self) -> None:
        """End the thread."""
        self.pause()
        self._ending.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._ending.is_set():
            if self._goes_on.wait(0.2):
                with self._lock:
                    if self._goes_on.is_set():
                        self._harm()
                self._ending.wait(self._random.uniform(0.1, 1.5))
            with self._lock:
                self._continue()

    def _harm(self) -> None:
        act = self._random.choices(list(self._acts), list(self._acts.values()))[0]
        if act == "reload":
            os.kill(self._server, signal.SIGHUP)
            self.done[act] += 1
            return
        how, _, kind = act.partition(" ")
        pids = self._pids(kind)
        if not pids:
            return
        pid = self._random.choice(pids)
        with contextlib.suppress(ProcessLookupError):
            if how == "kill":
                os.kill(pid, signal.SIGKILL)
            else:
                self._stopped[pid] = time.monotonic() + self._random.uniform(0.1, LONGEST_STOP)
                os.kill(pid, signal.SIGSTOP)
            self.done[act] += 1

    def _pids(self, kind: str) -> list[int]:
        workers = children(self._server)
        if kind == "worker":
            return workers
        servers = [pid for worker in workers for pid in children(worker)]
        return servers if kind == "fork server" else [pid for one in servers for pid in children(one)]

    def _continue(self, *, everything: bool = False) -> None:
        now = time.monotonic()
        for pid, until in list(self._stopped.items()):
            if everything or until <= now:
                del self._stopped[pid]
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)
