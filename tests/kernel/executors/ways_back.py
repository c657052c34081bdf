"""What confined work may try to become what it was again, or to reach what confines it.

Each attempt goes to the kernel by the raw system call, for the calling thread alone, and tells what became of it: the
name of the errno where it failed, ``"WORKED"`` where it did what it must not.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import mmap
import os
import platform
import resource
import signal
import socket
import stat
import struct
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path

_NUMBERS = {
    "x86_64": {
        "setuid": 105,
        "setgid": 106,
        "setreuid": 113,
        "setregid": 114,
        "setgroups": 116,
        "setresuid": 117,
        "setresgid": 119,
        "setfsuid": 122,
        "setfsgid": 123,
        "capset": 126,
        "ptrace": 101,
        "unshare": 272,
        "process_vm_writev": 311,
        "pidfd_getfd": 438,
        "mount": 165,
        "chroot": 161,
        "clone": 56,
        "exit": 60,
        "add_key": 248,
        "fchownat": 260,
        "keyctl": 250,
    },
    "aarch64": {
        "setuid": 146,
        "setgid": 144,
        "setreuid": 145,
        "setregid": 143,
        "setgroups": 159,
        "setresuid": 147,
        "setresgid": 149,
        "setfsuid": 151,
        "setfsgid": 152,
        "capset": 91,
        "ptrace": 117,
        "unshare": 97,
        "process_vm_writev": 271,
        "pidfd_getfd": 438,
        "mount": 40,
        "chroot": 51,
        "clone": 220,
        "exit": 93,
        "add_key": 217,
        "fchownat": 54,
        "keyctl": 219,
    },
}[platform.machine()]
_PTRACE_ATTACH = 16
_PR_CAPBSET_READ, _PR_SET_SECUREBITS, _PR_CAP_AMBIENT, _PR_CAP_AMBIENT_RAISE = 23, 28, 47, 2
_CLONE_NEWNS, _CLONE_PARENT = 0x00020000, 0x00008000
_CLONE_NEWCGROUP, _CLONE_NEWUSER = 0x02000000, 0x10000000
_FSOPEN, _FSCONFIG, _FSMOUNT = 430, 431, 432
_FSCONFIG_CMD_CREATE = 6
_X32 = 0x40000000
_AT_FDCWD, _AT_EMPTY_PATH = -100, 0x1000
_MS_REMOUNT, _MS_BIND, _MS_MOVE, _MS_REC, _MNT_DETACH = 32, 4096, 8192, 16384, 2

_libc = ctypes.CDLL(None, use_errno=True)


def call(name: str, *arguments: object) -> str:
    """A raw system call, which is to fail: the name of its errno."""
    ctypes.set_errno(0)
    result = _libc.syscall(ctypes.c_long(_NUMBERS[name]), *arguments)
    return "WORKED" if result >= 0 else errno.errorcode[ctypes.get_errno()]


def prctl(option: int, *arguments: int) -> str:
    """A prctl(2), which is to fail: the name of its errno."""
    ctypes.set_errno(0)
    four = [ctypes.c_ulong(argument) for argument in (*arguments, 0, 0, 0, 0)[:4]]
    return "WORKED" if _libc.prctl(option, *four) >= 0 else errno.errorcode[ctypes.get_errno()]


def attempt(act: Callable[[], object]) -> str:
    """A call of the standard library, which is to fail."""
    try:
        act()
    except OSError as error:
        return errno.errorcode[error.errno or 0]
    return "WORKED"


def clone_sibling() -> int:
    """A process that ends at once and whose parent is that of this one: clone(2), CLONE_PARENT."""
    long = ctypes.c_long
    pid = int(
        _libc.syscall(long(_NUMBERS["clone"]), long(_CLONE_PARENT | signal.SIGCHLD), None, None, None, None)
    )
    if pid == 0:
        _libc.syscall(long(_NUMBERS["exit"]), long(0))
    return pid


def join_keyring() -> int:
    """A new session keyring of this thread, as pam_keyinit or systemd give one to a server."""
    return int(_libc.syscall(ctypes.c_long(_NUMBERS["keyctl"]), ctypes.c_long(1), None))


def add_key(name: str, value: str, keyring: int) -> int:
    """A key of the type user."""
    data = value.encode()
    arguments = (b"user", name.encode(), data, ctypes.c_size_t(len(data)), ctypes.c_long(keyring))
    return int(_libc.syscall(ctypes.c_long(_NUMBERS["add_key"]), *arguments))


def read_key(key: int) -> str:
    """What a key holds, or the name of the errno."""
    buffer = ctypes.create_string_buffer(100)
    read = call("keyctl", ctypes.c_long(11), ctypes.c_long(key), buffer, ctypes.c_size_t(100))
    return buffer.value.decode() if read == "WORKED" else read


def by_identity(*, others: int = 0) -> dict[str, str]:
    """All the set*id calls to root and to another tenant, and the capabilities, for the calling thread."""
    found = {}
    long = ctypes.c_long
    for uid in (0, others):
        found[f"setuid({uid})"] = call("setuid", long(uid))
        found[f"setreuid({uid})"] = call("setreuid", long(uid), long(uid))
        found[f"setreuid(-1, {uid})"] = call("setreuid", long(-1), long(uid))
        found[f"setresuid({uid})"] = call("setresuid", long(uid), long(uid), long(uid))
        found[f"setresuid(-1, {uid}, -1)"] = call("setresuid", long(-1), long(uid), long(-1))
        found[f"setgid({uid})"] = call("setgid", long(uid))
        found[f"setregid({uid})"] = call("setregid", long(uid), long(uid))
        found[f"setresgid({uid})"] = call("setresgid", long(uid), long(uid), long(uid))
        group = (ctypes.c_uint32 * 1)(uid)
        found[f"setgroups({uid})"] = call("setgroups", long(1), group)
        found[f"setfsuid({uid})"] = _fs("setfsuid", "Uid", uid)
        found[f"setfsgid({uid})"] = _fs("setfsgid", "Gid", uid)
    found.update(by_capability())
    return found


def by_capability() -> dict[str, str]:
    """The ways to a capability."""
    found = {}
    for number in (0, 6, 7, 8, 21):
        header = (ctypes.c_uint32 * 2)(0x20080522, 0)
        data = (ctypes.c_uint32 * 6)(*([1 << number] * 2 + [0] * 4))
        found[f"capset({number})"] = call("capset", header, data)
        found[f"ambient({number})"] = prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_RAISE, number)
    found["securebits"] = prctl(_PR_SET_SECUREBITS, 0x3F)
    found["mount namespace"] = call("unshare", ctypes.c_long(_CLONE_NEWNS))
    found["chroot"] = call("chroot", ctypes.c_char_p(b"/"))
    found["setgroups([])"] = call("setgroups", ctypes.c_long(0), None)
    return found


def mount_cgroups_anew() -> str:
    """Mount cgroup v2 in a user namespace without a mount point, and change the mode of a file there: fsopen(2)."""
    if _libc.unshare(_CLONE_NEWUSER | _CLONE_NEWNS | _CLONE_NEWCGROUP) != 0:
        return f"unshare: {errno.errorcode[ctypes.get_errno()]}"
    descriptor = int(_libc.syscall(ctypes.c_long(_FSOPEN), b"cgroup2", 0))
    if descriptor < 0:
        return errno.errorcode[ctypes.get_errno()]
    _libc.syscall(ctypes.c_long(_FSCONFIG), descriptor, _FSCONFIG_CMD_CREATE, None, None, 0)
    mount = int(_libc.syscall(ctypes.c_long(_FSMOUNT), descriptor, 0, 0))
    if mount < 0:
        return errno.errorcode[ctypes.get_errno()]
    mode = os.stat("cgroup.procs", dir_fd=mount).st_mode & 0o7777
    return attempt(lambda: os.chmod("cgroup.procs", mode, dir_fd=mount))


def by_program(setuid_root: str) -> dict[str, str]:
    """A program that is setuid root, which prints its effective user (``id -u``)."""
    said = subprocess.run([setuid_root, "-u"], capture_output=True, text=True, check=False)
    return {"a setuid-root program": "WORKED" if said.stdout.strip() == "0" else "EPERM"}


def by_process(pid: int, name: str) -> dict[str, str]:
    """Reach into another process."""
    found = {f"ptrace {name}": call("ptrace", ctypes.c_long(_PTRACE_ATTACH), ctypes.c_long(pid), None, None)}
    for file, mode in (("mem", os.O_RDWR), ("environ", os.O_RDONLY), ("fd/0", os.O_RDONLY)):
        found[f"/proc/{name}/{file}"] = attempt(partial(os.open, f"/proc/{pid}/{file}", mode))
    buffer = ctypes.create_string_buffer(8)

    class Vector(ctypes.Structure):
        _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))

    ours, theirs = Vector(ctypes.addressof(buffer), 8), Vector(0x10000, 8)
    long = ctypes.c_long
    found[f"process_vm_writev {name}"] = call(
        "process_vm_writev", long(pid), ctypes.byref(ours), long(1), ctypes.byref(theirs), long(1), long(0)
    )
    pidfd = os.pidfd_open(pid)
    try:
        found[f"pidfd_getfd {name}"] = call("pidfd_getfd", long(pidfd), long(0), long(0))
    finally:
        os.close(pidfd)
    return found


def by_signal(pid: int, name: str) -> dict[str, str]:
    """Send a signal that would stop the process."""
    return {f"signal {name}": attempt(lambda: os.kill(pid, signal.SIGCONT))}


def by_rights_of_root(pids: dict[str, int], folder: str) -> dict[str, str]:
    """What root may do without a capability. Each act leaves everything as it was.

    ``folder`` is root's, in ``/run``.
    """
    acts: dict[str, Callable[[], object]] = {
        "a setting of the machine": partial(_write_again, Path("/proc/sys/kernel/core_pattern")),
        "a file in /run": partial(_make_and_remove, Path(folder, "new")),
        "a file in /dev": partial(_make_and_remove, Path("/dev", Path(folder).name)),
    }
    for name, pid in pids.items():
        acts[f"rlimits of the {name}"] = partial(_set_rlimit_again, pid)
        acts[f"OOM score of the {name}"] = partial(_write_again, Path(f"/proc/{pid}/oom_score_adj"))
        acts[f"CPUs of the {name}"] = partial(os.sched_setaffinity, pid, os.sched_getaffinity(pid))
        priority = os.getpriority(os.PRIO_PROCESS, pid)
        acts[f"priority of the {name}"] = partial(os.setpriority, os.PRIO_PROCESS, pid, priority)
    return {name: attempt(act) for name, act in acts.items()}


def _write_again(path: Path) -> None:
    _write(path, path.read_text().rstrip("\n"))


def _set_rlimit_again(pid: int) -> None:
    limits = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, limits)


def _make_and_remove(path: Path) -> None:
    path.touch(exist_ok=False)
    path.unlink()


def by_cgroup() -> dict[str, str]:
    """Write the files of the cgroups this process is in, and of those above."""
    found = {}
    for line in Path("/proc/self/mounts").read_text().splitlines():
        mount, kind = line.split()[1:3]
        if kind not in ("cgroup", "cgroup2"):
            continue
        found.update(_below(Path(mount), kind))
    return found


def _below(mount: Path, kind: str) -> dict[str, str]:
    found = {f"{mount}: enter the root": attempt(lambda: _write(mount / "cgroup.procs", "0"))}
    place = _own(mount, kind)
    if place is None:
        return found
    limits = (
        "cgroup.procs",
        "pids.max",
        "memory.max",
        "memory.limit_in_bytes",
        "cpu.max",
        "cpu.cfs_quota_us",
    )
    for directory in (place, place.parent):
        for name in limits:
            if (directory / name).exists():
                value = "0" if name == "cgroup.procs" else "-1" if name.endswith(("bytes", "us")) else "max"
                found[f"{directory.name}/{name}"] = attempt(partial(_write, directory / name, value))
        found[f"{directory.name}: mkdir"] = attempt((directory / "mine").mkdir)
    return found


def _own(mount: Path, kind: str) -> Path | None:
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, names, path = line.split(":", 2)
        matches = (
            not names if kind == "cgroup2" else names and set(names.split(",")) <= set(mount.name.split(","))
        )
        if matches and "rcon-" in path:
            return mount / path.lstrip("/")
    return None


def _write(path: Path, value: str) -> None:
    fd = os.open(path, os.O_WRONLY)
    try:
        os.write(fd, value.encode())
    finally:
        os.close(fd)


def by_attributes() -> dict[str, str]:
    """Change mode, owner, times, flags and extended attributes of the cgroups' files and directories.

    By path, by descriptor, by a descriptor that is open for nothing (O_PATH), and by each system call that can do it.
    """
    found = {}
    for mount in _cgroup_mounts():
        for path in (mount, f"{mount}/cgroup.procs"):
            status = Path(path).stat()
            mode, uid, gid = status.st_mode & 0o7777, status.st_uid, status.st_gid
            readable, opened = os.open(path, os.O_RDONLY), os.open(path, os.O_PATH)
            link, name = f"/proc/self/fd/{readable}", os.fsencode(path)
            acts: dict[str, Callable[[], object]] = {
                "chmod": partial(os.chmod, path, mode),
                "chmod by the link in /proc": partial(os.chmod, link, mode),
                "fchmod": partial(os.fchmod, readable, mode),
                "fchmodat2": partial(raw, 452, opened, b"", mode, _AT_EMPTY_PATH),
                "chown": partial(os.chown, path, uid, gid),
                "fchown": partial(os.fchown, readable, uid, gid),
                "fchownat": partial(raw, _NUMBERS["fchownat"], opened, b"", uid, gid, _AT_EMPTY_PATH),
                "setxattr": partial(os.setxattr, path, "user.rcon", b"x"),
                "fsetxattr": partial(os.setxattr, readable, "user.rcon", b"x"),
                "setxattrat": partial(_set_attribute, name),
                "removexattr": partial(os.removexattr, path, "user.rcon"),
                "fremovexattr": partial(os.removexattr, readable, "user.rcon"),
                "removexattrat": partial(raw, 466, _AT_FDCWD, name, 0, b"user.rcon"),
                "utime": partial(os.utime, path),
                "futimens": partial(os.utime, readable),
                "mount_setattr": partial(_make_writable, _AT_FDCWD, name, 0),
                "open_tree": partial(_make_a_copy_writable, name),
            }
            found.update({f"{act} {path}": attempt(do) for act, do in acts.items()})
            os.close(readable)
            os.close(opened)
    return found


def by_mounts() -> dict[str, str]:
    """Mount the cgroups anew, make their mounts writable, or remove these. Not for a process that could do it."""
    acts: dict[str, Callable[[], object]] = {}
    for number, name in enumerate((b"cgroup2", b"cgroup")):
        acts[f"mount {number + 1}"] = partial(
            _call, "mount", b"x", b"/mnt", name, 0, b"" if number == 0 else b"none,name=x"
        )
        acts[f"fsopen {number + 1}"] = partial(raw, _FSOPEN, name, 0)
        acts[f"fsopen {number + 1} by x32"] = partial(raw, _FSOPEN | _X32, name, 0)
    for mount in _cgroup_mounts():
        path = mount.encode()
        acts[f"remount {mount}"] = partial(_call, "mount", None, path, None, _MS_REMOUNT | _MS_BIND, None)
        acts[f"reconfigure {mount}"] = partial(_call, "mount", None, path, None, _MS_REMOUNT, None)
        acts[f"bind {mount}"] = partial(_call, "mount", path, b"/mnt", None, _MS_BIND | _MS_REC, None)
        acts[f"move {mount}"] = partial(_call, "mount", path, b"/mnt", None, _MS_MOVE, None)
        acts[f"umount {mount}"] = partial(_call, "umount2", path, _MNT_DETACH)
        acts[f"fspick {mount}"] = partial(_reconfigure, path)
    return {name: attempt(do) for name, do in acts.items()}


def by_user_namespace() -> dict[str, str]:
    """The same two as root of a user namespace with mounts and cgroups of its own, if this process may make one."""

    def there() -> dict[str, str]:
        if _libc.unshare(_CLONE_NEWUSER | _CLONE_NEWNS | _CLONE_NEWCGROUP) != 0:
            return {"a user namespace": errno.errorcode[ctypes.get_errno()]}
        return {
            f"{name}, in a user namespace": said for name, said in {**by_attributes(), **by_mounts()}.items()
        }

    reading, writing = os.pipe()
    if (pid := os.fork()) == 0:
        try:
            os.write(writing, json.dumps(there()).encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as answer:
        found: dict[str, str] = json.loads(answer.read())
    os.waitpid(pid, 0)
    return found


def raw(number: int, *arguments: object) -> int:
    """A system call by its number. Raises OSError."""
    ctypes.set_errno(0)
    passed = [ctypes.c_long(one) if isinstance(one, int) else one for one in arguments]
    result = int(_libc.syscall(ctypes.c_long(number), *passed))
    if result < 0:
        raise OSError(ctypes.get_errno(), f"system call {number}")
    return result


def _call(function: str, *arguments: object) -> None:
    """A function of the C library. Raises OSError."""
    ctypes.set_errno(0)
    passed = [ctypes.c_ulong(one) if isinstance(one, int) else one for one in arguments]
    if _libc[function](*passed) != 0:
        raise OSError(ctypes.get_errno(), function)


def _cgroup_mounts() -> list[str]:
    lines = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    return [mount for _, mount, kind, *_ in lines if kind in ("cgroup", "cgroup2")]


def _set_attribute(path: bytes) -> None:
    """setxattrat(2), Linux 6.13."""
    value = ctypes.create_string_buffer(b"x")
    arguments = struct.pack("QII", ctypes.addressof(value), 1, 0)
    raw(463, _AT_FDCWD, path, 0, b"user.rcon", arguments, len(arguments))


def _make_writable(directory: int, path: bytes, flags: int) -> None:
    """mount_setattr(2), which removes MOUNT_ATTR_RDONLY."""
    raw(442, directory, path, flags, struct.pack("4Q", 0, 1, 0, 0), 32)


def _make_a_copy_writable(path: bytes) -> None:
    """open_tree(2) with OPEN_TREE_CLONE."""
    tree = raw(428, _AT_FDCWD, path, 1 | os.O_CLOEXEC)
    try:
        _make_writable(tree, b"", _AT_EMPTY_PATH)
    finally:
        os.close(tree)


def _reconfigure(path: bytes) -> None:
    """fspick(2), and fsconfig(2) with FSCONFIG_CMD_RECONFIGURE."""
    picked = raw(433, _AT_FDCWD, path, 0)
    try:
        raw(_FSCONFIG, picked, 7, None, None, 0)
    finally:
        os.close(picked)


def make_segment(key: int, mebibytes: int) -> int:
    """Make a segment of System V and write to it: shmget(2), shmat(2). Return its id."""
    identifier = int(_libc.shmget(key, ctypes.c_size_t(mebibytes << 20), 0o1666))
    if identifier < 0:
        raise OSError(ctypes.get_errno(), "shmget")
    _libc.shmat.restype = ctypes.c_void_p
    ctypes.memset(_libc.shmat(identifier, None, 0), 1, mebibytes << 20)
    return identifier


def make_queue(key: int, size: int) -> int:
    """Make a message queue of System V with one message: msgget(2), msgsnd(2). Return its id."""
    identifier = int(_libc.msgget(key, 0o1666))
    message = struct.pack("l", 1) + bytes(size)
    if identifier < 0 or _libc.msgsnd(identifier, message, ctypes.c_size_t(size), 0) != 0:
        raise OSError(ctypes.get_errno(), "msgget")
    return identifier


def make_semaphores(key: int) -> int:
    """Make ten semaphores of System V: semget(2). Return their id."""
    identifier = int(_libc.semget(key, 10, 0o1666))
    if identifier < 0:
        raise OSError(ctypes.get_errno(), "semget")
    return identifier


def remove_queue_and_semaphores(queue: int, semaphores: int) -> None:
    """Remove both: msgctl(2), semctl(2), IPC_RMID."""
    _libc.msgctl(queue, 0, None)
    _libc.semctl(semaphores, 0, 0)


def find_segment(key: int) -> str:
    """Look for a segment of System V by its key: the name of the errno, or "WORKED"."""
    return "WORKED" if _libc.shmget(key, ctypes.c_size_t(0), 0) >= 0 else errno.errorcode[ctypes.get_errno()]


def remove_segment(identifier: int) -> None:
    """Remove a segment of System V: shmctl(2), IPC_RMID."""
    _libc.shmctl(identifier, 0, None)


def descriptors() -> dict[str, str]:
    """What is open beside the standard streams: kind and, of a socket, whether somebody is at its other end."""
    found = {}
    for entry in list(Path("/proc/self/fd").iterdir()):
        name = entry.name
        try:
            mode, target = os.fstat(int(name)).st_mode, str(entry.readlink())
        except OSError:
            continue  # that of the listing
        if stat.S_ISSOCK(mode):
            with socket.socket(fileno=os.dup(int(name))) as end:
                try:
                    end.send(b"", socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
                    target = "connected"
                except OSError as error:
                    target = errno.errorcode[error.errno or 0]
                if end.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                    target = "LISTENS"
        found[name] = target
    return found


def by_descriptor(number: int) -> list[str]:
    """Do harm to what an inherited descriptor leads to: which acts the kernel allowed."""
    again = f"/proc/self/fd/{number}"
    acts: dict[str, Callable[[], object]] = {
        "shutdown": lambda: socket.socket(fileno=os.dup(number)).shutdown(socket.SHUT_RDWR),
        "write": lambda: os.write(number, b"written\n"),
        "pwrite": lambda: os.pwrite(number, b"written\n", 0),
        "punch": lambda: os.posix_fallocate(number, 0, 100_000),
        "seek": lambda: os.lseek(number, 1, os.SEEK_SET),
        "read": lambda: _read_soon(number),
        "lock": lambda: fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB),
        "unlock": lambda: fcntl.flock(number, fcntl.LOCK_UN),
        "flags": lambda: fcntl.fcntl(number, fcntl.F_SETFL, os.O_APPEND | os.O_NONBLOCK | os.O_ASYNC),
        "mode": lambda: os.fchmod(number, 0o777),
        "map": lambda: _write_by_mapping(number),
        "truncate": lambda: os.ftruncate(number, 0),
        "open again": lambda: os.close(os.open(again, os.O_RDWR | os.O_TRUNC)),
        "truncate again": lambda: os.truncate(again, 0),
        "by a program": lambda: _write_by_program(number),
    }
    return [name for name, act in acts.items() if attempt(act) == "WORKED"]


def _read_soon(number: int) -> None:
    os.set_blocking(number, False)
    os.read(number, 10)


def _write_by_program(number: int) -> None:
    command = ["/bin/sh", "-c", f"echo written >&{number}"]
    if subprocess.run(command, pass_fds=[number], check=False, stderr=subprocess.DEVNULL).returncode:
        raise OSError(errno.EPIPE, "the program failed")


def _write_by_mapping(number: int) -> None:
    try:
        with mmap.mmap(number, 1) as memory:
            memory[0] = 0
    except ValueError as error:  # the file is empty
        raise OSError(errno.EINVAL, str(error)) from error


def _fs(name: str, line: str, wanted: int) -> str:
    # These two never tell whether they worked.
    call(name, ctypes.c_long(wanted))
    status = Path("/proc/thread-self/status").read_text()
    ids = next(part for part in status.splitlines() if part.startswith(f"{line}:")).split()[1:]
    return "WORKED" if int(ids[3]) == wanted else "EPERM"
