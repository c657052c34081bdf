"""Making processes, watching them end, and what a new process must undo of its parent.

All of it acts on the calling process. The functions use the interpreter's own system calls: `os.fork` and
`os.waitpid` may have been replaced by a cooperative library, whose event loop has no place in a fork server.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # `signal` gives all 64 numbers names, which takes 0.2 ms each time
import _socket  # the real thing, whatever a cooperative library made of `socket`
import contextlib
import errno
import os
import posix
import resource
import signal
import stat
import threading
import time
from collections.abc import Collection

from rcon_plugins.errors import KernelError
from rcon_plugins.kernel import capability
from rcon_plugins.kernel.cgroup.branch import is_single_threaded
from rcon_plugins.kernel.syscalls import CLONE_FS, PR_SET_PDEATHSIG, prctl, syscall, unshare

_KEYCTL_JOIN_SESSION_KEYRING = 1
_DESCRIPTORS = "/proc/self/fd"
_FILES_OF_A_SERVER = 1024
_FILES_OF_AN_EXECUTOR = 16
_OURS = ("/sys/fs/cgroup/", "/memfd:rcon")


def fork() -> int:
    """fork(2): 0 in the child, the child's pid in the parent. Every signal is blocked in the child.

    Blocked, so that no handler inherited from the parent can run before `take_default_signals`.
    """
    before = _signal.pthread_sigmask(signal.SIG_BLOCK, _signal.valid_signals())
    try:
        pid = posix.fork()
    except BaseException:
        _signal.pthread_sigmask(signal.SIG_SETMASK, before)
        raise
    if pid != 0:
        _signal.pthread_sigmask(signal.SIG_SETMASK, before)
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


def forget_bell(bell: int, rope: int) -> None:
    """In a new process: give SIGCHLD its default action, unblock all signals, and close the parent's bell.

    For a child of one that took default signals, and then made no more of its own than `bell_of_children`; nobody else
    knows the bell's descriptors.
    """
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    _signal.pthread_sigmask(signal.SIG_SETMASK, ())
    posix.close(bell)
    posix.close(rope)


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when ``parent``, its parent's pid, ends (PR_SET_PDEATHSIG).

    A change of uid or gid clears it, so call it after the last one. The kernel asks for the parent's permission to
    signal: a parent without privilege does not take a child of another user along. Raises `KernelError`, also where
    the parent is gone already.
    """
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        raise KernelError("the parent process ended", errno=errno.ESRCH, path="getppid")


def own_directory_and_umask() -> None:
    """Let the calling thread have a working directory and a umask of its own, copies of the process's (unshare(2)).

    Raises `KernelError`.
    """
    unshare(CLONE_FS)


def kill(pidfd: int, pid: int, uid: int | None = None, number: int = signal.SIGKILL) -> None:
    """Signal a process, also one of another user where the calling thread may become that user.

    Who may become any user may signal any process: the thread takes the other's uid as its effective one for the
    moment of the call, by CAP_SETUID, which it has to hold permitted. Its real uid stays, so that the other cannot
    signal it meanwhile. ``uid`` is the other's, where it is known; else it is read. A process that ended is as good as
    killed. Raises `KernelError`. Source: kill(2).
    """
    with contextlib.suppress(ProcessLookupError):
        try:
            signal.pidfd_send_signal(pidfd, number)
        except PermissionError as error:
            state = capability.read_state()
            if capability.CAP_SETUID not in state.permitted:
                raise KernelError.from_oserror(
                    error, path=f"kill({pid})", hint="it is another user's: CAP_KILL or CAP_SETUID is needed"
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
    # To leave an effective uid of 0 again would take every capability along.
    capability.set_keep_capabilities(True)
    try:
        capability.set_uids(-1, uid, -1)
        signal.pidfd_send_signal(pidfd, number)
    finally:
        capability.set_uids(-1, state.uids.effective, -1)
        capability.set_keep_capabilities(False)
        capability.set_capabilities(state.permitted, state.effective, state.inheritable)


def system() -> str:
    """What is the same for all processes that can see each other by their numbers, and for no others.

    This boot of this machine, and the PID namespace (pid_namespaces(7)). Raises `OSError`.
    """
    with open("/proc/sys/kernel/random/boot_id") as file:
        boot = file.read().strip()
    return f"{boot}/{os.stat('/proc/self/ns/pid').st_ino}"


def threads() -> list[str]:
    """The threads of the calling process but the calling one, by number and name. Opens nothing where it is alone."""
    if is_single_threaded():
        return []
    own = str(threading.get_native_id())
    found = []
    for number in os.listdir("/proc/self/task"):
        if number != own:
            with contextlib.suppress(OSError), open(f"/proc/self/task/{number}/comm", "rb") as file:
                found.append(f"{number} ({file.read().decode(errors='replace').strip()})")
    return found


def own_session_keyring() -> None:
    """Give the calling thread a new, empty session keyring of its own: keyctl(2), KEYCTL_JOIN_SESSION_KEYRING.

    The one it has is shared with whatever started the server. Charged to the user that it is now. Nothing where the
    kernel has no keyrings, or a filter keeps everybody from them. Raises `KernelError`, EDQUOT where that user has
    too many keys (kernel.keys.maxkeys).
    """
    try:
        syscall("keyctl", _KEYCTL_JOIN_SESSION_KEYRING, 0)
    except KernelError as error:
        if error.errno not in (errno.ENOSYS, errno.EPERM):
            raise


def bell_of_children() -> tuple[int, int]:
    """A descriptor that becomes readable when a child of this process ends (SIGCHLD), and the one that rings it.

    `forget_bell` in a new process undoes it there.
    """
    end, ringer = _socket.socketpair(_socket.AF_UNIX, _socket.SOCK_STREAM | _socket.SOCK_CLOEXEC)
    ringer.setblocking(False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    end.setblocking(False)
    bell, rope = end.detach(), ringer.detach()
    signal.set_wakeup_fd(rope, warn_on_full_buffer=False)
    return bell, rope


def silence(bell: int) -> None:
    """Take what has made a bell readable."""
    with contextlib.suppress(BlockingIOError):
        while os.read(bell, 4096):
            pass


def reap_strangers(known: Collection[int]) -> None:
    """Take the wait status of each child that has ended but those ``known``, and forget it: waitid(2)."""
    while True:
        try:
            ended = posix.waitid(posix.P_ALL, 0, posix.WEXITED | posix.WNOHANG | posix.WNOWAIT)
        except ChildProcessError:
            return
        if ended is None or ended.si_pid in known:
            return  # it may stand before others: call again when it is taken
        posix.waitpid(ended.si_pid, 0)


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


def make_room_for_descriptors(executors: int) -> None:
    """Raise the soft limit of open files (getrlimit(2)), as far as it may be, to hold so many executors.

    Never lowers it. A process takes a socket and the files its usage is read from; a confinement of threads the files
    by which its cgroup is entered and left; a thread the pipes that it is woken by.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _FILES_OF_A_SERVER + executors * _FILES_OF_AN_EXECUTOR
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
