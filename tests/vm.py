"""Run the tests that depend on the kernel's cgroup hierarchy on pure cgroup v2, in an emulated machine.

`python -m tests.vm [pytest arguments]` boots Debian's own kernel under QEMU, in software, with this host's file
system underneath (read-only; writes go to memory), runs pytest there and ends with pytest's exit status.
Unless the arguments name tests it runs those of `TESTS` that are marked `each_layout`, `smoke` or
`measures(each_layout=True)`. Nothing else should run beside it. Everything takes five to ten times
as long there as elsewhere, so tests that do not depend on the hierarchy are left out.

In the machine the tests find:
- cgroup v2 alone, with all of its controllers, at /sys/fs/cgroup;
- `RCON_TEST_DISK`: a directory on a block device of its own (ext4 on a partition, O_DIRECT works), for IO limits;
- `RCON_TEST_EMULATED=1`, by which a test under load makes fewer requests;
- `TMPDIR` on a tmpfs, two CPUs, 1.5 GiB of memory, no swap, no network, everything as root.
"""

from __future__ import annotations

import argparse
import compileall
import os
import re
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parent.parent
CONTROLLERS = ("cpu", "cpuset", "io", "memory", "pids")
PACKAGES = "linux-image-amd64 qemu-system-x86 busybox-static kmod udev e2fsprogs file util-linux"
SELECTED = "((each_layout or smoke) and not measures) or measures(each_layout=True)"
TESTS = (
    "tests/kernel",
    "tests/integrations/gunicorn/test_tenants.py",
    "tests/integrations/gunicorn/test_events.py",
)
#: The variables of this environment that pytest gets in the machine.
PASSED_ON = ("CI", "HYPOTHESIS_PROFILE", "RCON_TEST_LONG")
#: Programs to run in place of pytest: `python -m tests.vm tests/benchmarks --only events`.
BENCHMARKS = "tests/benchmarks"
SOURCES = ("rcon_plugins", "integrations", "tests", "examples")
DISK_MIB = 256
SECTOR = 512
FIRST_SECTOR = 2048
SCRATCH = Path("/run/scratch")  # in the machine, on a tmpfs


def fail(message: str) -> NoReturn:
    print(f"tests/vm.py: {message}", file=sys.stderr)
    raise SystemExit(1)


def need(program: str) -> str:
    """Return the path of a program. Find system programs for ordinary users, too."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", ""), "/usr/sbin:/sbin"])
    found = shutil.which(program, path=path)
    if found is None:
        fail(
            f"{program} not found. As root: apt-get install {PACKAGES}; and in the venv: pip install virtme-ng"
        )
    return found


def newest_kernel() -> Path:
    """Return the newest installed kernel of Debian's plain flavour. The -cloud- flavour has no 9p."""
    kernels = [
        k for k in Path("/boot").glob("vmlinuz-*-amd64") if not re.search(r"-(cloud|rt)-amd64$", k.name)
    ]
    if not kernels:
        fail(f"no kernel in /boot. As root: apt-get install {PACKAGES}")
    newest = max(kernels, key=lambda k: [int(n) for n in re.findall(r"\d+", k.name)])
    if not os.access(newest, os.R_OK):
        fail(f"{newest} cannot be read. Run as root, or: sudo chmod a+r {newest}")
    return newest


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


def boot(arguments: list[str], *, kernel: Path | None, timeout: int, memory: str, verbose: bool) -> int:
    """Boot, run pytest in the machine, and return its exit status. Leave nothing running, however this ends."""
    kernel = kernel or newest_kernel()
    for program in ("qemu-system-x86_64", "busybox", "virtme-run"):
        need(program)
    print(f"Booting {kernel.name} in an emulated machine (about 15 s) ...", flush=True)
    compile_sources(list(TESTS))
    with tempfile.TemporaryDirectory(prefix="rcon-vm-") as scratch:
        disk = Path(scratch, "disk.img")
        make_disk(disk)
        kept = [f"{name}={os.environ[name]}" for name in PASSED_ON if name in os.environ]
        inside = ["env", *kept, sys.executable, str(Path(__file__).resolve()), "--inside", "--", *arguments]
        command = [need("vng"), "--run", str(kernel), "--disable-kvm", "--force-9p", "--user", "root"]
        command += ["--memory", memory, "--cpus", "2", "--cwd", str(ROOT)]
        # The tests do not need it, and loading it takes seconds.
        command += ["--append", "modprobe.blacklist=kvm,kvm_amd,kvm_intel"]
        # Do not use --disk: QEMU would guess the format.
        command += [f"--qemu-opts=-drive file={disk},format=raw,if=virtio"]
        command += ["--verbose"] * verbose + ["--", shlex.join(inside)]
        machine = guarded(command, timeout)
        try:
            pass_through(machine)
            status = machine.wait()
        finally:
            stop(machine)
    if status == 124:
        fail(f"the emulated machine was stopped after {timeout} s (--timeout)")
    if status == 255:
        fail("the emulated machine ended before pytest did; see --verbose for its console")
    return status


