"""A cgroup: make it, limit it, enter it, read it, freeze it, kill what is in it, remove it."""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Callable, Iterable, Mapping

from rcon_plugins.errors import ControllerUnavailable, KernelError
from rcon_plugins.kernel import files, proc
from rcon_plugins.kernel.cgroup import meter, v1, v2
from rcon_plugins.kernel.cgroup.branch import Branch, check_name
from rcon_plugins.kernel.cgroup.entrance import Entrance
from rcon_plugins.kernel.cgroup.meter import Meter, Reading
from rcon_plugins.kernel.cgroup.mounts import Mount
from rcon_plugins.kernel.cgroup.resources import Resources
from rcon_plugins.kernel.cgroup.v1 import V1Branch
from rcon_plugins.kernel.cgroup.v2 import V2Branch

#: How long create() goes on while others remove what it needs.
_CREATE_SECONDS = 5.0


class Cgroup:
    """A name in the cgroup tree, existing or not. It holds nothing open, and survives ``fork``.

    ``controllers`` are those whose limits can be set here and by which usage is accounted. Made by
    :meth:`Hierarchy.cgroup` and :meth:`child`.
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
        #: Several processes make and remove children here; delete() then leaves children alone.
        self.shared = shared
        self._use(controllers, threaded)

    def _use(self, controllers: frozenset[str], threaded: bool) -> None:
        self.controllers = controllers
        self.threaded = threaded
        self._branches = self._make_branches(self._path, controllers, threaded)

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
    def mounts(self) -> list[Mount]:
        """The hierarchies this cgroup uses, in the order of :attr:`directories`."""
        return [branch.mount for branch in self._branches]

    def become_threaded(self) -> None:
        """Take it for a cgroup of threads; nothing is made yet."""
        self._use(self.controllers, True)

    # -- the tree -----------------------------------------------------------------------------

    def child(self, name: str, *, shared: bool = False) -> Cgroup:
        """The cgroup ``name`` in this one; nothing is made. Raises ValueError for what is not a name."""
        path = f"{self._path.rstrip('/')}/{check_name(name)}"
        return Cgroup(path, self._make_branches, self.controllers, threaded=self.threaded, shared=shared)

    def children(self) -> list[str]:
        """The names of the cgroups in this one, in any of its hierarchies."""
        return sorted({name for branch in self._branches for name in files.subdirectories(branch.directory)})

    def exists(self) -> bool:
        """Whether the cgroup is there in all its hierarchies."""
        return all(branch.exists() for branch in self._branches)

    def create(self, threaded: bool | None = None, controllers: frozenset[str] | None = None) -> Cgroup:
        """Make the cgroup, and those above it that are missing; one that is there already is fine.

        ``threaded`` makes one that single threads can enter; the cgroup above becomes its domain.
        ``controllers`` restricts it to some of the hierarchy's. If another process removes a cgroup above
        meanwhile, that is made again, without limits: where others may do so, configure the one above
        after this returned, when it can no longer be removed, and before anybody enters.
        Raises KernelError, ControllerUnavailable. Returns itself.
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
        """Write limits; what is ``None`` stays as it is. May be done again, also while in use.

        Raises KernelError with path, value and hint, ControllerUnavailable where one cannot be set here.
        Limits written before the failing one stay.
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

    # -- who is in it -------------------------------------------------------------------------

    def attach(self, pid: int) -> None:
        """Move the process ``pid``, all its threads, in. Takes milliseconds. Raises KernelError."""
        if pid <= 0:
            raise ValueError(f"not a process: {pid}")
        for branch in self._branches:
            branch.attach(pid)

    def enter_process(self) -> None:
        """Move the calling process in; meant for one that has a single thread.

        Raises KernelError; the process may then be in some hierarchies and not in others, and must not
        run what the limits are for.
        """
        alone = proc.is_single_threaded()
        for branch in self._branches:
            branch.enter_process(alone=alone)

    def entrance(
        self, controllers: Iterable[str] | None = None, home: Mapping[str, str] | None = None
    ) -> Entrance:
        """Open the way in for threads (see :class:`Entrance`). The cgroup has to exist.

        On v1 a thread enters one hierarchy per controller, which costs a write each: ``controllers``
        leaves out what is not needed (``"cpu"`` alone then measures no CPU time unless ``"cpuacct"`` is
        named too, where that is a hierarchy of its own). Without it, all that act on threads. ``home``
        gives by mount point another cgroup instead of this one. Raises KernelError.
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
                # On hybrid the v2 side of a domain cgroup is not for threads.
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
        """The processes in this cgroup, or also of those below it; a threaded one lists none."""
        return sorted(self._ids("cgroup.procs", subtree))

    def threads(self, *, subtree: bool = False) -> list[int]:
        """The threads in this cgroup, or also of those below it."""
        return sorted(self._ids(None, subtree))

    def _ids(self, name: str | None, subtree: bool) -> set[int]:
        found: set[int] = set()
        for branch in self._branches:
            found |= branch.ids(name or branch.thread_file, subtree=subtree)
        return found

    # -- usage --------------------------------------------------------------------------------

    def meter(self, controllers: Iterable[str] | None = None) -> Meter:
        """Open the usage files (of these controllers only). The cgroup has to exist. KernelError."""
        wanted = self.controllers if controllers is None else frozenset(controllers)
        targets = []
        for branch in self._branches:
            table = meter.V2_FILES if isinstance(branch, V2Branch) else meter.V1_FILES
            if isinstance(branch, V2Branch) and len(self._branches) > 1 and not branch.controllers:
                continue
            if branch.entry_directory() != branch.directory:
                continue  # shares its parent's IO, see V1Branch
            for name, (controller, parser) in table.items():
                if controller in wanted and self._accounts(branch, name):
                    targets.append((branch.directory, name, parser))
        return Meter(targets)

    @staticmethod
    def _accounts(branch: Branch, name: str) -> bool:
        prefix = name.partition(".")[0]
        if isinstance(branch, V2Branch):
            return prefix == "cpu" or prefix in branch.controllers
        return prefix in branch.mount.controllers

    def read(self) -> Reading:
        """What this cgroup has used until now. Raises KernelError."""
        with self.meter() as opened:
            return opened.read()

    def open_oom_notice(self) -> int | None:
        """Return an eventfd that v1 signals before it kills for want of memory, here or above; see `v1.open_notice`.

        None on a kernel without such notices, and on v2: its counters include the cgroups below. v1 counts a kill in
        the cgroup of the process alone, which may be gone before it is read. Raises KernelError.
        """
        for branch in self._branches:
            if isinstance(branch, V1Branch) and branch.carries("memory"):
                try:
                    return v1.open_notice(branch.directory, "memory.oom_control")
                except KernelError as error:
                    # A realtime kernel (since 5.18) has none.
                    if error.errno in (errno.EOPNOTSUPP, errno.ENOENT):
                        return None
                    raise
        return None

    # -- stopping and ending ------------------------------------------------------------------

    def freeze(self, timeout: float = 5.0) -> None:
        """Stop all processes here and below, and wait until they are.

        Raises KernelError (ETIMEDOUT; they are let go again) and ControllerUnavailable.
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
                f"this kernel cannot freeze {self._path}", path=self._path, hint="Linux 5.2 can"
            )

    def kill(self, timeout: float = 5.0) -> None:
        """End every process here and below with SIGKILL, and return when none is left.

        Double forks and new sessions are found too; nothing outside is signalled. Raises KernelError:
        ETIMEDOUT with the processes that do not die, EDEADLK where the caller itself is inside, EINVAL for
        the root of a hierarchy or a threaded cgroup.
        """
        if self._path == "/" or self.threaded:
            raise KernelError(
                f"not killing {self._path}",
                path=self._path,
                hint="a whole machine or the server's own threads would go; kill a cgroup of processes",
            )
        deadline = time.monotonic() + timeout
        pause = 0.0005
        while alive := self.processes(subtree=True):
            if os.getpid() in alive:
                raise KernelError(
                    f"the calling process is in {self._path}",
                    errno=errno.EDEADLK,
                    path=self._path,
                    hint="leave it first",
                )
            if time.monotonic() >= deadline:
                raise KernelError(
                    f"processes {alive} in {self._path} did not end within {timeout:g} s",
                    errno=errno.ETIMEDOUT,
                    path=self._path,
                    hint="each of them waits inside the kernel, or belongs to another PID namespace",
                )
            self.kill_once()
            time.sleep(pause)
            pause = min(pause * 2, 0.05)

    def kill_once(self) -> None:
        """Send SIGKILL to every process here and below, and return: `kill` without the wait. KernelError."""
        for branch in self._branches:
            if isinstance(branch, V2Branch) and branch.kill():
                # Whoever is on the v1 side only is left for the walk.
                self._signal(self._ids("cgroup.procs", True) - branch.ids("cgroup.procs", subtree=True))
                return
        with contextlib.suppress(KernelError):
            # No more forks from now on, also where nothing can be frozen.
            self.configure(Resources(pids_max=0))
        try:
            with contextlib.suppress(KernelError):
                self.freeze(timeout=0.5)
            self._signal(self._ids("cgroup.procs", True))
        finally:
            with contextlib.suppress(KernelError):
                self.thaw()

    def _signal(self, pids: set[int]) -> None:
        """SIGKILL to those of ``pids`` that are here; a number that was taken over by another is not."""
        for pid in pids - {0, os.getpid()}:
            try:
                fd = os.pidfd_open(pid)
            except OSError:
                continue
            try:
                if pid in self._ids("cgroup.procs", True):
                    # Imported here: it is seldom needed, and knows much more than that.
                    from rcon_plugins.kernel import process

                    process.kill(fd, pid)
            finally:
                os.close(fd)

    def delete(self, timeout: float = 2.0, *, recursive: bool | None = None) -> bool:
        """Remove the cgroup and all below it, deepest first; whether it is gone now.

        Nothing may run in it: :meth:`kill` first. EBUSY, which lingers after the last process, is waited
        out for ``timeout`` seconds. Of a shared cgroup children are left alone unless ``recursive`` is True,
        and the answer is a quiet False while somebody uses it. Raises KernelError.
        """
        if self._path == "/":
            raise KernelError("not deleting the root of a hierarchy", path="/")
        deep = not self.shared if recursive is None else recursive
        deadline = time.monotonic() + timeout
        pause = 0.0005
        while not self._remove_once(deep):
            if not deep and (self.children() or self.threads()):
                return False
            if time.monotonic() >= deadline:
                raise KernelError(
                    f"{self._path} is still busy after {timeout:g} s"
                    f" (processes: {self.processes(subtree=True)})",
                    errno=errno.EBUSY,
                    path=self._path,
                    hint="kill() it first",
                )
            time.sleep(pause)
            pause = min(pause * 2, 0.05)
        return True

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

        The directory and the files that processes are moved with change hands; the limits do not, nor do
        ``cgroup.kill`` and ``cgroup.freeze``. ``shut``: nothing that user has elsewhere can come in, as always on v2;
        on v1 nothing can then be moved here at all, only between the cgroups made below. Raises KernelError.
        """
        for branch in self._branches:
            branch.delegate(uid, gid, shut=shut)
