"""Attach running processes to a group with limits, and release them: ``rcon attach``.

A small process, the watcher (`attach_watcher`), owns the instance and outlives the command and its terminal. It waits
for the processes to end, and then removes the group. On SIGTERM it first moves them back to their previous cgroups. If
the watcher is killed, the next start or ``rcon gc`` moves them back. Attached processes are never killed.
"""

from __future__ import annotations

import contextlib
import errno
import os
import posix
import signal
import sys
import time
from collections.abc import Callable, Iterable
from typing import NamedTuple, NoReturn

from rcon_plugins.errors import KernelError, RconError
from rcon_plugins.kernel import descriptors, files, proc
from rcon_plugins.kernel.cgroup import Cgroup, Hierarchy, Resources
from rcon_plugins.tree import attach_watcher, previous_cgroups
from rcon_plugins.tree.instance import Instance
from rcon_plugins.tree.owner import INSTANCE_NAME, Owner
from rcon_plugins.tree.previous_cgroups import PreviousCgroups

#: The most rounds of attaching processes that were forked meanwhile.
_ATTEMPTS = 20


class AttachRefused(RconError):
    """Raised when a process cannot be attached. In that case no process is attached."""


class AttachRequest(NamedTuple):
    """The processes to attach, and the ``group`` for them.

    ``resources`` are the limits of the group. ``children``: attach all descendants, too. `attach` calls ``monitor``
    with the group before any process is in it. ``monitor`` may start threads in the watcher, and returns the function
    that stops them.
    """

    pids: tuple[int, ...]
    group: str
    resources: Resources
    children: bool = False
    monitor: Callable[[Cgroup], Callable[[], object]] | None = None


def check(pids: Iterable[int], hierarchy: Hierarchy) -> None:
    """Raise `AttachRefused`, with the remedy, for the first process that the calling process cannot attach."""
    for pid in pids:
        if pid == os.getpid():
            raise AttachRefused(f"process {pid} is rcon itself (name another process; $$ is the shell)")
        if pid == 1:
            raise AttachRefused("process 1 is init, which starts all others (name another process)")
        found = proc.read_process(pid)
        if found is None or proc.start_time(pid) is None:
            raise AttachRefused(f"there is no process {pid}, or it has ended (ps -e lists them)")
        if proc.is_kernel_thread(pid):
            raise AttachRefused(f"{pid} {found.command} is a kernel thread (name a process)")
        if proc.process_of(pid) != pid:
            raise AttachRefused(f"{pid} is a thread of process {proc.process_of(pid)} (name the process)")
        if os.geteuid() not in (0, found.uid):
            raise AttachRefused(f"process {pid} belongs to another user (run rcon as root)")
        _check_cgroups(pid, hierarchy)


def _check_cgroups(pid: int, hierarchy: Hierarchy) -> None:
    try:
        paths = previous_cgroups.cgroups_of(pid, hierarchy.cgroup("/"))
    except KernelError as error:
        raise AttachRefused(str(error)) from None
    inside = next(
        (path for path in paths.values() if any(map(INSTANCE_NAME.fullmatch, path.split("/")))), None
    )
    if inside is not None:
        raise AttachRefused(
            f"process {pid} is in a group already: {inside} (rcon set changes its limits, "
            "rcon attach --release releases it)"
        )


def not_restorable(pids: Iterable[int], hierarchy: Hierarchy) -> list[int]:
    """Return the processes that this user may not move back to their current cgroups."""
    if os.geteuid() == 0:
        return []
    mounts = {mount.path: mount for mount in hierarchy.limit_mounts}
    found = []
    for pid in pids:
        try:
            paths = previous_cgroups.cgroups_of(pid, hierarchy.cgroup("/"))
        except KernelError as error:
            if not files.gone(error):
                raise
            continue  # the process has ended, and `attach` refuses it
        targets = [f"{mounts[at].directory(path)}/cgroup.procs" for at, path in paths.items() if at in mounts]
        if not all(os.access(target, os.W_OK) for target in targets):
            found.append(pid)
    return found


