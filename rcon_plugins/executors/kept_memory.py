"""Whether the memory that an executor process keeps after its work leaves enough room for more.

What the first work leaves in use is mostly a cache: a model, compiled code, a connection. A new process would only load
it again. What later work adds to it is more likely to be lost memory.
"""

from __future__ import annotations

import logging
import math
import threading
from typing import TYPE_CHECKING

from rcon_plugins.kernel.cgroup.need import need_of
from rcon_plugins.settings.units import format_size

if TYPE_CHECKING:
    from collections.abc import Callable

    from rcon_plugins.executors.executor import Executor
    from rcon_plugins.settings.policy import Policy

LOGGER = logging.getLogger("rcon")

#: Later work may take this share of the room that the first work left, which counts if it kept as much of the limit.
_SHARE = 0.5
#: The first work may keep this share of the limit.
_MOST = 0.75
#: The limit that a warning names has room for processes that keep a little more than this one.
_ROOM = 1.1
_MIB = 1024**2


class KeptMemory:
    """Judges executor processes after their work. Thread-safe.

    For each that keeps too much, ``on_too_much`` is called with the name of its confinement and its policy. Where even
    the first work left too much, one warning for each policy says which limit helps.
    """

    def __init__(self, on_too_much: Callable[[str, Policy], object]) -> None:
        self._on_too_much = on_too_much
        self._lock = threading.Lock()
        self._warned: set[str] = set()
        #: The policies where a process that kept much reached its limit later: it was no cache.
        self._in_vain: set[str] = set()

    def is_too_much(self, executor: Executor, held: int, limit: int) -> bool:
        """Return whether an executor process that holds so many bytes after its work has to be replaced.

        Unmapped page cache does not count, since the kernel drops it for the next work. Raises `KernelError`.
        """
        if executor.uses == 1:
            executor.kept = 0
        if held <= _SHARE * limit:
            return False
        held, shared = need_of(executor.leaf, held)
        if executor.uses == 1 and held <= _MOST * limit and executor.policy.name not in self._in_vain:
            # Files in memory and shared memory may be in the hands of others by now.
            executor.kept = held - shared
        if held <= executor.kept + _SHARE * (limit - executor.kept):
            return False
        self._on_too_much(executor.name, executor.policy)
        if executor.uses == 1 and held > _MOST * limit:
            key = "memory" if executor.policy.each.memory is None else "each.memory"
            self._warn(
                executor.policy,
                f"a new process keeps {_whole(held)} after its first request or task, more than three quarters of "
                f'{key} = "{format_size(limit)}". It is replaced, so each process loads its data again. '
                f'To keep it, set {key} = "{_whole(_ROOM * held / _MOST)}"',
            )
        return True

    def reached_limit(self, executor: Executor) -> None:
        """Note that an executor process reached its memory limit. If it kept much, no other of its policy may."""
        if not executor.kept:
            return
        with self._lock:
            self._in_vain.add(executor.policy.name)
        self._warn(
            executor.policy,
            f"a process reached its memory limit with {_whole(executor.kept)} in use that its first request or task "
            "had left. From now on a process that keeps more than half of the limit is replaced",
        )

    def _warn(self, policy: Policy, text: str) -> None:
        with self._lock:
            if policy.name in self._warned:
                return
            self._warned.add(policy.name)
        LOGGER.warning("rcon: policy %s: %s", policy.name, text)


def _whole(size: float) -> str:
    return format_size(math.ceil(size / _MIB) * _MIB)
