"""Make processes, wait for their end, and undo in a new process the state inherited from its parent.

Every function acts on the calling process or thread. The module uses the interpreter's own system calls: a cooperative
library may have replaced `os.fork` and `os.waitpid`, and its event loop must not run in a fork server.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # `signal` converts numbers to enums: 0.2 ms for all of them
import _socket  # a cooperative library may have replaced `socket`
import contextlib
import errno
import fcntl
import gc
import os
import posix
import resource
import signal
import stat
import time
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

from rcon_plugins.errors import KernelError, fork_refused
from rcon_plugins.kernel import capability, descriptors
from rcon_plugins.kernel.syscalls import (
    CLONE_FS,
    PR_SET_CHILD_SUBREAPER,
    PR_SET_PDEATHSIG,
    prctl,
    syscall,
    unshare,
)

_SIGNALS = _signal.valid_signals()
_KEYCTL_JOIN_SESSION_KEYRING = 1
#: Wait for children of any kind: waitpid(2), __WALL.
_WALL = 0x40000000
_CHUNK = 4096
_DESCRIPTORS = "/proc/self/fd"
_CGROUP_TREE = "/sys/fs/cgroup/"
_MEMORY_DEVICES = frozenset({"/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom"})


def fork(call: Callable[[], int] | None = None) -> int:
    """Call fork(2): return 0 in the child and the child's pid in the parent. Raises `KernelError`.

    Every signal is blocked in the child, so that no handler of the parent can run in it before `take_default_signals`.
    The garbage collector is off in the child, so that no finalizer and no callback (`gc.callbacks`) can. ``call`` makes
    the child in another way. It returns as fork(2) does, or raises `KernelError`.
    """
    before = _signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    collects = gc.isenabled()
    gc.disable()
    pid = -1
    try:
        pid = posix.fork() if call is None else call()
    except KernelError:
        raise
    except OSError as error:
        raise fork_refused(error) from None
    finally:
        if pid != 0:
            if collects:
                gc.enable()
            _signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return pid


def take_default_signals() -> None:
    """Give every signal its default action, unblock all signals, and drop the parent's wake-up descriptor.

    SIGPIPE stays ignored, as Python sets it, so that writing to a closed socket raises.
    """
    signal.set_wakeup_fd(-1)
    for number in signal.valid_signals():
        if number in (signal.SIGKILL, signal.SIGSTOP, signal.SIGPIPE):
            continue
        try:
            signal.signal(number, signal.SIG_DFL)
        except (OSError, ValueError):
            continue  # the C library reserves the first real-time signals
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def close_sigchld_pipe(read: int, write: int) -> None:
    """Give SIGCHLD its default action, unblock all signals, and close the parent's pipe. Call it in a new process.

    The parent must have called `take_default_signals` and `open_sigchld_pipe`, and set no other handlers.
    """
    signal.set_wakeup_fd(-1)
    _signal.signal(_signal.SIGCHLD, _signal.SIG_DFL)
    _signal.pthread_sigmask(signal.SIG_SETMASK, ())
    posix.close(read)
    posix.close(write)


def die_with_parent(parent: int) -> None:
    """Make the kernel kill this process when its parent, with the pid ``parent``, ends (PR_SET_PDEATHSIG).

    A change of uid or gid clears the setting: call this after the last change. The kernel checks the parent's
    permission to signal, so an unprivileged parent does not end a child of another user. Raises `KernelError`, also if
    the parent has ended already.
    """
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        raise KernelError("the parent process ended", errno=errno.ESRCH, path="getppid")


def unshare_directory_and_umask() -> None:
    """Give the calling thread its own copy of the process's working directory and umask (unshare(2), CLONE_FS).

    Raises `KernelError`.
    """
    unshare(CLONE_FS)


def kill(pidfd: int, pid: int, uid: int | None = None, number: int = signal.SIGKILL) -> None:
    """Signal a process, also one of another user if the calling thread holds CAP_SETUID.

    Without CAP_KILL the thread takes the target's uid as its effective uid during the call; CAP_SETUID must be
    permitted. The real uid stays, so that the other user cannot signal the thread meanwhile. ``uid`` is that of the
    target; None reads it. Does nothing if the process has ended. Raises `KernelError`. Source: kill(2).
    """
    with contextlib.suppress(ProcessLookupError):
        try:
            signal.pidfd_send_signal(pidfd, number)
        except PermissionError as error:
            state = capability.read_state()
            if capability.CAP_SETUID not in state.permitted:
                raise KernelError.from_oserror(
                    error,
                    path=f"kill({pid})",
                    hint="the process belongs to another user; run as root, or with CAP_KILL or CAP_SETUID",
                ) from None
            if uid is None:
                try:
                    uid = capability.read_state(pid).uids.real
                except KernelError as gone:
                    if gone.errno != errno.ESRCH:
                        raise
                    return
            _kill_as(uid, pidfd, number, state)


def _kill_as(uid: int, pidfd: int, number: int, state: capability.State) -> None:
    raised = state.effective | capability.Capabilities.of(capability.CAP_SETUID)
    capability.set_capabilities(state.permitted, raised, state.inheritable)
    # Leaving an effective uid of 0 would clear every capability.
    capability.set_keep_capabilities(True)
    try:
        capability.set_uids(-1, uid, -1)
        signal.pidfd_send_signal(pidfd, number)
    finally:
        capability.set_uids(-1, state.uids.effective, -1)
        capability.set_keep_capabilities(False)
        capability.set_capabilities(state.permitted, state.effective, state.inheritable)


def join_new_session_keyring() -> None:
    """Give the calling thread a new, empty session keyring: keyctl(2), KEYCTL_JOIN_SESSION_KEYRING.

    The inherited keyring is shared with the process that started the server. The kernel charges the new one to the
    current user. Does nothing if the kernel has no keyrings or a seccomp filter forbids the call. Raises `KernelError`:
    EDQUOT if that user has too many keys (kernel.keys.maxkeys).
    """
    try:
        syscall("keyctl", _KEYCTL_JOIN_SESSION_KEYRING, 0)
    except KernelError as error:
        if error.errno not in (errno.ENOSYS, errno.EPERM):
            raise


def open_sigchld_pipe() -> tuple[int, int]:
    """Return two descriptors: the first becomes readable when a child ends (SIGCHLD), the second writes to it.

    `close_sigchld_pipe` undoes this in a new process.
    """
    end, wakeup = descriptors.socket_pair(_socket.SOCK_STREAM, _socket)
    wakeup.setblocking(False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    end.setblocking(False)
    read, write = end.detach(), wakeup.detach()
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    return read, write


def drain(descriptor: int) -> None:
    """Read and discard all available data of a non-blocking descriptor."""
    with contextlib.suppress(BlockingIOError):
        while len(os.read(descriptor, _CHUNK)) == _CHUNK:
            pass


def adopt_orphans(adopt: bool = True) -> None:
    """Make this process the parent of descendants whose parent ends (PR_SET_CHILD_SUBREAPER), or no longer.

    Otherwise process 1 becomes their parent. In many containers that one reaps nothing, and a zombie stays charged to
    the ``pids`` of its cgroup until it is reaped. Children of this process do not inherit this. A later execve(2) keeps
    it. Raises `KernelError`.
    """
    prctl(PR_SET_CHILD_SUBREAPER, int(adopt))


def reap_any(most: int) -> Iterator[tuple[int, int]]:
    """Reap up to ``most`` children that have ended, and yield the pid and the wait status of each. Does not wait.

    Yields a stop of a child, too, if that calls ptrace(PTRACE_TRACEME): see `has_ended`.
    """
    for _ in range(most):
        try:
            # Children whose exit signal is not SIGCHLD, too.
            pid, status = posix.waitpid(-1, posix.WNOHANG | _WALL)
        except ChildProcessError:
            return
        if pid == 0:
            return
        yield pid, status


def has_children() -> bool:
    """Return whether this process has children, whatever their state."""
    try:
        posix.waitid(posix.P_ALL, 0, posix.WEXITED | posix.WNOHANG | posix.WNOWAIT | _WALL)
    except ChildProcessError:
        return False
    return True


def has_ended(status: int) -> bool:
    """Return whether a wait status says that the process has ended: wait(2)."""
    return os.WIFEXITED(status) or os.WIFSIGNALED(status)


def reap(pid: int, timeout: float = 5.0) -> int | None:
    """Wait up to ``timeout`` seconds for the child ``pid`` to end; return its wait status, None if it still runs.

    A child that was reaped elsewhere counts as ended with status 0.
    """
    deadline = time.monotonic() + timeout
    while True:
        try:
            found, status = posix.waitpid(pid, os.WNOHANG)
        except ChildProcessError:
            return 0
        if found == pid:
            return int(status)
        if time.monotonic() >= deadline:
            return None
        time.sleep(0.005)


def raise_descriptor_limit(wanted: int) -> None:
    """Raise the soft limit of open files (getrlimit(2)) to ``wanted``, at most to the hard limit. Never lower it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        most = wanted if hard == resource.RLIM_INFINITY else min(hard, wanted)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, most), hard))