def attach(request: AttachRequest, hierarchy: Hierarchy, base: str | None = None) -> list[int]:
    """Attach all processes, or none, and start a watcher. Return the attached processes.

    Raises `AttachRefused`, `KernelError`, and any exception of ``monitor``.
    """
    check(request.pids, hierarchy)
    reading, writing = descriptors.pipe()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    pid = descriptors.fork_beside(reading, writing)
    if pid == 0:
        posix.close(reading)
        _become_watcher(request, hierarchy, base, writing)
    posix.close(writing)
    data = b""
    while piece := os.read(reading, 65536):
        data += piece
    posix.close(reading)
    import pickle

    result = pickle.loads(data) if data else KernelError("the watcher ended", path="fork")  # noqa: S301 - our fork
    if isinstance(result, BaseException):
        with contextlib.suppress(ChildProcessError):  # with SIGCHLD ignored, the kernel has reaped it
            os.waitpid(pid, 0)
        raise result
    attached: list[int] = result
    return attached


def _become_watcher(request: AttachRequest, hierarchy: Hierarchy, base: str | None, pipe: int) -> NoReturn:
    import pickle

    try:
        os.setsid()
        # The terminal may close, and no signal may end this process before it is done.
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_BLOCK, attach_watcher.SIGNALS)
        instance = Instance.create(hierarchy, base)
        try:
            group, pids, stop = _fill(request, instance)
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
            # The command was interrupted, and reports nothing as attached.
            attach_watcher.release(instance, group)
            raise
        posix.close(pipe)
        for descriptor in proc.inherited_descriptors():
            posix.close(descriptor)
        _watch(instance, group, stop)
    except BaseException as error:  # noqa: BLE001 - the end of this process: its parent raises the error
        with contextlib.suppress(OSError):
            os.write(pipe, pickle.dumps(error))
    finally:
        os._exit(1)


def _fill(
    request: AttachRequest, instance: Instance
) -> tuple[Cgroup, list[int], Callable[[], object] | None]:
    if instance.needs_adoption:
        instance.adopt()
    group = instance.attached(request.group)
    group.create()
    previous = PreviousCgroups({})
    stop = None
    try:
        group.configure(request.resources)
        if request.monitor is not None:
            stop = request.monitor(group)
        _move(request, group, previous, attach_watcher.name_of(instance))
    except BaseException as error:
        if stop is not None:
            stop()
        previous_cgroups.restore(group, previous)
        if isinstance(error, KernelError) and error.errno == errno.ESRCH:
            raise AttachRefused(f"{error} (no process was attached)") from None
        raise
    return group, sorted(pid for pid, _ in previous.by_process), stop


def _move(request: AttachRequest, group: Cgroup, previous: PreviousCgroups, instance: str) -> None:
    pending = list(request.pids)
    for _ in range(_ATTEMPTS):
        for pid in pending:
            started = proc.start_time(pid)
            paths = previous_cgroups.cgroups_of(pid, group)
            if started is None:
                raise KernelError(f"process {pid} has ended", errno=errno.ESRCH)
            previous.by_process[pid, started] = paths
        previous_cgroups.save(instance, previous)
        for pid in pending:
            try:
                group.attach(pid)
            except KernelError as error:
                if error.errno == errno.ESRCH and pid not in request.pids:
                    continue  # a descendant that ended meanwhile
                if error.errno == errno.ESRCH:
                    raise KernelError(f"process {pid} has ended", errno=errno.ESRCH) from None
                raise
        # A process that was about to fork has a child outside of the group now.
        inside = set(group.processes())
        pending = [
            pid
            for pid in (_descendants(inside) if request.children else set[int]())
            if pid not in inside and proc.start_time(pid) is not None
        ]
        if not pending:
            return
    raise AttachRefused(
        "the processes fork faster than they can be attached (stop them first: kill -STOP PID, or end them: kill PID)"
    )


