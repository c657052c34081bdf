"""Report events of cgroups as they happen, with one thread for all cgroups of a process. The package knows no policy.

::

    watcher = Watcher()
    watch = watcher.add(cgroup, print, kinds=("memory_limit", "oom_kill", "empty"))
    ...
    watch.close()
"""

from rcon_plugins.kernel.events.event import KINDS, POLLED_SECONDS, Event, Kind, Pressure
from rcon_plugins.kernel.events.memory_threshold import MemoryThreshold
from rcon_plugins.kernel.events.watcher import Watch, Watcher, watcher_of_process

__all__ = [
    "KINDS",
    "POLLED_SECONDS",
    "Event",
    "Kind",
    "MemoryThreshold",
    "Pressure",
    "Watch",
    "Watcher",
    "watcher_of_process",
]