def shared_descriptors(private: str) -> list[int]:
    """Return the open descriptors above 2 that a child running untrusted code must not have.

    These are sockets, pipes, epolls and the like, which the parent and all its children share. They are also the files
    of the cgroup tree, and the regular files whose target begins with ``private``. Other regular files, directories and
    devices stay: the application may have opened them while it was loaded.
    """
    return [
        file.descriptor
        for file in _open_descriptors()
        if not _is_file(file.mode) or file.path.startswith((_CGROUP_TREE, private))
    ]


def replace_with_closed_socket(descriptor: int) -> None:
    """Replace ``descriptor`` by a socket whose peer is closed.

    After a plain close, code that still has the number would write to the next file opened under it. This socket gives
    end of file and EPIPE instead.
    """
    end = closed_socket()
    try:
        os.dup2(end, descriptor, inheritable=False)
    finally:
        posix.close(end)


class OpenFile(NamedTuple):
    """An open descriptor. ``path`` is the target of its link in /proc, ``mode`` of its inode, ``flags`` of open(2)."""

    descriptor: int
    path: str
    mode: int
    flags: int

    @property
    def writable(self) -> bool:
        """Whether it is open for writing."""
        return self.flags & os.O_ACCMODE != os.O_RDONLY

    @property
    def kind(self) -> Literal["file", "directory", "memory device", "device"]:
        """What it is. A memory device is ``/dev/null`` and its like, which have no state to change."""
        if stat.S_ISREG(self.mode):
            return "file"
        if stat.S_ISDIR(self.mode):
            return "directory"
        harmless = stat.S_ISCHR(self.mode) and self.path in _MEMORY_DEVICES
        return "memory device" if harmless else "device"