def _descendants(pids: set[int]) -> set[int]:
    """Return all descendants, except this process and its parent."""
    parent_of = proc.parents()
    excluded = {os.getpid(), os.getppid()}
    found = set(pids)
    while (
        more := {pid for pid, parent in parent_of.items() if parent in found and pid not in found} - excluded
    ):
        found |= more
    return found - pids


def _watch(instance: Instance, group: Cgroup, stop: Callable[[], object] | None) -> NoReturn:
    """Become the watcher. Execute its program again to save memory, unless ``stop`` needs the threads of this one."""
    if not instance.needs_adoption and stop is None:
        command = [
            sys.executable,
            "-I",
            "-S",
            attach_watcher.__file__,
            instance.base,
            attach_watcher.name_of(instance),
            group.name,
        ]
        with contextlib.suppress(OSError):
            os.execv(sys.executable, command)  # noqa: S606  no shell, on purpose
    attach_watcher.watch(instance, group, stop)
    os._exit(0)


# -- release


def release_group(group: Cgroup, instance: str, timeout: float = 10.0) -> None:
    """Move all processes of a group back to their previous cgroups, and remove the group.

    The watcher does it if it is alive. Raises KernelError: ETIMEDOUT if the watcher does not do it in time, EACCES if
    another user owns the group.
    """
    pid = _watcher_of(instance)
    uid = previous_cgroups.other_owner(group)
    watcher = None if pid is None else proc.read_process(pid)
    if uid is not None and (watcher is None or watcher.uid != uid):
        raise _not_permitted(group, uid)
    if not _signal(instance, signal.SIGTERM):
        remaining = previous_cgroups.restore(group, previous_cgroups.load(instance))
        if remaining:
            raise KernelError(
                f"processes {remaining} of {group.path} cannot be moved back",
                errno=errno.EBUSY,
                path=group.path,
            )
        group.delete()
        previous_cgroups.forget(instance)
        return
    deadline = time.monotonic() + timeout
    while any(os.path.isdir(directory) for directory in group.directories):
        if time.monotonic() > deadline:
            raise KernelError(
                f"the watcher {pid} of {group.path} did not move its processes back within {timeout:g} s",
                errno=errno.ETIMEDOUT,
                path=group.path,
                hint=f"kill -9 {pid}; rcon gc",
            )
        time.sleep(0.01)


def release_process(pid: int, group: Cgroup, instance: str) -> None:
    """Move one process back to its previous cgroups. The watcher ends after the last process. Raises KernelError."""
    uid = previous_cgroups.other_owner(group)
    if uid is not None:
        raise _not_permitted(group, uid)
    previous_cgroups.restore(group, previous_cgroups.load(instance), [pid])
    _signal(instance, signal.SIGUSR1)


def _not_permitted(group: Cgroup, uid: int) -> KernelError:
    return KernelError(
        f"{group.path} belongs to uid {uid}, and only that user knows where its processes came from",
        errno=errno.EACCES,
        path=group.path,
        hint="release them as that user",
    )


def _watcher_of(instance: str) -> int | None:
    """Return the pid of the watcher of an instance in this PID namespace; None if it is dead.

    Raises KernelError if it is in a PID namespace that cannot be seen from here.
    """
    owner = Owner.of(instance)
    pid = None if owner is None else owner.visible_pid()
    if pid is None and owner is not None and owner.is_alive() is None:
        raise KernelError(
            f"the watcher of {instance} is in a PID namespace that cannot be seen from here",
            errno=errno.ESRCH,
            path=instance,
            hint="release the group there, or outside of containers",
        )
    return pid


def _signal(instance: str, number: int) -> bool:
    """Send a signal to the watcher of an instance. Return False if it is dead."""
    pid = _watcher_of(instance)
    if pid is None:
        return False
    try:
        descriptor = descriptors.of_process(pid)
    except KernelError as error:
        if files.gone(error):
            return False
        raise
    try:
        if _watcher_of(instance) != pid:
            return False
        signal.pidfd_send_signal(descriptor, number)
        return True
    except ProcessLookupError:
        return False
    finally:
        posix.close(descriptor)
