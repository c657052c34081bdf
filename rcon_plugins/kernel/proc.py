"""Read processes and threads from ``/proc`` (``proc(5)``), and explain why execve(2) refuses a program.

The module does not import ctypes, so that a command starts quickly.
"""

from __future__ import annotations

import _thread  # importing `threading` takes longer
import contextlib
import errno
import os
from typing import NamedTuple

from rcon_plugins.errors import KernelError
from rcon_plugins.kernel import files

#: The PID namespace that the kernel starts with: PROC_PID_INIT_INO in include/linux/proc_ns.h.
INITIAL_PID_NAMESPACE = 0xEFFFFFFC
_DEAD = frozenset("ZXx")
_PF_KTHREAD = 0x00200000
#: Links of ``/proc/PID/task`` without those of its entries: the two of any directory.
_OWN_LINKS = 2


# -- one process, identified by pid and start time


def start_time(pid: int) -> int | None:
    """Return when a process started, in clock ticks since boot (stat, field 22); None if it is dead or a zombie."""
    fields = stat_fields(pid)
    return None if not fields or fields[0] in _DEAD else int(fields[19])


def is_stopped(pid: int) -> bool:
    """Return whether a signal has stopped a process, as job control does (stat, state T)."""
    return stat_fields(pid)[:1] == ["T"]


def membership(pid: int) -> str | None:
    """Return the text of ``/proc/PID/cgroup``; None if the process has ended."""
    return None if start_time(pid) is None else _read(pid, "cgroup")


def stat_fields(pid: int) -> list[str]:
    """Return the fields of ``/proc/PID/stat`` from the third (the state) on; an empty list without such a process."""
    text = _read(pid, "stat")
    # The name, field 2, may contain spaces and brackets.
    return [] if text is None else text[text.rindex(")") + 2 :].split()


def is_alive(pid: int, started: int, namespace: int) -> bool | None:
    """Return whether the process that calls itself ``pid`` and started at ``started`` is alive; None if unknown.

    ``namespace`` is its PID namespace, as in `pid_namespace`. From here only processes of our own namespace and of
    those below it can be seen: pid_namespaces(7). So None means that the process is in another namespace, or in one of
    which no process can be seen, unless ours is the initial one, which sees all. A process that is invisible to this
    user (``hidepid`` in ``proc(5)``) counts as alive in our own namespace, and as unknown in another.
    """
    if visible_pid(pid, started, namespace) is not None:
        return True
    own = pid_namespace()
    if namespace == own:
        return _is_hidden(pid)
    if own == INITIAL_PID_NAMESPACE and _read(1, "stat") is not None:
        return False
    seen = (_namespace_of(int(entry)) for entry in os.listdir("/proc") if entry.isdigit())
    return False if namespace in seen else None


def visible_pid(pid: int, started: int, namespace: int) -> int | None:
    """Return our number for a process, described as for `is_alive`; None if it is dead or cannot be seen from here."""
    if namespace == pid_namespace():
        return pid if start_time(pid) == started else None
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        status = _read(int(entry), "status") or ""
        numbers = next((line for line in status.splitlines() if line.startswith("NSpid:")), "").split()
        # Only a process that this user may trace shows its namespace: ptrace(2), PTRACE_MODE_READ_FSCREDS.
        if (
            str(pid) in numbers[2:]
            and start_time(int(entry)) == started
            and _namespace_of(int(entry)) in (None, namespace)
        ):
            return int(entry)
    return None


def pid_namespace() -> int:
    """Return the inode number of the PID namespace of this process, which names it on this machine.

    Raises `KernelError`. The kernel uses the number again when the namespace and all its processes are gone.
    """
    try:
        return os.stat("/proc/self/ns/pid").st_ino
    except OSError as error:
        raise files.failure(error, "/proc/self/ns/pid") from None


def _namespace_of(pid: int) -> int | None:
    """Return the PID namespace of a process; None if it has ended or this user may not know."""
    try:
        return os.stat(f"/proc/{pid}/ns/pid").st_ino
    except OSError:
        return None


