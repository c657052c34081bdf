"""Boot Debian's own kernel in an emulated machine (QEMU, in software) with this host's file system underneath.

The file system is shared read-only, over 9p. The machine keeps what it has read (`cache=loose`): without that, each
exec reads its program again and the emulator translates it again, which makes Python start eight times as slowly. So
change no file while a machine runs.

- `machine()` returns the command that boots. PID 1 in the machine is a sh script of the caller.
- Serial port 0 is the output, port 1 takes the exit status, port 2 is the console.
- `run()` boots, passes the output on, and returns the exit status. Nothing is left running, however it ends.
"""

from __future__ import annotations

import compileall
import importlib.metadata
import lzma
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = "linux-image-amd64 qemu-system-x86 busybox-static kmod e2fsprogs file systemd dbus"
SOURCES = ("rcon_plugins", "integrations", "tests", "examples")
PATH = "/usr/sbin:/usr/bin:/sbin:/bin"
#: The plugins of pytest in the machine, and no others: to find them takes seconds, as pytest reads the metadata of all
#: packages, and each fork of pytest copies what they have loaded.
PLUGINS = ("--disable-plugin-autoload", "-p", "pytest_timeout", "-p", "pytest_rerunfailures")
#: A line between two runs of pytest in one machine. tests/run.py adds up their results.
NEXT_RUN = "-- another run of pytest --"
#: The first bytes of what xz(1) has compressed.
XZ = b"\xfd7zXZ\x00"
#: The exit status of timeout(1) when it has stopped the machine.
TIMED_OUT = 124
#: What makes the emulated kernel quick, none of which a test is about: without them it flushes the emulator's TLB at
#: each system call, moves code so that it is translated again, and clears each page twice.
QUICK = "mitigations=off nopti norandmaps init_on_alloc=0 audit=0"
#: Tasks run on the second CPU only if their affinity or their cpuset leaves them no other.
ONE_CPU = "isolcpus=1"
#: A CPU with a time stamp counter that Linux trusts, and without AVX, which is slow to emulate.
CPU = "Nehalem,+rdrand"


def fail(message: str) -> NoReturn:
    print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    raise SystemExit(1)


def search_path() -> str:
    """Return a PATH that also has the programs of this venv, and for ordinary users those of the system."""
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", ""), PATH])


def need(program: str) -> str:
    """Return the path of a program."""
    found = shutil.which(program, path=search_path())
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


def compile_sources(tests: list[str]) -> None:
    """Compile our modules, and have pytest compile the test modules that its ``tests`` arguments name.

    In the machine nothing of this is kept: there every interpreter would compile our modules again, and pytest rewrite
    the assertions of every test module, which takes minutes. The same holds for the code that tests/faults changes.
    """
    from tests.faults.sites import compile_all

    for folder in SOURCES:
        compileall.compile_dir(ROOT / folder, quiet=2)
    compile_all()
    if all(map(is_rewritten, test_modules(tests))):
        return
    subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-qq", *tests],
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        check=False,  # a module that cannot be imported fails in the machine, and is reported there
    )


def test_modules(tests: list[str]) -> Iterator[Path]:
    """Yield the modules whose assertions pytest rewrites, of the folders and files that ``tests`` names."""
    for name in tests:
        path = ROOT / name
        if path.is_file():
            yield path
        else:
            yield from (*path.rglob("test_*.py"), *path.rglob("conftest.py"))


def is_rewritten(module: Path) -> bool:
    """Return whether pytest has compiled the module since its last change, by the time of that in the byte code."""
    name = f"{module.stem}.{sys.implementation.cache_tag}-pytest-{importlib.metadata.version('pytest')}.pyc"
    try:
        with module.parent.joinpath("__pycache__", name).open("rb") as file:
            changed, size = struct.unpack("<8xII", file.read(16))
    except (FileNotFoundError, struct.error):
        return False
    stat = module.stat()
    return (changed, size) == (int(stat.st_mtime) & 0xFFFFFFFF, stat.st_size & 0xFFFFFFFF)


def make_initramfs(kernel: Path, path: Path) -> None:
    """Write the initramfs that mounts the share as the root, read-only and cached, and starts ``init`` there."""
    from virtme import mkinitramfs, modfinder, virtmods

    config = mkinitramfs.Config()
    version = kernel.name.removeprefix("vmlinuz-")
    config.modfiles = modfinder.find_modules_from_install(virtmods.MODALIASES, kver=version)
    config.busybox = need("busybox")
    config.access = "ro,cache=loose"
    with path.open("w+b") as out:
        mkinitramfs.mkinitramfs(out, config)


