"""Work: one request, task or command to be confined; and what it used."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import msgspec

_NOTHING: Mapping[str, str] = MappingProxyType({})


class Work(NamedTuple):
    """One request, task or command to be confined.

    ``kind`` is ``"request"``, ``"task"``, ``"command"`` or ``"call"``. ``name`` is for people: the request line, the
    task's name, the command. Routes match ``attributes``, and ``per`` takes its key from them: ``host``, ``path`` and
    ``method`` of a request, ``task`` and ``queue`` of a task, ``command``. The mapping may be lazy. A missing attribute
    is a missing key, never an empty string.
    """

    kind: str
    name: str
    attributes: Mapping[str, str] = _NOTHING

    def quoted(self) -> str:
        """Return the name in quotes. That of a request has its host added, which routes match first."""
        host = self.attributes.get("host")
        return repr(self.name) if host is None else f"{self.name!r} of the host {host!r}"


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """What one unit of work used. ``None`` is "not measured here", never zero.

    ``inline`` and ``thread`` measure CPU and wall time alone.
    """

    wall_seconds: float = 0.0
    #: CPU time, user and system, of the work and of all it started.
    cpu_seconds: float | None = None
    #: Bytes. The highest since the executor process was made where the kernel cannot reset a peak
    #: (cgroup v2 before 6.12); else of this unit of work alone.
    memory_peak: int | None = None
    #: Bytes. The largest resident set of a single process of a command, as getrusage(2) has it: memory that the process
    #: had itself or mapped, without the page cache around it. None if it is not above what rcon itself had before it
    #: executed the command, some 10 to 20 MB; and for requests and tasks.
    rss_peak: int | None = None
    #: Bytes. The most swap, likewise; exact on cgroup v2 since Linux 6.5. Elsewhere it is the least that it can have
    #: been, or None: `rcon_plugins.kernel.cgroup.Reading`.
    swap_peak: int | None = None
    io_read_bytes: int | None = None
    io_write_bytes: int | None = None
    #: Processes of this unit of work that the OOM killer ended.
    oom_kills: int | None = None