def open_files() -> list[OpenFile]:
    """Return the regular files, directories and devices that this process has open, above descriptor 2."""
    return [file for file in _open_descriptors() if _is_file(file.mode) and not file.flags & os.O_PATH]


def _open_descriptors() -> Iterator[OpenFile]:
    """Yield what this process has open above descriptor 2, of any kind. Raises OSError."""
    for name in os.listdir(_DESCRIPTORS):
        descriptor = int(name)
        if descriptor <= 2:
            continue
        try:
            mode = os.fstat(descriptor).st_mode
            path = os.readlink(f"{_DESCRIPTORS}/{name}")
            flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
        except OSError:
            if _is_open(descriptor):
                raise
            continue  # the descriptor of this listing
        yield OpenFile(descriptor, path, mode, flags)


def _is_open(descriptor: int) -> bool:
    """Return whether a descriptor is open. Raises OSError."""
    try:
        fcntl.fcntl(descriptor, fcntl.F_GETFD)
    except OSError as error:
        if error.errno == errno.EBADF:
            return False
        raise
    return True


def open_again(file: OpenFile) -> None:
    """Open a file or directory anew for reading, under the same descriptor. A file keeps its position. Raises OSError.

    Its position, flags and locks are then its own: lseek(2), fcntl(2), flock(2).
    """
    flags = os.O_RDONLY | os.O_CLOEXEC | (file.flags & os.O_DIRECT)
    descriptor = os.open(f"{_DESCRIPTORS}/{file.descriptor}", flags)
    try:
        if file.kind == "file":
            os.lseek(descriptor, os.lseek(file.descriptor, 0, os.SEEK_CUR), os.SEEK_SET)
        os.dup2(descriptor, file.descriptor, inheritable=os.get_inheritable(file.descriptor))
    finally:
        posix.close(descriptor)


def open_missing_standard_files() -> None:
    """Open ``/dev/null`` under each of the descriptors 0, 1 and 2 that is closed, so that no other file gets it."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    posix.close(descriptor)


def closed_socket() -> int:
    """Return a socket whose peer is closed, for `os.dup2`: see `replace_with_closed_socket`."""
    end, peer = descriptors.socket_pair(_socket.SOCK_STREAM, _socket)
    peer.close()
    descriptor: int = end.detach()
    return descriptor


def _is_file(mode: int) -> bool:
    return stat.S_ISREG(mode) or stat.S_ISDIR(mode) or stat.S_ISCHR(mode) or stat.S_ISBLK(mode)
