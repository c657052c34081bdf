"""Run the tests that depend on the kernel's cgroup hierarchy on pure cgroup v2 or v1, in an emulated machine.

`python -m tests.vm [pytest arguments]` boots the machine (tests/machine.py), runs pytest there and ends with pytest's
exit status. Unless the arguments name tests it runs those of `TESTS` that are marked `each_layout` and not `once`,
`smoke`, or `measures(each_layout=True)`. Everything takes several times as long there as elsewhere, so tests that do
not depend on the hierarchy are left out.

In the machine the tests find:
- cgroup v2 alone, with all of its controllers, at /sys/fs/cgroup; with `--layout v1` cgroup v1 alone, below it;
- `RCON_TEST_DISK`: a directory on a block device of its own (ext4 on a partition, O_DIRECT works), for IO limits;
- `RCON_TEST_EMULATED=1`, by which a test under load makes fewer requests;
- two CPUs; tasks run on the second only if their cpuset or affinity leaves them no other;
- `TMPDIR` on a tmpfs, 1.5 GiB of memory, no swap, the loopback network, everything as root;
- a read-only root; /etc, /home, /opt, /srv, /tmp and /var can be written, in memory.
"""

from __future__ import annotations

import argparse
import os
import shlex
import struct
import subprocess
import sys
import time
from pathlib import Path

from tests.machine import (
    NEXT_RUN,
    PATH,
    PLUGINS,
    ROOT,
    compile_sources,
    end_on_signals,
    fail,
    machine,
    need,
    newest_kernel,
    run,
    selects_tests,
)

CONTROLLERS = ("cpu", "cpuset", "io", "memory", "pids")
SELECTED = "((each_layout or smoke) and not measures and not once) or measures(each_layout=True)"
TESTS = (
    "tests/kernel",
    "tests/integrations/gunicorn/test_tenants.py",
    "tests/integrations/gunicorn/test_events.py",
)
#: These tests run in a pytest of their own. With Celery loaded each fork of pytest takes a third longer.
APART = "tests/kernel/celery"
#: The variables of this environment that pytest gets in the machine.
PASSED_ON = ("CI", "RCON_TEST_LONG")
#: Programs to run in place of pytest: `python -m tests.vm tests/benchmarks --only events`.
BENCHMARKS = "tests/benchmarks"
#: The exit status of pytest if it has found no test.
NO_TESTS = 5
DISK_MIB = 256
SECTOR = 512
FIRST_SECTOR = 2048
SCRATCH = Path("/run/scratch")  # in the machine, on a tmpfs
#: PID 1 of the machine. dash reaps the orphans that it inherits.
INIT = """\
export PATH={path} HOME=/root LANG=C.UTF-8
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev 2>/dev/null
mkdir -p /dev/pts /dev/shm
mount -t devpts -o gid=5,mode=620,ptmxmode=666 pts /dev/pts
mount -t tmpfs -o mode=1777 shm /dev/shm
for link in fd: stdin:/0 stdout:/1 stderr:/2; do
    ln -sfn /proc/self/fd${{link#*:}} /dev/${{link%%:*}}
done
{cgroups}
mount -t tmpfs -o mode=755 run /run
for directory in etc home opt srv tmp var; do
    mkdir -p /run/written/$directory/upper /run/written/$directory/work
    cd /run/written/$directory
    chmod --reference=/$directory upper
    mount -t overlay -o lowerdir=/$directory,upperdir=upper,workdir=work overlay /$directory
done
echo {layout} >/proc/sys/kernel/hostname
busybox ip link set lo up
cd {root}
{{ setsid -w {command}; echo $? >/run/status; }} </dev/null 2>&1 | cat >/dev/ttyS0
cat /run/status >/dev/ttyS1
sleep 0.1
echo o >/proc/sysrq-trigger
sleep 60
"""


#: How the hierarchies are mounted, by layout.
CGROUPS = {
    "v2": "mount -t cgroup2 cgroup /sys/fs/cgroup",
    "v1": """\
mount -t tmpfs -o mode=755 cgroup /sys/fs/cgroup
for controllers in cpu,cpuacct cpuset memory blkio pids freezer; do
    mkdir /sys/fs/cgroup/$controllers
    mount -t cgroup -o $controllers cgroup /sys/fs/cgroup/$controllers
done""",
}


def make_disk(path: Path) -> None:
    """Make a disk image with one ext4 partition, so that tests use a partition and the disk it belongs to."""
    size = DISK_MIB * 1024 * 1024
    entry = struct.pack(
        "<B3sB3sII", 0, b"\xfe\xff\xff", 0x83, b"\xfe\xff\xff", FIRST_SECTOR, size // SECTOR - FIRST_SECTOR
    )
    with path.open("wb") as image:
        image.truncate(size)
        image.seek(446)
        image.write(entry)
        image.seek(510)
        image.write(b"\x55\xaa")
    offset = FIRST_SECTOR * SECTOR
    # Write the tables now. Otherwise the kernel would write them in the background while tests measure IO.
    options = f"offset={offset},lazy_itable_init=0,lazy_journal_init=0"
    command = [need("mkfs.ext4"), "-q", "-F", "-E", options, str(path), f"{(size - offset) // 1024}k"]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)