def _is_hidden(pid: int) -> bool:
    if _read(pid, "stat") is None:
        try:
            os.kill(pid, 0)
        except OSError as error:
            return error.errno == errno.EPERM
    return False


def system_id() -> str:
    """Return an id that is the same for all processes that see each other's pids, and for no others.

    It names this boot of this machine and the PID namespace (pid_namespaces(7)). Raises `OSError`.
    """
    with open("/proc/sys/kernel/random/boot_id") as file:
        boot = file.read().strip()
    return f"{boot}/{pid_namespace()}"


# -- a process and its command


class Process(NamedTuple):
    """A process. ``command`` is the command line joined by spaces, or ``[name]`` for a kernel thread.

    ``uid`` is the effective uid. ``state`` is a letter such as R, S, D, T or Z. ``memory`` is the resident memory in
    bytes (shared pages count for each process), or None. ``threads`` is the number of threads.
    """

    pid: int
    uid: int
    state: str
    threads: int
    memory: int | None
    command: str


def read_process(pid: int) -> Process | None:
    """Return a process; None if it does not exist or is hidden from this user (``hidepid``). Raises KernelError."""
    status = _read(pid, "status")
    if status is None:
        return None
    fields = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
    resident = fields.get("VmRSS", "").split()
    return Process(
        pid=pid,
        uid=int(fields["Uid"].split()[1]),
        state=fields["State"].split()[0],
        threads=int(fields["Threads"]),
        memory=int(resident[0]) * 1024 if resident else None,
        command=command_line(pid) or f"[{fields['Name'].strip()}]",
    )


def command_line(pid: int) -> str | None:
    """Return the command line joined by spaces; None if it is empty or unreadable. Raises KernelError.

    The process controls this text: escape it before printing.
    """
    text = _read(pid, "cmdline")
    return text.rstrip("\0").replace("\0", " ") if text else None


def process_of(thread: int) -> int | None:
    """Return the pid of the process of a thread; None if the thread has ended. Raises KernelError."""
    for line in (_read(thread, "status") or "").splitlines():
        if line.startswith("Tgid:"):
            return int(line.split()[1])
    return None


def thread_count(pid: int) -> int | None:
    """Return how many threads a process has; None if it has ended or cannot be seen. Opens no file."""
    try:
        return _threads_in(f"/proc/{pid}/task")
    except OSError:
        return None


def is_kernel_thread(pid: int) -> bool:
    """Return whether a pid is a kernel thread (stat, flags: PF_KTHREAD in include/linux/sched.h)."""
    fields = stat_fields(pid)
    return bool(fields) and bool(int(fields[6]) & _PF_KTHREAD)


def parents() -> dict[int, int]:
    """Return the parent of each visible process, by pid."""
    found = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit() and (fields := stat_fields(int(entry))):
            found[int(entry)] = int(fields[1])
    return found


def unified_cgroup(pid: int) -> str | None:
    """Return the path of a process in the v2 hierarchy; None if there is none. On v1 one that has ended shows none.

    Raises KernelError.
    """
    lines = (_read(pid, "cgroup") or "").splitlines()
    return next((line.removeprefix("0::") for line in lines if line.startswith("0::")), None)


def cgroup_namespace(pid: int) -> int | None:
    """Return the inode number of the cgroup namespace of a process; None if it has ended or this user may not know.

    Source: cgroup_namespaces(7).
    """
    try:
        return os.stat(f"/proc/{pid}/ns/cgroup").st_ino
    except OSError:
        return None


def ipc_namespace(pid: int) -> str | None:
    """Return the IPC namespace of a process (namespaces(7)); None if it has ended or this user may not see that."""
    try:
        return os.readlink(f"/proc/{pid}/ns/ipc")
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ESRCH, errno.EACCES, errno.EPERM):
            raise KernelError.from_oserror(error, path=f"/proc/{pid}/ns/ipc") from None
        return None


