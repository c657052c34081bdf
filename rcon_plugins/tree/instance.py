"""Make, use and remove the cgroup tree of one server: ``<base>/rcon-<pid>-<starttime>/`` with ``host/`` and ``work/``.

The module knows no policy: its callers choose the names and the limits. docs/reference/kernel.md shows the tree.
"""

from __future__ import annotations

import contextlib
import errno
import os
import posix
import time
from collections.abc import Callable, Iterable

from rcon_plugins.errors import KernelError
from rcon_plugins.kernel import descriptors, files, proc
from rcon_plugins.kernel.cgroup import Cgroup, Entrance, Hierarchy, mounts, v2
from rcon_plugins.tree import systemd
from rcon_plugins.tree.base import find_base, own_cgroup, remove_root_base
from rcon_plugins.tree.garbage import collect, running_work, wait_until_empty
from rcon_plugins.tree.owner import INSTANCE_NAME, Owner

_NOT_ALLOWED = (errno.EACCES, errno.EPERM)
#: The most attempts to make the tree while other servers end and remove the base.
_ATTEMPTS = 20


class Instance:
    """The cgroup tree of one server. A child inherits it by ``fork``, also if it changes its user.

    `create` makes it, in the process that must `close` it. ``hierarchy`` is narrowed to the controllers that ``base``
    has. ``locks`` is the descriptor of an empty file in memory, which all processes of the server share for the record
    locks of `rcon_plugins.tree.locks`.
    """

    def __init__(self, hierarchy: Hierarchy, base: str, name: str, user: tuple[int, int] | None) -> None:
        self.hierarchy = hierarchy
        self.base = base
        self.user = user
        self._creator = os.getpid()
        self._root = hierarchy.cgroup(f"{base.rstrip('/')}/{name}")
        self._work = self._root.child("work", shared=True)
        self._host = self._root.child("host", shared=True)
        #: Whether the base is this process's own cgroup. The process must then leave it: before that, the base cannot
        #: pass controllers on.
        self._in_base = hierarchy.layout == "v2" and own_cgroup(hierarchy) == base
        #: The directories that adopt() took this process from, one for each of host/.
        self._previous: list[str] | None = None
        self.locks = descriptors.memory_file("rcon-locks")

    @classmethod
    def create(
        cls, hierarchy: Hierarchy, base: str | None = None, owner: tuple[int, int] | None = None
    ) -> Instance:
        """Find the base, remove the trees of dead owners there, and make the tree of the calling process.

        ``base`` is the user's setting. ``owner`` is the (uid, gid) of the workers, who may then write the tree. Raises
        `DelegationError` with the exact remedy, and `KernelError`.
        """
        for _ in range(_ATTEMPTS):
            try:
                found = find_base(hierarchy, base, systemd.enter_scope)
                return cls._create_in(hierarchy.narrowed(found), found, owner)
            except KernelError as error:
                # Another server that ended may have removed the base: ENODEV if a file in it was open already.
                if not files.gone(error):
                    raise
                last = error
        raise last

    @classmethod
    def _create_in(cls, hierarchy: Hierarchy, base: str, user: tuple[int, int] | None) -> Instance:
        collect(hierarchy, base)
        existing = hierarchy.cgroup(base).children()
        first = name = Owner.here().instance_name
        number = 1
        while name in existing:
            number += 1
            name = f"{first}-{number}"
        instance = cls(hierarchy, base, name, user)
        try:
            instance._make()
        except BaseException:
            with contextlib.suppress(KernelError):
                instance.close()
            raise
        return instance

    def _make(self) -> None:
        if self._in_base and self._previous is None:
            # The base can pass no controllers on until it is empty: adopt() continues from here.
            self.hierarchy.cgroup(self._host.path, controllers=frozenset()).create()
            return
        for cgroup in (self._root, self._host, self._work):
            cgroup.create()
            if self.user is not None:
                cgroup.delegate(*self.user)

    @property
    def needs_adoption(self) -> bool:
        """Whether `adopt` must be called before any process can enter a cgroup of this tree.

        True if the base is this process's own cgroup. Also true if the workers have another user: on v2 (and the v2
        side of a hybrid) that user may only move processes within the delegated tree.
        """
        return self._in_base or (self.user is not None and self.hierarchy.unified is not None)

    def threads_need_adoption(self) -> bool:
        """Return whether `adopt` must be called before threads can enter cgroups of this tree and come back.

        v2 moves threads only within one domain. v1 has no domains, but there neither an ordinary user nor workers with
        another user may return to the cgroup that root chose for the server. Raises `KernelError`.
        """
        return (
            self.needs_adoption
            or self.hierarchy.layout == "v2"
            or self.user is not None
            or not self._may_come_back()
        )

    def _may_come_back(self) -> bool:
        try:
            with self.exit():
                return True
        except KernelError as error:
            if error.errno not in _NOT_ALLOWED:
                raise
            return False

    @property
    def path(self) -> str:
        """The path of the tree, for messages."""
        return self._root.path

    @property
    def work(self) -> Cgroup:
        """The cgroup ``work/`` of all executor processes."""
        return self._work

    @property
    def host(self) -> Cgroup:
        """The cgroup ``host/`` of the server's own processes, which is also the domain of the threaded cgroups."""
        return self._host

    def policy_cgroup(self, name: str) -> Cgroup:
        """Return ``work/<name>``: the cgroup of one confinement. Raises ValueError for an invalid name."""
        return self._work.child(name, shared=True)

    def executor_cgroup(self, name: str, leaf: str) -> Cgroup:
        """Return ``work/<name>/<leaf>``: the cgroup of one executor process. Raises ValueError for an invalid name."""
        return self.policy_cgroup(name).child(leaf)

    def attached(self, name: str) -> Cgroup:
        """Return ``attached/<name>``, a group for attached processes. Raises ValueError for an invalid name."""
        return self._root.child("attached", shared=True).child(name)

    def threaded(self, name: str) -> Cgroup:
        """Return ``host/<name>``, a cgroup for threads. On v2 call `adopt` first.

        Raises ValueError for an invalid name.
        """
        cgroup = self._host.child(name, shared=True)
        cgroup.become_threaded()
        return cgroup

    # -- the server's own processes -----------------------------------------------------------

    def adopt(self) -> None:
        """Move the calling process, with all its threads, into ``host/`` in every hierarchy.

        Takes milliseconds. Children forked later start there. Does nothing when called again. Raises `KernelError`.
        """
        if self._previous is not None:
            return
        self._previous = self._whereabouts()
        self._host.attach(os.getpid())
        if self._in_base:
            self._make()

    def release(self) -> None:
        """Move the calling process back to the cgroups that :meth:`adopt` took it from. Raises KernelError.

        On v1, if this user may not, move it to the base.
        """
        if self._previous is None:
            return
        if self._in_base:
            if os.getpid() != self._creator:
                raise KernelError(
                    f"{self.base} passes controllers on, so no process can move back into it",
                    errno=errno.EBUSY,
                    path=self.base,
                    hint="only the process that made the instance can undo this",
                )
            self._pass_nothing_on()
        previous, self._previous = self._previous, None
        for directory, mount in zip(previous, self._host.mounts, strict=True):
            try:
                files.write_patiently(directory, "cgroup.procs", str(os.getpid()))
            except KernelError as error:
                if error.errno not in _NOT_ALLOWED or mount.version == 2:
                    raise
                files.write_patiently(mount.directory(self.base), "cgroup.procs", str(os.getpid()))

    def _whereabouts(self) -> list[str]:
        own = mounts.parse_membership(files.read_own("cgroup"))
        found = []
        for mount in self._host.mounts:
            path = mounts.membership(mount, own)
            if path is None:
                raise KernelError(
                    f"{mount.path} does not show the cgroup of this process",
                    path=mount.path,
                    hint="start the server inside the cgroup namespace of that mount",
                )
            found.append(mount.directory(path))
        return found

    def _pass_nothing_on(self) -> None:
        # The base cannot have processes while it passes controllers on, and cannot stop that while its children do it.
        for directory in (*self._work.directories, *self._host.directories, *self._root.directories):
            if files.is_directory(directory):
                v2.disable_all(directory)
        v2.disable_all(self.hierarchy.mounts[-1].directory(self.base))

    def exit(self, controllers: Iterable[str] | None = None) -> Entrance:
        """Return the entrance out of threaded cgroups: to ``host/`` if adopted, otherwise to the thread's own cgroup.

        ``controllers`` is as for `Cgroup.entrance`. Call it in a thread that has not entered a threaded cgroup. Raises
        `KernelError`.
        """
        return self._host.entrance(controllers, None if self._previous is not None else self._home())

    def _home(self) -> dict[str, str]:
        """Return the cgroup of the calling thread, by mount."""
        own = mounts.parse_membership(files.read_own("cgroup", thread=True))
        return {mount.path: mounts.membership(mount, own) or "/" for mount in self.hierarchy.mounts}

    # -- cleaning up --------------------------------------------------------------------------

    def sweep(self, prefix: str, timeout: float = 5.0) -> None:
        """Kill and remove all executor cgroups whose name begins with ``prefix``, then empty confinements.

        ``prefix`` is for example ``"<pid of a worker>-"``. Continues after an error; raises the first `KernelError`.
        """
        if not prefix:
            raise ValueError("an empty prefix would kill all work: use close()")
        self._sweep(lambda leaf: leaf.startswith(prefix), timeout)

    def sweep_threaded(self, most: int) -> None:
        """Remove the empty cgroups in ``host/``, which killed processes left, if there are more than ``most``.

        One that a living process keeps is made again when a thread enters it. Leaves what the kernel does not remove.
        """
        names = [name for name in self._host.children() if not INSTANCE_NAME.fullmatch(name)]
        if len(names) <= most:
            return
        for name in names:
            with contextlib.suppress(KernelError):  # busy, or tried again at the next start
                self.threaded(name).delete(timeout=0)

    def sweep_dead(self, timeout: float = 1.0) -> None:
        """Remove the executor cgroups of server processes that were killed together with their fork servers.

        A fork server that lives does it itself. Kills what runs there. Leaves what the kernel does not remove within
        ``timeout`` seconds to the next start.
        """
        deadline = time.monotonic() + timeout  # for all of them
        for leaf in filter(self._is_of_the_dead, self._leaves()):
            group = self.hierarchy.cgroup(leaf.path.rpartition("/")[0], shared=True)
            with contextlib.suppress(KernelError):  # its fork server may be removing it at this moment
                _kill_and_delete(leaf, deadline)
                group.delete(timeout=0)

    def end_orphans(self, timeout: float = 5.0) -> None:
        """Kill the executor processes of dead server processes, without waiting for their fork servers to do it.

        Also kills those of dead servers with the same base. Returns when all have ended. Raises `KernelError` if one
        still runs after ``timeout`` seconds.
        """
        deadline = time.monotonic() + timeout
        while orphans := [
            *(leaf for leaf in self._leaves() if self._is_of_the_dead(leaf) and leaf.has_processes()),
            *running_work(self.hierarchy, self.base),
        ]:
            for leaf in orphans:
                leaf.kill_once()
            if time.monotonic() > deadline:
                raise KernelError(
                    "processes of a dead server process do not end", errno=errno.EBUSY, path=orphans[0].path
                )
            time.sleep(0.005)

    def _leaves(self) -> list[Cgroup]:
        groups = [f"{self._work.path}/{name}" for name in self._work.children()]
        return [
            self.hierarchy.cgroup(f"{group}/{leaf}")
            for group in groups
            for leaf in self.hierarchy.cgroup(group, shared=True).children()
        ]

    @staticmethod
    def _is_of_the_dead(leaf: Cgroup) -> bool:
        """Return whether the server process that made a leaf is gone."""
        pid = leaf.path.rpartition("/")[2].partition("-")[0]
        return pid.isdigit() and proc.start_time(int(pid)) is None

    def _sweep(self, wanted: Callable[[str], bool], timeout: float) -> None:
        failed: KernelError | None = None
        deadline = time.monotonic() + timeout  # for all of them: a failing call must not wait for each
        for name in self._work.children():
            group = self.hierarchy.cgroup(f"{self._work.path}/{name}", shared=True)
            try:
                for leaf in filter(wanted, group.children()):
                    try:
                        _kill_and_delete(self.hierarchy.cgroup(f"{group.path}/{leaf}"), deadline)
                    except KernelError as error:
                        failed = failed or error
                group.delete(max(0.0, min(2.0, deadline - time.monotonic())))
            except KernelError as error:
                failed = failed or error
        if failed is not None:
            raise failed

    def close(self, timeout: float = 5.0) -> bool:
        """Kill all executor processes, move the calling process back and remove the tree. Return whether it is gone.

        The tree stays while other processes of the server are in ``host/``, or attached processes in ``attached/``.
        These are never killed; the next start removes the tree. Does nothing except in the process that made the tree.
        Raises `KernelError`.
        """
        if os.getpid() != self._creator:
            return False
        if self.locks >= 0:
            posix.close(self.locks)
            self.locks = -1
        self._work.kill(timeout, insist=True)
        self._work.delete(recursive=True)
        self.release()
        if wait_until_empty(self._host):
            return False
        self._host.delete(recursive=True)
        if self._root.child("attached").has_processes():
            return False
        gone = self._root.delete(recursive=True)
        if gone:
            remove_root_base(self.hierarchy, self.base)
        return gone


def _kill_and_delete(leaf: Cgroup, deadline: float) -> None:
    """Kill all in an executor cgroup and remove it, until ``deadline`` (`time.monotonic`). Raises KernelError."""
    leaf.kill(max(0.0, deadline - time.monotonic()), insist=True)
    leaf.delete(max(0.0, min(2.0, deadline - time.monotonic())))