def compile_sources(tests: list[str]) -> None:
    """Compile our modules, and have pytest compile the test modules that its ``tests`` arguments name.

    In the machine the root is read-only: there every interpreter would compile our modules again, and pytest rewrite
    the assertions of every test module, which takes minutes.
    """
    for folder in SOURCES:
        compileall.compile_dir(ROOT / folder, quiet=2)
    subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-qq", *tests],
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        check=False,  # a module that cannot be imported fails in the machine, and is reported there
    )


def guarded(command: list[str], timeout: int) -> subprocess.Popen[bytes]:
    """Start a machine. It ends with this process, or after so many seconds. Its output is a pipe."""
    # setpriv: the kernel kills the machine with this process, even after SIGKILL. timeout: it leads a process group,
    # passes signals on to all of it, and bounds the run.
    guard = [need("setpriv"), "--pdeathsig", "TERM", need("timeout"), "--kill-after=10", str(timeout)]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", ""), "/usr/sbin:/sbin"])
    # Use a pipe, not our own stdout: QEMU opens that again by name, and would truncate a file.
    return subprocess.Popen(
        guard + command,
        cwd=ROOT,
        env={**os.environ, "PATH": path},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def pass_through(machine: subprocess.Popen[bytes]) -> None:
    stream = machine.stdout
    if stream is None:
        raise RuntimeError("the emulated machine was started without a pipe for its output")
    while data := os.read(stream.fileno(), 65536):
        sys.stdout.buffer.write(data.replace(b"\r\n", b"\n"))
        sys.stdout.buffer.flush()


def stop(machine: subprocess.Popen[bytes]) -> None:
    """End the whole process group, including QEMU."""
    for number, grace in ((signal.SIGTERM, 5.0), (signal.SIGKILL, 5.0)):
        try:
            os.killpg(machine.pid, number)
        except ProcessLookupError:
            break
        try:
            machine.wait(timeout=grace)
        except subprocess.TimeoutExpired:
            continue
    machine.wait()


def inside(arguments: list[str]) -> NoReturn:
    """Check the machine, mount the disk, and execute pytest. Called in the machine, as root."""
    present = Path("/sys/fs/cgroup/cgroup.controllers").read_text().split()
    missing = [name for name in CONTROLLERS if name not in present]
    if missing:
        fail(f"cgroup v2 in the emulated machine lacks {' '.join(missing)}")
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
        f"Linux {os.uname().release}, pure cgroup v2 with {' '.join(CONTROLLERS)}; "
        f"{os.cpu_count()} CPUs; {partition} (ext4) on {disk}; up {Path('/proc/uptime').read_text().split()[0]} s",
        flush=True,
    )
    os.environ.update(RCON_TEST_EMULATED="1", RCON_TEST_DISK=str(disk), TMPDIR=str(tmp), HOME=str(tmp))
    os.environ.update(PYTHONDONTWRITEBYTECODE="1", HYPOTHESIS_STORAGE_DIRECTORY=str(tmp / "hypothesis"))
    os.chdir(ROOT)
    # The root is read-only, so pytest keeps no cache. Everything is several times slower here than on the host.
    options = ["-p", "no:cacheprovider", "-p", "no:xdist", "-o", "timeout=300"]
    options += ["--basetemp", str(tmp / "pytest")]
    if arguments[0] == BENCHMARKS:
        os.execv(sys.executable, [sys.executable, *arguments])
    os.execv(sys.executable, [sys.executable, "-m", "pytest", *options, *arguments])


def main() -> int:
    parser = argparse.ArgumentParser(description="Run tests on pure cgroup v2, in an emulated machine.")
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
    parser.add_argument("--verbose", action="store_true", help="show the machine's console")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    options, arguments = parser.parse_known_args()
    arguments = [a for a in arguments if a != "--"]
    if not any(not a.startswith("-") and (ROOT / a.split("::")[0]).exists() for a in arguments):
        arguments = [*TESTS, "-m", SELECTED, "--reruns", "1", *arguments]
    if options.inside:
        inside(arguments)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _frame: sys.exit(128 + number))
    try:
        return boot(
            arguments,
            kernel=options.kernel,
            timeout=options.timeout,
            memory=options.memory,
            verbose=options.verbose,
        )
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    raise SystemExit(main())
