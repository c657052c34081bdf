"""What work used."""

from __future__ import annotations

import msgspec


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """What one work used. ``None`` is "not measured here", never zero.

    ``inline`` work measures CPU and wall time of its thread only.
    """

    wall_seconds: float = 0.0
    #: CPU time, user and system, of the work and of all it started.
    cpu_seconds: float | None = None
    #: Bytes. The highest since the executor process was made where the kernel cannot reset a peak
    #: (cgroup v2 before 6.12), else of this work alone.
    memory_peak: int | None = None
    io_read_bytes: int | None = None
    io_write_bytes: int | None = None
