"""The options that set limits, as data: `limit_options` makes click's of them."""

from __future__ import annotations

from typing import NamedTuple


class LimitOption(NamedTuple):
    """One option: its flag, the key of a policy that it sets (of ``io`` for reads and writes), and what help says."""

    flag: str
    key: str
    metavar: str
    help: str

    @property
    def parameter(self) -> str:
        """What click calls its value."""
        return self.flag.removeprefix("--").replace("-", "_")


LIMIT_OPTIONS = (
    LimitOption("--cpu", "cpu", "PERCENT", "CPU time: 30% of one CPU, 150% is one and a half."),
    LimitOption("--cpu-weight", "cpu_weight", "N", "Share of scarce CPUs, 1 to 10000; others have 100."),
    LimitOption("--cpus", "cpus", "LIST", "Run on these CPUs only: 0-1,3."),
    LimitOption("--memory", "memory", "SIZE", "Most memory: 512M, 2G (1024-based); beyond it, killed."),
    LimitOption("--memory-high", "memory_high", "SIZE", "Slow it down above this; needs --memory."),
    LimitOption("--expand", "expand", "FACTOR", "At the memory limit, raise it so: 2x; with --up-to."),
    LimitOption("--up-to", "up_to", "SIZE", "... until it is this."),
    LimitOption("--swap", "swap", "SIZE", "Most swap, besides the memory; 0 is none."),
    LimitOption("--read", "read", "SIZE", "Bytes a second read from --device: 10M."),
    LimitOption("--write", "write", "SIZE", "Bytes a second written to --device: 10M."),
    LimitOption("--read-iops", "read_iops", "N", "Reads a second from --device."),
    LimitOption("--write-iops", "write_iops", "N", "Writes a second to --device."),
    LimitOption(
        "--device", "device", "PATH|MAJ:MIN", "Disk that --read and --write mean; default: the working directory's."
    ),
    LimitOption("--pids", "pids", "N", "Most processes and threads at once."),
)  # fmt: skip

#: The flags that ask for what `rcon_plugins.kernel.cgroup.Resources` calls otherwise.
FLAGS = {
    "cpu_quota": "--cpu",
    "cpu_weight": "--cpu-weight",
    "cpus": "--cpus",
    "memory_max": "--memory",
    "memory_high": "--memory-high",
    "swap_max": "--swap",
    "io": "--read and --write",
    "pids_max": "--pids",
}
