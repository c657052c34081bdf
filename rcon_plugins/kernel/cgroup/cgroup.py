"""Make, limit, enter, read, freeze, kill and remove one cgroup."""

from __future__ import annotations

import contextlib
import errno
import os
import posix
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping

from rcon_plugins.errors import ControllerUnavailable, KernelError
from rcon_plugins.kernel import descriptors, files, proc
from rcon_plugins.kernel.cgroup import meter, v1, v2
from rcon_plugins.kernel.cgroup.branch import Branch, check_name
from rcon_plugins.kernel.cgroup.entrance import Entrance
from rcon_plugins.kernel.cgroup.meter import Meter, Reading
from rcon_plugins.kernel.cgroup.mounts import Mount
from rcon_plugins.kernel.cgroup.resources import Resources
from rcon_plugins.kernel.cgroup.v1 import V1Branch
from rcon_plugins.kernel.cgroup.v2 import V2Branch

#: So many processes are signalled after one look at who is in the cgroup.
_SIGNALLED_AT_ONCE = 64
#: How long create() repeats while other processes remove cgroups that it needs.
_CREATE_SECONDS = 5.0


class Cgroup:
    """A name in the cgroup tree, existing or not. The object keeps no file open, and survives ``fork``.

    ``controllers`` are the controllers whose limits can be set here and by which usage is accounted. Use
    :meth:`Hierarchy.cgroup` or :meth:`child` to make one.
    """

    def __init__(
        self,
        path: str,
        branches: Callable[[str, frozenset[str], bool], list[Branch]],
        controllers: frozenset[str],
        *,
        threaded: bool = False,
        shared: bool = False,
    ) -> None:
        self._path = path
        self._make_branches = branches
        #: Several processes make and remove children here: delete() keeps the children.
        self.shared = shared
        self._use(controllers, threaded)

    def _use(self, controllers: frozenset[str], threaded: bool) -> None:
        self.controllers = controllers
        self.threaded = threaded
        self._made: list[Branch] | None = None

    @property
    def _branches(self) -> list[Branch]:
        """The branches. Made at first use, because many a cgroup is only the parent of another."""
        if self._made is None:
            self._made = self._make_branches(self._path, self.controllers, self.threaded)
        return self._made

    def __repr__(self) -> str:
        return f"<Cgroup {self._path}>"

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self._path.rpartition("/")[2]

    @property
    def path(self) -> str:
        """The path below the roots of the hierarchies, such as ``/servers/web``."""
        return self._path

    @property
    def directories(self) -> list[str]:
        """The directories of this cgroup, one per hierarchy used."""
        return [branch.directory for branch in self._branches]

    @property
    def unified_directory(self) -> str | None:
        """The directory in the v2 hierarchy, where a process can begin; None without one.

        It may have no controllers.
        """
        branches = (
            branch for branch in self._branches if isinstance(branch, V2Branch) and not branch.threaded
        )
        return next((branch.directory for branch in branches), None)

    @property
    def mounts(self) -> list[Mount]:
        """The hierarchies this cgroup uses, in the order of :attr:`directories`."""
        return [branch.mount for branch in self._branches]

    def become_threaded(self) -> None:
        """Treat this as a threaded cgroup from now on. Makes nothing in the kernel."""
        self._use(self.controllers, True)

    # -- the tree -----------------------------------------------------------------------------

    def child(self, name: str, *, shared: bool = False) -> Cgroup:
        """Return the cgroup ``name`` in this one, without making it. Raises ValueError for an invalid name."""
        path = f"{self._path.rstrip('/')}/{check_name(name)}"
        return Cgroup(path, self._make_branches, self.controllers, threaded=self.threaded, shared=shared)

    def children(self) -> list[str]:
        """Return the names of the cgroups in this one, in any of its hierarchies."""
        return sorted({name for branch in self._branches for name in files.subdirectories(branch.directory)})

    def exists(self) -> bool:
        """Return whether the cgroup exists in all its hierarchies."""
        return all(branch.exists() for branch in self._branches)

    def create(self, threaded: bool | None = None, controllers: frozenset[str] | None = None) -> Cgroup:
        """Make the cgroup and the missing ones above it, and return the cgroup. It may exist already.

        ``threaded``: single threads can enter the cgroup; the one above becomes its domain. ``controllers`` restricts
        the cgroup to some controllers of the hierarchy.

        If another process removes a cgroup above meanwhile, this makes that one again, without limits. So configure a
        cgroup that others may remove after this call, which keeps it from being removed, and before a process enters.

        Raises KernelError, ControllerUnavailable.
        """
        if threaded is not None or controllers is not None:
            wanted = self.controllers if controllers is None else controllers
            self._use(wanted, self.threaded if threaded is None else threaded)
        deadline = time.monotonic() + _CREATE_SECONDS
        while True:
            try:
                for branch in self._branches:
                    branch.create()
                return self
            except KernelError as error:
                gone = error.errno in (errno.ENOENT, errno.ENODEV)
                if isinstance(error, ControllerUnavailable) or not gone or time.monotonic() >= deadline:
                    raise
            time.sleep(0.0005)

    def configure(self, resources: Resources) -> None:
        """Write limits; a field that is ``None`` stays as it is. May be called again while the cgroup is in use.

        Raises KernelError with path, value and hint, and ControllerUnavailable for a limit that cannot be set here.
        The limits written before the failed one stay.
        """
        missing = resources.controllers() - self.controllers
        if self.threaded and not missing:
            missing = resources.controllers() - frozenset().union(
                *(branch.controllers for branch in self._branches)
            )
        if missing:
            raise ControllerUnavailable(
                f"{self._path} has no {', '.join(sorted(missing))} controller",
                path=self._path,
                hint="a thread cannot have limits of memory or, on v2, io: use a process"
                if self.threaded
                else "Hierarchy.refusals() tells what this machine cannot enforce, and the remedy",
            )
        for branch in self._branches:
            branch.configure(resources)
        for name, value in resources.files.items():
            self._write_file(name, value)

    def _write_file(self, name: str, value: str) -> None:
        """Write a file that no field of `Resources` sets."""
        controller = name.partition(".")[0]
        for branch in self._branches:
            if branch.carries(controller):
                return branch.write_file(name, value)
        raise ControllerUnavailable(
            f"{self._path} has no {controller} controller",
            path=f"{self._path}/{name}",
            value=value,
            hint="Hierarchy.refusals() tells what this machine cannot enforce, and the remedy",
        )

    # -- processes and threads ----------------------------------------------------------------

    def attach(self, pid: int) -> None:
        """Move the process ``pid`` with all its threads here. Takes milliseconds. Raises KernelError."""
        if pid <= 0:
            raise ValueError(f"not a process: {pid}")
        for branch in self._branches:
            branch.attach(pid)

    def enter_process(self, *, cloned: bool = False) -> None:
        """Move the calling process here. Intended for a process with a single thread.

        ``cloned``: it began in `unified_directory`, and only enters the other hierarchies. Raises KernelError. The
        process may then have entered only some of the hierarchies, and must not run the code that the limits are for.
        """
        alone = proc.is_single_threaded()
        for branch in self._branches:
            if not (cloned and isinstance(branch, V2Branch)):
                branch.enter_process(alone=alone)

    def counts_unified(self, controller: str) -> bool:
        """Return whether a controller limits this cgroup in the v2 hierarchy."""
        return any(isinstance(branch, V2Branch) and branch.carries(controller) for branch in self._branches)

    def entrance(
        self, controllers: Iterable[str] | None = None, home: Mapping[str, str] | None = None
    ) -> Entrance:
        """Open the files with which threads enter (see :class:`Entrance`). The cgroup must exist.

        On v1 a thread enters each hierarchy with a write of its own. ``controllers`` names the controllers to enter,
        and saves the other writes; None enters all that act on threads. Where ``cpuacct`` is a hierarchy of its own,
        name it beside ``cpu`` to measure CPU time. ``home`` gives by mount point another cgroup to enter instead of
        this one. Raises KernelError.
        """
        wanted = None if controllers is None else frozenset(controllers)
        targets = []
        for branch in self._thread_branches(wanted):
            directory = (
                branch.entry_directory() if home is None else branch.mount.directory(home[branch.mount.path])
            )
            targets.append((directory, branch.thread_file))
        return Entrance(targets)

    def _thread_branches(self, wanted: frozenset[str] | None) -> list[Branch]:
        found = []
        covered: set[str] = set()
        for branch in self._branches:
            if isinstance(branch, V2Branch):
                # On hybrid, threads cannot enter the v2 side of a domain cgroup.
                if len(self._branches) > 1 and not branch.controllers:
                    continue
                covered |= v2.THREADED | {"cpuacct"}
            else:
                acts = (branch.controllers & v1.THREADED) | (branch.mount.controllers & {"cpuacct"})
                if not acts or (wanted is not None and not acts & wanted):
                    continue
                covered |= acts
            found.append(branch)
        lacking = (wanted or frozenset()) - covered
        if lacking:
            raise ControllerUnavailable(
                f"a thread cannot enter {self._path} for {', '.join(sorted(lacking))}",
                path=self._path,
                hint="use a process",
            )
        return found

    def processes(self, *, subtree: bool = False) -> list[int]:
        """Return the processes in this cgroup; with ``subtree`` also in those below it. A threaded one lists none."""
        return sorted(self._ids("cgroup.procs", subtree))

    def has_processes(self) -> bool:
        """Return whether a process is in this cgroup or in one below it. A threaded one lists none."""
        return any(branch.has_processes() for branch in self._branches)

    def threads(self, *, subtree: bool = False) -> list[int]:
        """Return the threads in this cgroup; with ``subtree`` also in those below it."""
        return sorted(self._ids(None, subtree))

    def _ids(self, name: str | None, subtree: bool, *, but: Branch | None = None) -> set[int]:
        found: set[int] = set()
        for branch in self._branches:
            if branch is not but:
                found |= branch.ids(name or branch.thread_file, subtree=subtree)
        return found

    # -- usage --------------------------------------------------------------------------------

    def meter(self, controllers: Iterable[str] | None = None, *, memory_limit_hits: bool = True) -> Meter:
        """Open the usage files; with ``controllers`` only those of these. The cgroup must exist. Raises KernelError.

        Without ``memory_limit_hits``, leave out the files that v1 counts these in: two fewer to read each time.
        """
        wanted = self.controllers if controllers is None else frozenset(controllers)
        targets = []
        for branch in self._branches:
            is_v2 = isinstance(branch, V2Branch)
            if is_v2 and len(self._branches) > 1 and not branch.controllers:
                continue
            if branch.entry_directory() != branch.directory:
                continue  # shares its parent's IO, see V1Branch
            table = meter.V2_FILES if is_v2 else meter.V1_FILES
            there = branch.controllers | {"cpu"} if is_v2 else branch.mount.controllers
            targets += [
                (branch.directory, name, parser)
                for name, (controller, parser) in table.items()
                if controller in wanted
                and name.partition(".")[0] in there
                and (memory_limit_hits or name not in meter.MEMORY_LIMIT_HITS)
            ]
        return Meter(targets)

    def read(self) -> Reading:
        """Return what this cgroup has used until now. Raises KernelError."""
        with self.meter() as opened:
            return opened.read()

    @property
    def kills_one_by_one(self) -> bool:
        """Whether an OOM kill ends one process and the others go on: v1 has no ``oom_group``."""
        return any(isinstance(branch, V1Branch) and branch.carries("memory") for branch in self._branches)

    def notify_of_oom(self, descriptor: int) -> bool:
        """Have v1 signal an eventfd before an OOM kill at the limit of this cgroup or one above; see `v1.add_notice`.

        The counter rises some milliseconds later, and the parent of the killed process learns of its end later still.
        Return False on v2, and on a kernel without such notices. Raises KernelError.
        """
        for branch in self._branches:
            if isinstance(branch, V1Branch) and branch.carries("memory"):
                try:
                    v1.add_notice(branch.directory, "memory.oom_control", descriptor)
                except KernelError as error:
                    # A realtime kernel (since 5.18) has no such notices.
                    if error.errno in (errno.EOPNOTSUPP, errno.ENOENT):
                        return False
                    raise
                return True
        return False

    # -- stopping and ending ------------------------------------------------------------------

    def freeze(self, timeout: float = 5.0) -> None:
        """Freeze all processes here and below, and wait until they are frozen.

        Raises KernelError (ETIMEDOUT, after thawing the processes again) and ControllerUnavailable.
        """
        self._set_frozen(True)
        deadline = time.monotonic() + timeout
        pause = 0.0005
        while not self._freezer().is_frozen():
            if time.monotonic() >= deadline:
                self.thaw()
                raise KernelError(
                    f"{self._path} did not freeze within {timeout:g} s",
                    errno=errno.ETIMEDOUT,
                    path=self._path,
                    hint="a process waits for a device or a network file system",
                )
            time.sleep(pause)
            pause = min(pause * 2, 0.02)

    def thaw(self) -> None:
        """Let frozen processes continue. Raises KernelError."""
        self._set_frozen(False)

    def _freezer(self) -> V2Branch | V1Branch:
        for branch in self._branches:
            if isinstance(branch, V2Branch) and not branch.threaded:
                return branch
            if isinstance(branch, V1Branch) and branch.carries("freezer"):
                return branch
        raise ControllerUnavailable(
            f"{self._path} cannot be frozen", path=self._path, hint="mount cgroup2, or the v1 freezer"
        )

    def _set_frozen(self, frozen: bool) -> None:
        branch = self._freezer()
        if not branch.freeze(frozen):
            raise ControllerUnavailable(
                f"this kernel cannot freeze {self._path}", path=self._path, hint="boot Linux 5.2 or newer"
            )

    def kill(self, timeout: float = 5.0, *, insist: bool = False) -> None:
        """Kill every process here and below with SIGKILL, and return when none is left.

        A double fork or a new session does not escape. No process outside is signalled. A call that fails is tried
        again for ``timeout`` seconds; one that the kernel refuses only with ``insist``, for a cgroup that this process
        made itself. Raises KernelError: ETIMEDOUT with the processes that do not end, EDEADLK if the calling process is
        inside, EINVAL for the root of a hierarchy or a threaded cgroup.
        """
        if self._path == "/" or self.threaded:
            raise KernelError(
                f"not killing {self._path}",
                path=self._path,
                hint="this would kill the whole machine or the server itself; kill a cgroup of processes instead",
            )
        deadline = time.monotonic() + timeout
        pause = 0.0005
        while True:
            late = time.monotonic() >= deadline
            try:
                if not (alive := self.processes(subtree=True)):
                    return
                if os.getpid() in alive:
                    raise KernelError(
                        f"the calling process is in {self._path}",
                        errno=errno.EDEADLK,
                        path=self._path,
                        hint="move the calling process out first",
                    )
                if late:
                    raise KernelError(
                        f"processes {alive} in {self._path} did not end within {timeout:g} s",
                        errno=errno.ETIMEDOUT,
                        path=self._path,
                        hint="they wait inside the kernel, or belong to another PID namespace",
                    )
                self.kill_once()
            except KernelError as error:
                if late or error.errno == errno.EDEADLK or (files.refused(error) and not insist):
                    raise  # otherwise the call failed, for want of descriptors or memory: try again
            time.sleep(pause)
            pause = min(pause * 2, 0.05)

    def terminate(self, timeout: float = 5.0) -> list[int]:
        """Send SIGTERM and SIGCONT once to every process here and below, and thaw them. Return the processes signalled.

        Does not wait for their end. A stopped or frozen process thus runs on, and handles SIGTERM. A process that is
        forked meanwhile is signalled too, for up to ``timeout`` seconds. No process outside is signalled, nor the
        calling one. Raises KernelError, after all others are signalled, for a process that could not be.
        """
        deadline = time.monotonic() + timeout
        signalled: set[int] = set()
        failed: KernelError | None = None
        while found := self._ids("cgroup.procs", True) - signalled - {0, os.getpid()}:
            try:
                self._signal(found, (signal.SIGTERM, signal.SIGCONT), deadline)
            except KernelError as error:
                failed = failed or error
            signalled |= found
            if time.monotonic() >= deadline:
                break
        with contextlib.suppress(KernelError):  # they are not frozen, or cannot be
            self.thaw()
        if failed is not None:
            raise failed
        return sorted(signalled)

    def kill_once(self) -> None:
        """Send SIGKILL to every process here and below, without waiting for their end. Raises KernelError."""
        for branch in self._branches:
            if isinstance(branch, V2Branch) and branch.kill():
                # cgroup.kill misses processes that are on the v1 side only.
                if others := self._ids("cgroup.procs", True, but=branch):
                    self._signal(others - branch.ids("cgroup.procs", subtree=True))
                return
        with contextlib.suppress(KernelError):
            # Prevent further forks, also on a kernel that cannot freeze.
            self.configure(Resources(pids_max=0))
        try:
            with contextlib.suppress(KernelError):
                self.freeze(timeout=0.5)
            self._signal(self._ids("cgroup.procs", True))
        finally:
            with contextlib.suppress(KernelError):
                self.thaw()

    def _signal(
        self, pids: set[int], numbers: tuple[int, ...] = (signal.SIGKILL,), deadline: float | None = None
    ) -> None:
        """Send signals to the processes ``pids`` that are still here. A pid reused outside is left alone.

        Stops at ``deadline`` (`time.monotonic`). Raises KernelError, the first one, after trying all.
        """
        failed: KernelError | None = None
        waiting = sorted(pids - {0, os.getpid()})
        while waiting and (deadline is None or time.monotonic() < deadline):
            failed = self._signal_some(waiting[-_SIGNALLED_AT_ONCE:], numbers) or failed
            del waiting[-_SIGNALLED_AT_ONCE:]
        if failed is not None:
            raise failed

    def _signal_some(self, pids: list[int], numbers: tuple[int, ...]) -> KernelError | None:
        """Send signals to some processes that are still here, after one look at who is here. Return the first error."""
        try:
            with self._opened(pids) as opened:
                return self._send(opened, numbers)
        except OSError as error:
            if len(pids) == 1:
                return None if files.gone(error) else files.failure(error, f"kill({pids[0]})")
        # There are not as many descriptors; none has been signalled yet.
        errors = [self._signal_some([pid], numbers) for pid in pids]
        return next((error for error in errors if error is not None), None)

    @contextlib.contextmanager
    def _opened(self, pids: list[int]) -> Iterator[dict[int, int]]:
        """Yield a descriptor of each process that is here, by its pid. Raises KernelError."""
        opened: dict[int, int] = {}
        try:
            for pid in pids:
                try:
                    opened[pid] = descriptors.of_process(pid)
                except KernelError as error:
                    if not files.gone(error):
                        raise
            here = self._ids("cgroup.procs", True) if opened else set()
            yield {pid: fd for pid, fd in opened.items() if pid in here}
        finally:
            for fd in opened.values():
                posix.close(fd)

    @staticmethod
    def _send(opened: dict[int, int], numbers: tuple[int, ...]) -> KernelError | None:
        """Send signals to processes. Return the first error, after trying all."""
        # Imported here: it is seldom needed, and loads much more.
        from rcon_plugins.kernel import process

        failed: KernelError | None = None
        for pid, fd in opened.items():
            try:
                for number in numbers:
                    process.kill(fd, pid, number=number)
            except OSError as error:
                if not files.gone(error):
                    failed = failed or files.failure(error, f"kill({pid})")
        return failed

    def delete(self, timeout: float = 2.0, *, recursive: bool | None = None) -> bool:
        """Remove the cgroup and all below it, deepest first. Return whether it is gone.

        No process may be in it: call :meth:`kill` first. EBUSY lingers after the last process has left, so this repeats
        for up to ``timeout`` seconds. In a shared cgroup the children stay unless ``recursive`` is True; this then
        returns False while the cgroup has children or threads. Raises KernelError.
        """
        if self._path == "/":
            raise KernelError("not deleting the root of a hierarchy", path="/")
        deep = not self.shared if recursive is None else recursive
        deadline = time.monotonic() + timeout
        pause = 0.0005
        while True:
            late = time.monotonic() >= deadline
            try:
                if self._remove_once(deep):
                    return True
                if not deep and (self.children() or self.threads()):
                    return False
                if late:
                    raise KernelError(
                        f"{self._path} is still busy after {timeout:g} s"
                        f" (processes: {self.processes(subtree=True)})",
                        errno=errno.EBUSY,
                        path=self._path,
                        hint="kill() it first",
                    )
            except KernelError as error:
                if late or files.refused(error):
                    raise
            time.sleep(pause)
            pause = min(pause * 2, 0.05)

    def _remove_once(self, deep: bool) -> bool:
        for branch in self._branches:
            if branch.remove():
                continue
            below = files.subtree(branch.directory)[:-1] if deep else []
            if not (below and all(map(files.remove_directory, below)) and branch.remove()):
                return False
        return True

    def delegate(self, uid: int, gid: int, *, shut: bool = False) -> None:
        """Let another user make cgroups here and move its own processes in and out.

        The user becomes the owner of the directory and of the files that move processes. The user does not own the
        limits, ``cgroup.kill`` or ``cgroup.freeze``. ``shut``: the user cannot move processes here from elsewhere, as
        always on v2. On v1 the user then can move no process here at all, only between the cgroups below. On v2 the
        user then can make at most `MOST_DESCENDANTS` cgroups below; v1 has no such limit. Raises KernelError.
        """
        for branch in self._branches:
            branch.delegate(uid, gid, shut=shut)
