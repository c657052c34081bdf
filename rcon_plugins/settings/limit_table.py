"""The table of limits. Each limit is one row.

The rows define the flags of commands and their help, the names in JSON and in text output, the descriptions in the JSON
schema, the messages of refused limits, and the keywords of ``@confined``. `rcon_plugins.builtin.limits` uses them to
translate a policy to `rcon_plugins.kernel.cgroup.Resources`.

The table is plain data and imports no large module, because `rcon run` reads it before its command starts.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from rcon_plugins.errors import SettingsError

#: How a value is written: ``"30%"``, ``"30ms"``, ``"256M"``, ``"256M"`` or ``"50%"``, ``64``, ``"0-1,3"``, ``"20s"``,
#: ``"2x"``, ``"/srv"``.
Unit = Literal["share", "cpu_time", "size", "memory", "count", "cpus", "duration", "factor", "device"]

_COUNT_MAX = 2**63 - 1
#: Bytes of a page of memory, the least limit.
PAGE = 4096
#: The remedy for a limit of memory that is too low.
NEEDS_MEMORY = "a command needs some MiB: for example 256M"


class Limit(NamedTuple):
    """One limit, or one key that belongs to a limit (``expand``, ``up_to``, ``device``).

    ``key``: its key in a policy; JSON uses the same name. ``unit``: how the value is written. ``metavar`` and ``help``:
    its line in ``--help``. ``description`` and ``example``: for the JSON schema and error messages. ``table``: the
    table of the policy that holds the key: ``""`` for the policy itself and its ``each``, ``"memory"``, ``"io"`` (one
    table per device), or ``"each"`` for keys that only ``each`` has. ``field``: the field of `Resources` that it sets,
    for ``"io"`` that of `IoMax`; empty if the kernel has no such limit. ``least``, ``most``: the range of a number;
    the unit of a size is bytes. ``default``: the value that limits nothing, which the kernel reports anyway.
    ``removable``: whether ``max`` removes the limit. ``needs``: the key of a limit without which this one is refused.
    """

    key: str
    unit: Unit
    metavar: str
    help: str
    description: str
    example: object
    field: str = ""
    table: Literal["", "memory", "io", "each"] = ""
    least: int = 0
    most: int = _COUNT_MAX
    default: int | None = None
    removable: bool = True
    needs: str = ""

    @property
    def flag(self) -> str:
        """The option that sets it: ``--cpu-weight``."""
        return f"--{self.name}"

    @property
    def name(self) -> str:
        """Its name in text output: ``cpu-weight``."""
        return self.key.replace("_", "-")

    def parse(self, text: str) -> float | int | str:
        """Return the value of an option's text: CPUs, bytes, seconds, a count, or a list of CPUs.

        Raises `SettingsError`, without a key, if the text is not such a value or is out of range.
        """
        from rcon_plugins.settings import units  # loads slowly

        value = units.parse(self.unit, text)
        if isinstance(value, int) and not self.least <= value <= self.most:
            if self.least == PAGE:
                raise SettingsError(f"{text} is less than a page of memory", value=text, hint=NEEDS_MEMORY)
            most = "" if self.most == _COUNT_MAX else f", at most {self.most}"
            hint = f"at least {units.format_value(self.unit, self.least)}{most}; for example {self.example}"
            raise SettingsError(f"{text} is out of range", value=text, hint=hint)
        return value


#: All rows, in the order of ``--help``.
LIMITS: tuple[Limit, ...] = (
    Limit(
        "cpu", "share", "PERCENT", "CPU time: 30% of one CPU, 150% is one and a half.",
        "CPU time, as a share of one CPU: 150% is one and a half CPUs.", "30%",
        field="cpu_quota",
    ),
    Limit(
        "cpu_burst", "cpu_time", "TIME", "CPU time an idle group may save up and use at once: 30ms.",
        "CPU time beyond the quota that an idle group may save up and use at once, as long as the quota's share of a "
        "period of 100 ms at most: 30ms for 30%.", "30ms",
        field="cpu_burst", default=0, removable=False, needs="cpu",
    ),
    Limit(
        "cpu_weight", "count", "N", "Weight when CPUs are scarce, 1 to 10000; default 100.",
        "Weight against other groups when CPUs are scarce, 1 to 10000; the default is 100.", 50,
        field="cpu_weight", least=1, most=10_000, default=100, removable=False,
    ),
    Limit(
        "cpus", "cpus", "LIST", "Run on these CPUs only: 0-1,3.",
        "The CPUs to run on, by number.", "0-1",
        field="cpus", removable=False,
    ),
    Limit(
        "memory", "memory", "SIZE", "Most memory: 512M, 0.5G, 50% of the machine; killed beyond it.",
        "Bytes of memory, or a share of what the machine or container has: 50%. The kernel kills processes that need "
        "more, unless the limit may expand.", "256M",
        field="memory_max", least=PAGE,
    ),
    Limit(
        "memory_high", "memory", "SIZE", "Slow down above this much memory; needs --memory.",
        "Bytes of memory above which allocation is slowed down.", "200M",
        field="memory_high", least=PAGE, needs="memory",
    ),
    Limit(
        "expand", "factor", "FACTOR", "Multiply the memory limit when it is hit: 2x; needs --up-to.",
        "Factor by which the limit grows each time it is hit.", "2x",
        table="memory",
    ),
    Limit(
        "up_to", "memory", "SIZE", "Expand the memory limit up to this.",
        "Bytes up to which the limit grows. The kernel kills processes that need more.", "1G",
        table="memory",
    ),
    Limit(
        "swap", "size", "SIZE", "Most swap, besides the memory; default with --memory: none.",
        "Bytes of swap, besides the memory. With a limit of memory, the default is none.", "1G",
        field="swap_max",
    ),
    Limit(
        "read", "size", "SIZE", "Bytes read per second from --device: 10M.",
        "Bytes read per second.", "10M",
        field="rbps", table="io", least=1,
    ),
    Limit(
        "write", "size", "SIZE", "Bytes written per second to --device: 10M.",
        "Bytes written per second.", "5M",
        field="wbps", table="io", least=1,
    ),
    Limit(
        "read_iops", "count", "N", "Reads per second from --device.",
        "Reads per second.", 1000,
        field="riops", table="io", least=1,
    ),
    Limit(
        "write_iops", "count", "N", "Writes per second to --device.",
        "Writes per second.", 500,
        field="wiops", table="io", least=1,
    ),
    Limit(
        "device", "device", "PATH|MAJ:MIN", "Disk for --read and --write; default: that of the working directory.",
        "A path on the disk, or MAJOR:MINOR.", "/srv",
        table="io", removable=False,
    ),
    Limit(
        "pids", "count", "N", "Most processes and threads at once.",
        "Processes and threads at once.", 64,
        field="pids_max", least=1, most=4_194_304,
    ),
    Limit(
        "timeout", "duration", "TIME", "Kill it, and all it started, after this: 20s, 5m, 1h.",
        "Wall time after which the request, task or command is killed.", "20s",
        table="each",
    ),
    Limit(
        "grace", "duration", "TIME", "At the timeout send SIGTERM, and SIGKILL only after this: 5s.",
        "Time between SIGTERM at the timeout and SIGKILL, in which a task or command may end by itself.", "5s",
        table="each", needs="timeout",
    ),
    Limit(
        "timeout_soft", "duration", "TIME", "Ask a task to finish after this: 18s.",
        "Wall time after which a task is asked to finish.", "18s",
        table="each",
    ),
    Limit(
        "memory_soft", "memory", "SIZE", "Ask a task to finish at this much memory: 200M.",
        "Bytes of memory at which a task is asked to finish.", "200M",
        table="each",
    ),
)  # fmt: skip

#: The rows by key.
BY_KEY = {limit.key: limit for limit in LIMITS}
#: Limits of a policy and of its ``each`` that set a field of `Resources`, in the order of the table, without ``io``.
CGROUP_LIMITS = tuple(limit for limit in LIMITS if limit.field and limit.table == "")
#: Limits of one device, under ``io``.
IO_LIMITS = tuple(limit for limit in LIMITS if limit.field and limit.table == "io")
#: The rows that are options of ``rcon run``, ``rcon attach`` and ``rcon set``.
OPTIONS = tuple(limit for limit in LIMITS if limit.table != "each")
#: The keys that a policy and its ``each`` both have.
SHARED_KEYS = frozenset({*(limit.key for limit in CGROUP_LIMITS), "io"})

#: For each field of `Resources`, the key of a policy that sets it.
KEY_OF_FIELD = {limit.field: limit.key for limit in CGROUP_LIMITS}
#: For each field of `Resources`, the flag that sets it, for messages.
FLAG_OF_FIELD = {**{limit.field: limit.flag for limit in CGROUP_LIMITS}, "io": "--read and --write"}
