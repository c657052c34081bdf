"""Making processes, watching them end, and what a new process must undo of its parent.

All of it acts on the calling process. The functions use the interpreter's own system calls: `os.fork` and
`os.waitpid` may have been replaced by a cooperative library, whose event loop has no place in a fork server.
"""

from __future__ import annotations

import _socket  # the real thing, whatever a cooperative library made of `socket`
import contextlib
import errno
import os
import posix
import resource
import signal
import stat
import time

from rcon_plugins.errors import KernelError
from rcon_plugins.kernel import capability
from rcon_plugins.kernel.syscalls import CLONE_FS, PR_SET_PDEATHSIG, prctl, unshare

_DESCRIPTORS = "/proc/self/fd"
_FILES_OF_A_SERVER = 1024
_FILES_OF_AN_EXECUTOR = 12
_OURS = ("/sys/fs/cgroup/", "/memfd:rcon")


def fork() -> int:
    """fork(2): 0 in the child, the child's pid in the parent. Every signal is blocked in the child.

    Blocked, so that no handler inherited from the parent can run before `take_default_signals`.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        pid = posix.fork()
    except BaseException:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        raise
    if pid != 0:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return pid


def take_default_signals() -> None:
    """Give every signal its default action, unblock all, and forget the parent's wake-up descriptor.

    SIGPIPE stays ignored, as Python has it, so that a closed socket is an exception.
    """
    signal.set_wakeup_fd(-1)
    for number in signal.valid_signals():
        if number in (signal.SIGKILL, signal.SIGSTOP, signal.SIGPIPE):
            continue
        try:
            signal.signal(number, signal.SIG_DFL)
        except (OSError, ValueError):
            continue  # the C library keeps the first real-time signals for itself
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when ``parent``, its parent's pid, ends (PR_SET_PDEATHSIG).

    A change of uid or gid clears it, so call it after the last one. Raises `KernelError`, also where the
    parent is gone already.
    """
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        raise KernelError("the parent process ended", errno=errno.ESRCH, path="getppid")


def own_directory_and_umask() -> None:
    """Let the calling thread have a working directory and a umask of its own, copies of the process's (unshare(2)).

    Raises `KernelError`.
    """
    unshare(CLONE_FS)


def kill(pidfd: int, pid: int) -> None:
    """SIGKILL to a process, also to one of another user where the calling thread may become that user.

    Who may become any user may signal any process: the thread takes the other's uid as its effective one for the
    moment of the call, by CAP_SETUID, which it has to hold permitted. Its real uid stays, so that the other cannot
    signal it meanwhile. A process that ended is as good as killed. Raises `KernelError`. Source: kill(2).
    """
    with contextlib.suppress(ProcessLookupError):
        try:
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        except PermissionError as error:
            state = capability.read_state()
            if capability.CAP_SETUID not in state.permitted:
                raise KernelError.from_oserror(
                    error, path=f"kill({pid})", hint="it is another user's: CAP_KILL or CAP_SETUID is needed"
                ) from None
            _kill_as_its_user(pidfd, pid, state)


def _kill_as_its_user(pidfd: int, pid: int, state: capability.State) -> None:
    other = capability.read_state(pid).uids.real
    raised = state.effective | capability.Capabilities.of(capability.CAP_SETUID)
    capability.set_capabilities(state.permitted, raised, state.inheritable)
    try:
        capability.set_uids(-1, other, -1)
        try:
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        finally:
            capability.set_uids(-1, state.uids.effective, -1)
    finally:
        capability.set_capabilities(state.permitted, state.effective, state.inheritable)


def reap(pid: int, timeout: float = 5.0) -> int | None:
    """The wait status of the child ``pid``, waiting ``timeout`` seconds for it to end; None if it lives.

    A child that something else has reaped already counts as ended with status 0.
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


def make_room_for_descriptors(processes: int) -> None:
    """Raise the soft limit of open files (getrlimit(2)), as far as it may be, to hold so many executor processes.

    Never lowers it. Each takes a socket and the files its usage is read from.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _FILES_OF_A_SERVER + processes * _FILES_OF_AN_EXECUTOR
    if soft != resource.RLIM_INFINITY and soft < wanted:
        most = wanted if hard == resource.RLIM_INFINITY else min(hard, wanted)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, most), hard))


def inherited_from_server() -> list[int]:
    """Open descriptors above 2 that confined code has no business with.

    All but regular files outside of the cgroup tree, directories and devices, which the application may have opened
    when it was loaded: sockets, pipes, epolls and other means of waking somebody up are shared with the server and
    with every other executor process, and so is what is ours.
    """
    found: list[int] = []
    for name in os.listdir(_DESCRIPTORS):
        descriptor = int(name)
        if descriptor <= 2:
            continue
        try:
            mode = os.fstat(descriptor).st_mode
            target = os.readlink(f"{_DESCRIPTORS}/{name}")
        except FileNotFoundError:
            continue  # the descriptor of this very listing
        except OSError as error:
            if error.errno == errno.EBADF:
                continue
            raise
        harmless = stat.S_ISREG(mode) or stat.S_ISDIR(mode) or stat.S_ISCHR(mode) or stat.S_ISBLK(mode)
        if not harmless or target.startswith(_OURS):
            found.append(descriptor)
    return found


def blank(descriptor: int) -> None:
    """Put a socket without a peer in the place of ``descriptor``.

    Closing would free the number, and code that still remembers it would write into whatever is opened
    next; a socket whose peer is gone answers with an end of file and EPIPE instead.
    """
    end, peer = _socket.socketpair(_socket.AF_UNIX, _socket.SOCK_STREAM)
    try:
        os.dup2(end.fileno(), descriptor, inheritable=False)
    finally:
        peer.close()
        end.close()
