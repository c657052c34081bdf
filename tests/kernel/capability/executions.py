"""Random thread states, random files, and the kernel's result when a thread executes a file.

`python -m tests.kernel.capability.executions DIRECTORY SEED COUNT` writes the executions, pickled. It is a small
process with mounts of its own. It makes the files and, for each execution, a thread that takes a state and executes a
file. The executed file reports its own state (probe.py).
"""

from __future__ import annotations

import ctypes
import os
import pickle
import random
import stat
import struct
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from rcon_plugins.kernel.capability import (
    SECBIT_KEEP_CAPS,
    SECBIT_NO_SETUID_FIXUP,
    Capabilities,
    FileCapabilities,
    State,
    drop_bounding,
    set_ambient,
    set_capabilities,
    set_gids,
    set_groups,
    set_no_new_privs,
    set_securebits,
    set_uids,
    write_file_capabilities,
)
from rcon_plugins.kernel.capability.exec_rule import File
from rcon_plugins.kernel.capability.state import parse_status, read_state
from tests.kernel.capability.probe import program

UIDS = (0, 0, 1000, 1001, 65534)
GIDS = (0, 1000, 1001, 65534)
NOBODYS_GROUP = 54321
FILES = 200
ALL = Capabilities((1 << 64) - 1)
ALL_SECUREBITS = 0xFF
MS_NOSUID, MS_REC, MS_PRIVATE = 0x2, 0x4000, 0x40000
CLONE_NEWNS = 0x20000


class Execution(NamedTuple):
    """One execve: the state before it and after it, or the errno."""

    before: State
    file: File
    after: State | None
    error: int | None = None


def main() -> None:
    directory, seed, count = sys.argv[1:]
    libc = ctypes.CDLL(None, use_errno=True)
    draw = random.Random(int(seed))
    own_mounts(libc)
    plain, nosuid = Path(directory, "plain"), Path(directory, "nosuid")
    mount(libc, plain, 0)
    mount(libc, nosuid, MS_NOSUID)
    files = list(make_files(draw, plain, nosuid))
    first = read_state()
    found = [execute(libc, draw.choice(files), draw.getrandbits(64), first) for _ in range(int(count))]
    sys.stdout.buffer.write(pickle.dumps([tuple(one) for one in found]))


def own_mounts(libc: ctypes.CDLL) -> None:
    """Enter a mount namespace, so that no mount is visible outside of it."""
    check(libc.unshare(ctypes.c_int(CLONE_NEWNS)), "unshare")
    check(libc.mount(b"none", b"/", None, ctypes.c_ulong(MS_REC | MS_PRIVATE), None), "making mounts private")


def mount(libc: ctypes.CDLL, folder: Path, flags: int) -> None:
    folder.mkdir()
    done = libc.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", ctypes.c_ulong(flags), b"mode=755")
    check(done, f"mounting {folder}")


def check(result: int, what: str) -> None:
    if result != 0:
        raise OSError(ctypes.get_errno(), what)


def make_files(draw: random.Random, plain: Path, nosuid: Path) -> Iterator[File]:
    """Make programs with random modes, owners and capabilities, and scripts that they interpret."""
    interpreters: list[Path] = []
    for number in range(FILES):
        path = draw.choices((plain, nosuid), (5, 1))[0] / str(number)
        if interpreters and draw.random() < 0.2:
            path.write_text(f"#!{draw.choice(interpreters)} argument\n")
        else:
            path.write_bytes(program())
        interpreters.append(path)
        decorate(draw, path)
        yield File.of(str(path))


def decorate(draw: random.Random, path: Path) -> None:
    mode = 0o755
    mode |= stat.S_ISUID * (draw.random() < 0.4)
    mode |= stat.S_ISGID * (draw.random() < 0.3)
    group = draw.choice(GIDS)
    if draw.random() < 0.15:
        mode &= ~stat.S_IXGRP
        group = NOBODYS_GROUP  # its members could not execute it
    os.chown(path, draw.choice(UIDS), group)
    path.chmod(mode)
    if draw.random() < 0.5:
        capabilities = FileCapabilities(
            permitted=some(draw, ALL),
            inheritable=some(draw, ALL),
            effective=draw.random() < 0.4,
            rootid=draw.choice((None, None, None, 0, 1000)),
        )
        write_file_capabilities(str(path), capabilities)


def some(draw: random.Random, capabilities: Capabilities) -> Capabilities:
    """Return none of the capabilities, all, a few, or all but a few."""
    few = Capabilities(draw.getrandbits(64) & draw.getrandbits(64) & draw.getrandbits(64))
    return draw.choice((Capabilities(), ALL, few, few, ALL - few)) & capabilities


def become(libc: ctypes.CDLL, draw: random.Random, first: State) -> None:
    """Set the calling thread, which has the state ``first``, to a random one that its capabilities allow."""
    everything = first.permitted
    set_securebits(SECBIT_NO_SETUID_FIXUP)  # so that setting ids does not change capabilities
    set_groups(draw.sample(GIDS, draw.randrange(len(GIDS))))
    alike = draw.random() < 0.6
    gid, uid = draw.choice(GIDS), draw.choice(UIDS)
    set_gids(gid, gid if alike else draw.choice(GIDS), gid if alike else draw.choice(GIDS))
    set_uids(uid, uid if alike else draw.choice(UIDS), uid if alike else draw.choice(UIDS))
    if draw.random() < 0.2:
        libc.setfsgid(draw.choice(GIDS))  # acts on this thread alone
    if draw.random() < 0.2:
        libc.setfsuid(draw.choice(UIDS))
    permitted, inheritable, bounding = some(draw, everything), some(draw, everything), some(draw, everything)
    effective = some(draw, permitted)
    set_capabilities(everything, everything, inheritable)
    set_ambient(some(draw, permitted & inheritable))
    drop_bounding(bounding, first.bounding)
    securebits = draw.choice((0, 0, 0, SECBIT_KEEP_CAPS, draw.getrandbits(8)))
    set_securebits(securebits & ALL_SECUREBITS)
    set_capabilities(permitted, effective, inheritable)
    if draw.random() < 0.3:
        set_no_new_privs()


def execute(libc: ctypes.CDLL, file: File, seed: int, first: State) -> Execution:
    """Execute the file from a new thread with a state drawn by ``seed``. The thread ends afterwards.

    A new process has the state of the thread that starts it. posix_spawn(3) does not copy this process, unlike fork.
    """
    found: list[Execution | BaseException] = []

    def run() -> None:
        try:
            found.append(become_and_execute(libc, file, random.Random(seed), first))
        except BaseException as error:
            found.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    (result,) = found
    if isinstance(result, BaseException):
        raise result
    return result


def become_and_execute(libc: ctypes.CDLL, file: File, draw: random.Random, first: State) -> Execution:
    become(libc, draw, first)
    before = read_state()
    called = (file.scripts[0] if file.scripts else file).path
    reading, writing = os.pipe()
    with os.fdopen(reading, "rb") as pipe:
        try:
            pid = os.posix_spawn(called, [called], {}, file_actions=[(os.POSIX_SPAWN_DUP2, writing, 1)])
        except OSError as error:
            return Execution(before, file, None, error.errno)
        finally:
            os.close(writing)
        told = pipe.read()
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if status != 0:
        raise RuntimeError(f"the probe {file} ended with {status}: {told!r}")
    return Execution(before, file, parse_status(told[:-4], struct.unpack("<I", told[-4:])[0]))


if __name__ == "__main__":
    main()
