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

#: Later work may take this share of the room that the first work left. Less than this share of the limit is no matter.
_SHARE = 0.5
#: The first work may keep this share of the limit.
_MOST = 0.75
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

    def is_too_much(self, executor: Executor, held: int, limit: int) -> bool:
        """Return whether an executor process that holds so many bytes after its work has to be replaced.

        Unmapped page cache does not count, since the kernel drops it for the next work. Raises `KernelError`.
        """
        is_first = executor.uses == 1
        if is_first:
            executor.kept = held
        if held <= _SHARE * limit:
            return False
        held = need_of(executor.leaf, held)
        if is_first:
            executor.kept, most = held, _MOST * limit
        else:
            kept = executor.kept or 0
            most = kept + _SHARE * (limit - kept)
        if held <= most:
            return False
        self._on_too_much(executor.name, executor.policy)
        if is_first:
            self._warn(executor, held, limit)
        return True

    def _warn(self, executor: Executor, held: int, limit: int) -> None:
        name = executor.policy.name
        with self._lock:
            if name in self._warned:
                return
            self._warned.add(name)
        key = "memory" if executor.policy.each.memory is None else "each.memory"
        LOGGER.warning(
            "rcon: policy %s: a new process keeps %s after its first request or task, more than three quarters of "
            '%s = "%s". It is replaced, so each process loads its data again. To keep it, set %s = "%s"',
            *(name, _whole(held), key, format_size(limit), key, _whole(held / _MOST)),
        )


def _whole(size: float) -> str:
    return format_size(math.ceil(size / _MIB) * _MIB)