def uncompressed(kernel: Path, path: Path) -> Path:
    """Write a kernel that xz(1) has compressed to ``path``, which QEMU boots as well, at its PVH entry.

    An emulated CPU takes six seconds to do that. Return ``path``, or that of the kernel if it is compressed otherwise.
    """
    image = kernel.read_bytes()
    start = image.find(XZ)
    if start < 0:
        return kernel
    try:
        elf = lzma.LZMADecompressor().decompress(image[start:])
    except lzma.LZMAError:
        return kernel
    path.write_bytes(elf)
    return path


def machine(
    kernel: Path,
    scratch: Path,
    memory: str,
    script: str,
    disk: Path | None = None,
    *,
    cpus: int = 2,
    parallel: bool = False,
) -> list[str]:
    """Return the command that boots the machine, with ``script`` as PID 1. Its files are made in ``scratch``.

    Unless ``parallel``, one thread emulates all CPUs, and the scheduler moves nothing to the second by itself. That
    takes a third less CPU time than two threads, which wait for each other. With one CPU it takes still less.
    """
    initramfs, init = scratch / "initramfs", scratch / "init"
    make_initramfs(kernel, initramfs)
    init.write_text(script)
    quick = f"{QUICK} {ONE_CPU}" if cpus > 1 and not parallel else QUICK
    options = f"console=ttyS2 quiet loglevel=1 panic=-1 luks=no {quick} init=/bin/sh"
    command = [need("qemu-system-x86_64"), "-machine", "q35", "-cpu", CPU, "-smp", str(cpus), "-m", memory]
    command += ["-accel", f"tcg,thread={'multi' if parallel else 'single'}"]
    command += ["-nodefaults", "-display", "none", "-no-reboot"]
    command += ["-fsdev", "local,id=root,path=/,security_model=none,readonly=on,multidevs=remap"]
    command += ["-device", "virtio-9p-pci,fsdev=root,mount_tag=/dev/root"]
    command += ["-chardev", "stdio,id=out,signal=off", "-serial", "chardev:out"]
    command += ["-serial", f"file:{scratch / 'status'}", "-serial", f"file:{scratch / 'console'}"]
    if disk is not None:
        command += ["-drive", f"file={disk},format=raw,if=virtio"]
    return [
        *command,
        "-kernel",
        str(uncompressed(kernel, scratch / "vmlinux")),
        "-initrd",
        str(initramfs),
        "-append",
        f"{options} -- {init}",
    ]


def run(make: Callable[[Path], list[str]], timeout: int) -> int:
    """Boot the machine that ``make`` returns, given a scratch directory, and return its exit status."""
    with tempfile.TemporaryDirectory(prefix="rcon-vm-") as directory:
        scratch = Path(directory)
        running = guarded(make(scratch), timeout)
        try:
            pass_through(running)
            status = running.wait()
        finally:
            stop(running)
        if status == TIMED_OUT:
            fail(f"the emulated machine was stopped after {timeout} s (--timeout)")
        written = scratch.joinpath("status").read_text().strip()
        if not written.isdigit():
            print(scratch.joinpath("console").read_text(errors="replace")[-10000:], file=sys.stderr)
            fail("the emulated machine ended before its program did; its console is above")
    return int(written)


def guarded(command: list[str], timeout: int) -> subprocess.Popen[bytes]:
    """Start a machine. It ends with this process, or after so many seconds. Its output is a pipe."""
    # setpriv: the kernel kills the machine with this process, even after SIGKILL. timeout: it leads a process group,
    # passes signals on to all of it, and bounds the run.
    guard = [need("setpriv"), "--pdeathsig", "TERM", need("timeout"), "--kill-after=10", str(timeout)]
    return subprocess.Popen(
        guard + command,
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def pass_through(running: subprocess.Popen[bytes]) -> None:
    stream = running.stdout
    if stream is None:
        raise RuntimeError("the emulated machine was started without a pipe for its output")
    while data := os.read(stream.fileno(), 65536):
        sys.stdout.buffer.write(data.replace(b"\r\n", b"\n"))
        sys.stdout.buffer.flush()


def stop(running: subprocess.Popen[bytes]) -> None:
    """End the whole process group, including QEMU."""
    for number, grace in ((signal.SIGTERM, 5.0), (signal.SIGKILL, 5.0)):
        try:
            os.killpg(running.pid, number)
        except ProcessLookupError:
            break
        try:
            running.wait(timeout=grace)
        except subprocess.TimeoutExpired:
            continue
    running.wait()


def end_on_signals() -> None:
    """Turn SIGTERM and SIGHUP into an exit, so that what has been started is stopped."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _frame: sys.exit(128 + number))


def selects_tests(arguments: list[str]) -> bool:
    """Return whether one of pytest's ``arguments`` names a test."""
    return any(not a.startswith("-") and (ROOT / a.split("::")[0]).exists() for a in arguments)
