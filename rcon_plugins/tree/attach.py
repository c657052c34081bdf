"""Running processes, taken into a group with limits and put back: what ``rcon attach`` does.

A watcher, a small process that outlives the command and its terminal, owns the instance. It waits for the processes to
end and removes the group then; told to end itself (SIGTERM), it puts them back first. If it is killed, the next start
or ``rcon gc`` puts them back: they are never ended.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable
from typing import NamedTuple, NoReturn

from rcon_plugins.errors import KernelError, RconError
from rcon_plugins.kernel import proc
from rcon_plugins.kernel.cgroup import Cgroup, Hierarchy
from rcon_plugins.kernel.proc import (
    inherited_descriptors,
    is_kernel_thread,
    parents,
    process_of,
    read_process,
)
from rcon_plugins.tree import attach_watcher, previous_cgroups
from rcon_plugins.tree.instance import Instance
from rcon_plugins.tree.survey import INSTANCE_NAME

#: How long processes that go on forking are taken in again.
_TRIES = 20


class AttachRefused(RconError):
    """Raised when one of the processes cannot be taken; nothing was."""


class AttachRequest(NamedTuple):
    """What to take, and into what.

    ``configure`` writes the limits to its ``cgroup``. ``attend`` begins, before any process is in it, what goes on in
    threads of the watcher until the group goes, and returns what ends that.
    """

    pids: tuple[int, ...]
    group: str
    configure: Callable[..., object]
    children: bool = False
    attend: Callable[[Cgroup], Callable[[], object]] | None = None


def check(pids: Iterable[int], hierarchy: Hierarchy) -> None:
    """Raise `AttachRefused`, with the remedy, for the first that cannot be taken by this process."""
    for pid in pids:
        if pid == os.getpid():
            raise AttachRefused(f"{pid} is rcon itself (name the process to hold down; $$ is the shell)")
        if pid == 1:
            raise AttachRefused("1 is init, which starts all others (name the processes to hold down)")
        found = read_process(pid)
        if found is None or proc.start_time(pid) is None:
            raise AttachRefused(f"there is no process {pid}, or it has ended (ps -e lists them)")
        if is_kernel_thread(pid):
            raise AttachRefused(f"{pid} {found.command} is a thread of the kernel (name a process)")
        if process_of(pid) != pid:
            raise AttachRefused(f"{pid} is a thread of process {process_of(pid)} (name that)")
        if os.geteuid() not in (0, found.uid):
            raise AttachRefused(f"{pid} is another user's (run rcon as root)")
        _check_place(pid, hierarchy)


def _check_place(pid: int, hierarchy: Hierarchy) -> None:
    try:
        place = previous_cgroups.place_of(pid, hierarchy.cgroup("/"))
    except KernelError as error:
        raise AttachRefused(str(error)) from None
    inside = next(
        (path for path in place.values() if any(map(INSTANCE_NAME.fullmatch, path.split("/")))), None
    )
    if inside is not None:
        raise AttachRefused(
            f"{pid} is in a group already: {inside} (rcon set changes its limits, rcon attach --release lets it go)"
        )


def staying(pids: Iterable[int], hierarchy: Hierarchy) -> list[int]:
    """Those that this user may take, and not put back to where they are now."""
    if os.geteuid() == 0:
        return []
    mounts = {mount.path: mount for mount in hierarchy.limit_mounts}
    found = []
    for pid in pids:
        try:
            place = previous_cgroups.place_of(pid, hierarchy.cgroup("/"))
        except KernelError:
            continue  # it has ended, as who takes it will find
        places = [f"{mounts[at].directory(path)}/cgroup.procs" for at, path in place.items() if at in mounts]
        if not all(os.access(file, os.W_OK) for file in places):
            found.append(pid)
    return found


def take(wish: AttachRequest, hierarchy: Hierarchy, base: str | None = None) -> list[int]:
    """Take them all, or none, and leave a watcher behind; those that were taken.

    Raises `AttachRefused`, `KernelError`, and what ``configure`` raises.
    """
    check(wish.pids, hierarchy)
    ours, theirs = os.pipe()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    pid = os.fork()
    if pid == 0:
        os.close(ours)
        _become_watcher(wish, hierarchy, base, theirs)
    os.close(theirs)
    answer = b""
    while piece := os.read(ours, 65536):
        answer += piece
    os.close(ours)
    import pickle

    result = pickle.loads(answer) if answer else KernelError("the watcher ended", path="fork")  # noqa: S301 - our fork
    if isinstance(result, BaseException):
        with contextlib.suppress(ChildProcessError):  # where SIGCHLD is ignored
            os.waitpid(pid, 0)
        raise result
    taken: list[int] = result
    return taken


def _become_watcher(wish: AttachRequest, hierarchy: Hierarchy, base: str | None, pipe: int) -> NoReturn:
    import pickle

    try:
        os.setsid()
        # The end of the terminal is nothing to us; and nothing may end us half way.
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_BLOCK, attach_watcher.HEARD)
        instance = Instance.create(hierarchy, base)
        try:
            group, pids, end = _fill(wish, instance)
        except BaseException:
            previous_cgroups.forget(attach_watcher.name_of(instance))
            instance.close()
            raise
        null = os.open(os.devnull, os.O_RDWR)
        for standard in range(3):
            os.dup2(null, standard)
        os.chdir("/")
        try:
            os.write(pipe, pickle.dumps(pids))
        except OSError:
            # Who asked was interrupted, and knows of nothing that was taken.
            attach_watcher.let_go(instance, group)
            raise
        os.close(pipe)
        for descriptor in inherited_descriptors():
            os.close(descriptor)
        _settle(instance, group, end)
    except BaseException as error:  # noqa: BLE001 - the end of this process: who started it is told, whatever it was
        with contextlib.suppress(OSError):
            os.write(pipe, pickle.dumps(error))
    finally:
        os._exit(1)


def _fill(wish: AttachRequest, instance: Instance) -> tuple[Cgroup, list[int], Callable[[], object] | None]:
    if instance.needs_adoption:
        instance.adopt()
    group = instance.taken(wish.group)
    group.create()
    known = previous_cgroups.Origins({})
    end = None
    try:
        wish.configure(cgroup=group)
        if wish.attend is not None:
            end = wish.attend(group)
        _move(wish, group, known, attach_watcher.name_of(instance))
    except BaseException as error:
        if end is not None:
            end()
        previous_cgroups.restore(group, known)
        if isinstance(error, KernelError) and error.errno == errno.ESRCH:
            raise AttachRefused(f"{error} (none was taken)") from None
        raise
    return group, sorted(pid for pid, _ in known.places), end


def _move(wish: AttachRequest, group: Cgroup, known: previous_cgroups.Origins, instance: str) -> None:
    pending = list(wish.pids)
    for _ in range(_TRIES):
        for pid in pending:
            started = proc.start_time(pid)
            place = previous_cgroups.place_of(pid, group)
            if started is None:
                raise KernelError(f"process {pid} has ended", errno=errno.ESRCH)
            known.places[pid, started] = place
        previous_cgroups.save(instance, known)
        for pid in pending:
            try:
                group.attach(pid)
            except KernelError as error:
                if error.errno == errno.ESRCH and pid not in wish.pids:
                    continue  # a child that ended meanwhile
                if error.errno == errno.ESRCH:
                    raise KernelError(f"process {pid} has ended", errno=errno.ESRCH) from None
                raise
        # One that was about to fork has a child outside now; so also without --children.
        inside = set(group.processes())
        pending = [
            pid
            for pid in (_descendants(inside) if wish.children else set[int]())
            if pid not in inside and proc.start_time(pid) is not None
        ]
        if not pending:
            return
    raise AttachRefused("they fork faster than they can be taken (rcon kill, or SIGSTOP them first)")


def _descendants(pids: set[int]) -> set[int]:
    """All below them, but this process and who started it."""
    of = parents()
    mine = {os.getpid(), os.getppid()}
    found = set(pids)
    while more := {pid for pid, parent in of.items() if parent in found and pid not in found} - mine:
        found |= more
    return found - pids


def _settle(instance: Instance, group: Cgroup, end: Callable[[], object] | None) -> NoReturn:
    """Go on as the watcher: in an interpreter that has loaded nothing else, so that it is small, but for ``end``."""
    if not instance.needs_adoption and end is None:
        words = [
            sys.executable,
            "-I",
            "-S",
            attach_watcher.__file__,
            instance.base,
            attach_watcher.name_of(instance),
            group.name,
        ]
        with contextlib.suppress(OSError):
            os.execv(sys.executable, words)  # noqa: S606  no shell, on purpose
    attach_watcher.watch(instance, group, end)
    os._exit(0)


# -- letting go


def release_group(group: Cgroup, instance: str, timeout: float = 10.0) -> None:
    """Have all that is in a group put back where it was, by its watcher if that lives, and the group removed.

    Raises KernelError, ETIMEDOUT where the watcher does not do it, EACCES for what another user only calls so.
    """
    pid = int(instance.split("-")[1])
    uid = previous_cgroups.stranger(group)
    watching = read_process(pid)
    if uid is not None and (watching is None or watching.uid != uid):
        raise _not_ours(group, uid)
    if not _tell(instance, signal.SIGTERM):
        staying = previous_cgroups.restore(group, previous_cgroups.load(instance))
        if staying:
            raise KernelError(f"processes {staying} stay in {group.path}", errno=errno.EBUSY, path=group.path)
        group.delete()
        previous_cgroups.forget(instance)
        return
    deadline = time.monotonic() + timeout
    while any(os.path.isdir(directory) for directory in group.directories):
        if time.monotonic() > deadline:
            raise KernelError(
                f"the watcher {pid} of {group.path} has not put its processes back within {timeout:g} s",
                errno=errno.ETIMEDOUT,
                path=group.path,
                hint=f"kill -9 {pid}; rcon gc",
            )
        time.sleep(0.01)


def release_process(pid: int, group: Cgroup, instance: str) -> None:
    """Put one process back where it was; its watcher ends when it was the last. Raises KernelError."""
    uid = previous_cgroups.stranger(group)
    if uid is not None:
        raise _not_ours(group, uid)
    previous_cgroups.restore(group, previous_cgroups.load(instance), [pid])
    _tell(instance, signal.SIGUSR1)


def _not_ours(group: Cgroup, uid: int) -> KernelError:
    return KernelError(
        f"{group.path} is of uid {uid}, who can say where its processes were",
        errno=errno.EACCES,
        path=group.path,
        hint="release them as that user",
    )


def _tell(instance: str, number: int) -> bool:
    """Signal the watcher of an instance; False where it is dead."""
    _, pid, started = instance.split("-")[:3]
    try:
        descriptor = os.pidfd_open(int(pid))
    except ProcessLookupError:
        return False
    try:
        if proc.start_time(int(pid)) != int(started):
            return False
        signal.pidfd_send_signal(descriptor, number)
        return True
    except ProcessLookupError:
        return False
    finally:
        os.close(descriptor)