def _read(pid: int, name: str) -> str | None:
    try:
        return files.read_if_there(f"/proc/{pid}", name)
    except KernelError as error:
        # ESRCH: it ended between the open and the read. EACCES, EPERM: hidden from this user.
        if error.errno not in (errno.ESRCH, errno.EACCES, errno.EPERM):
            raise
        return None


# -- the calling process


def is_single_threaded() -> bool:
    """Return whether the calling process has one thread. A zombie leader counts as one. Opens no file."""
    return _threads_in("/proc/self/task") == 1


def _threads_in(directory: str) -> int:
    # A directory has a link for each entry: proc(5), and proc_task_getattr in the kernel.
    return os.stat(directory).st_nlink - _OWN_LINKS


def other_threads() -> list[str]:
    """Return the other threads of the calling process as ``number (name)``. Opens no file if there are none."""
    if is_single_threaded():
        return []
    own = str(_thread.get_native_id())
    found = []
    for number in os.listdir("/proc/self/task"):
        if number != own:
            with contextlib.suppress(OSError), open(f"/proc/self/task/{number}/comm", "rb") as file:
                found.append(f"{number} ({file.read().decode(errors='replace').strip()})")
    return found


def inherited_descriptors() -> list[int]:
    """Return the inheritable descriptors above 2. execve(2) closes those that this process opened itself."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # the descriptor of this listing is closed by now
            if int(name) > 2 and os.get_inheritable(int(name)):
                found.append(int(name))
    return found


def original_environment() -> dict[bytes, bytes]:
    """Return the environment of this process, to pass it on: ``os.environb`` without the change that Python makes.

    In the C locale Python sets LC_CTYPE (PEP 538): return the value of ``/proc/self/environ``, if it has one.
    """
    variables = dict(os.environb)
    try:
        with open("/proc/self/environ", "rb") as file:
            at_start = parse_environment(file.read())
    except OSError:
        return variables
    if b"LC_CTYPE" in at_start:
        variables[b"LC_CTYPE"] = at_start[b"LC_CTYPE"]
    else:
        variables.pop(b"LC_CTYPE", None)
    return variables


def parse_environment(content: bytes) -> dict[bytes, bytes]:
    """Return the variables of a file ``/proc/PID/environ``, in its order. Of two with one name, the first counts."""
    found: dict[bytes, bytes] = {}
    for entry in content.split(b"\0"):
        name, equals, value = entry.partition(b"=")
        if name and equals:
            found.setdefault(name, value)
    return found


# -- programs


def exec_remedy(number: int | None, *, as_another: bool = False, interpreter: str | None = None) -> str:
    """Return the remedy for an errno with which execve(2) refused an existing program; "" if the errno says enough.

    ``as_another``: the program should run as another user than the one that searched for it. ``interpreter``: the
    interpreter of a script that is refused, if it is known.
    """
    if number == errno.ENOENT and interpreter is not None:
        if interpreter.endswith("\r"):
            return (
                r"the line that begins with #! ends with a carriage return: remove it with sed -i '1s/\r$//'"
            )
        return "install it, or correct the line that begins with #!"
    if number == errno.ENOENT:
        return "the interpreter or loader that it names is missing: install it, or correct the line that begins with #!"
    if number == errno.ENOEXEC:
        return "it is no program for this machine, or a script whose first line does not begin with #!"
    if number == errno.EACCES and (as_another or interpreter is not None):
        return "its user must be allowed to execute it, and to enter each folder above it"
    return ""


def exec_problem(
    program: str,
    number: int | None,
    *,
    as_another: bool = False,
    interpreter: str | None = None,
    remedy: str | None = None,
) -> str:
    """Return why execve(2) refused an existing program: the file that it refused, the errno's text, the remedy.

    The parameters are those of `exec_remedy`, whose remedy ``remedy`` replaces.
    """
    file = "" if interpreter is None else f"its interpreter {interpreter.rstrip()}: "
    hint = exec_remedy(number, as_another=as_another, interpreter=interpreter) if remedy is None else remedy
    return f"{program}: {file}{os.strerror(number or errno.EIO)}" + (f" ({hint})" if hint else "")