def boot(arguments: list[str], *, kernel: Path | None, timeout: int, memory: str, layout: str) -> int:
    """Boot, run pytest in the machine, and return its exit status."""
    kernel = kernel or newest_kernel()
    print(f"Booting {kernel.name} in an emulated machine (about 15 s) ...", flush=True)
    compile_sources(list(TESTS))
    kept = [f"{name}={os.environ[name]}" for name in PASSED_ON if name in os.environ]
    inside = [
        "env",
        *kept,
        sys.executable,
        "-m",
        "tests.vm",
        "--inside",
        "--layout",
        layout,
        "--",
        *arguments,
    ]

    def command(scratch: Path) -> list[str]:
        disk = scratch / "disk.img"
        make_disk(disk)
        script = INIT.format(
            path=PATH,
            root=shlex.quote(str(ROOT)),
            command=shlex.join(inside),
            cgroups=CGROUPS[layout],
            layout=layout,
        )
        # Benchmarks need both CPUs.
        return machine(kernel, scratch, memory, script, disk, parallel=BENCHMARKS in arguments)

    return run(command, timeout)


def runs(arguments: list[str]) -> list[list[str]]:
    """Return the arguments of each run of pytest: those given, if they name tests, otherwise what selects `TESTS`."""
    if selects_tests(arguments):
        return [arguments]
    chosen = ["-m", SELECTED, "--reruns", "1", *arguments]
    return [[*TESTS, f"--ignore={APART}", *chosen], [APART, *chosen]]


def inside(arguments: list[str], layout: str) -> int:
    """Check the machine, mount the disk, and run pytest. Return its exit status. Called in the machine, as root."""
    if layout == "v2":
        present = Path("/sys/fs/cgroup/cgroup.controllers").read_text().split()
    else:
        known = {"blkio": "io"}
        mounted = [folder.name for folder in Path("/sys/fs/cgroup").iterdir()]
        present = [known.get(name, name) for folder in mounted for name in folder.split(",")]
    missing = [name for name in CONTROLLERS if name not in present]
    if missing:
        fail(f"cgroup {layout} in the emulated machine lacks {' '.join(missing)}")
    disk, tmp = SCRATCH / "disk", SCRATCH / "tmp"
    for directory in (disk, tmp):
        directory.mkdir(parents=True, exist_ok=True)
        directory.chmod(0o1777)
    subprocess.run([need("modprobe"), "virtio_blk"], check=True)
    partition = Path("/dev/vda1")
    deadline = time.monotonic() + 10
    while not partition.exists():
        if time.monotonic() > deadline:
            fail(f"{partition} did not appear")
        time.sleep(0.05)
    subprocess.run([need("mount"), "-t", "ext4", str(partition), str(disk)], check=True)
    disk.chmod(0o1777)
    print(
        f"Linux {os.uname().release}, pure cgroup {layout} with {' '.join(CONTROLLERS)}; "
        f"{os.cpu_count()} CPUs; {partition} (ext4) on {disk}; up {Path('/proc/uptime').read_text().split()[0]} s",
        flush=True,
    )
    os.environ.update(RCON_TEST_EMULATED="1", RCON_TEST_DISK=str(disk), TMPDIR=str(tmp), HOME=str(tmp))
    os.environ.update(PYTHONDONTWRITEBYTECODE="1")
    os.chdir(ROOT)
    os.sched_setaffinity(0, range(os.cpu_count() or 1))  # PID 1 may not use the second CPU
    # The root is read-only, so pytest keeps no cache. Everything is several times slower here than on the host.
    options = [*PLUGINS, "-p", "no:cacheprovider", "-o", "timeout=300"]
    options += ["--basetemp", str(tmp / "pytest")]
    if BENCHMARKS in arguments:
        os.execv(sys.executable, [sys.executable, *arguments])
    statuses = []
    for number, chosen in enumerate(runs(arguments)):
        if number:
            print(NEXT_RUN, flush=True)
        statuses.append(
            subprocess.run([sys.executable, "-m", "pytest", *options, *chosen], check=False).returncode
        )
    # A run fails; otherwise 0 if one has run tests, and 5 if `-k` has selected none in any.
    return next((status for status in statuses if status not in (0, NO_TESTS)), min(statuses))


def main() -> int:
    parser = argparse.ArgumentParser(description="Run tests on pure cgroup v2 or v1, in an emulated machine.")
    parser.add_argument(
        "--timeout", type=int, default=3000, help="seconds for all of it (default: %(default)s)"
    )
    parser.add_argument(
        "--kernel",
        type=Path,
        metavar="VMLINUZ",
        help="the kernel, whose modules are in /lib/modules (default: the newest in /boot)",
    )
    parser.add_argument("--memory", default="1536M", help="memory of the machine (default: %(default)s)")
    parser.add_argument(
        "--layout",
        choices=sorted(CGROUPS),
        default="v2",
        help="the cgroup hierarchies (default: %(default)s)",
    )
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    options, arguments = parser.parse_known_args()
    arguments = [a for a in arguments if a != "--"]
    if options.inside:
        return inside(arguments, options.layout)
    end_on_signals()
    try:
        return boot(
            arguments,
            kernel=options.kernel,
            timeout=options.timeout,
            memory=options.memory,
            layout=options.layout,
        )
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    raise SystemExit(main())
