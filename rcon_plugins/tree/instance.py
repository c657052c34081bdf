"""The cgroup tree of one server: ``<base>/rcon-<pid>-<starttime>/`` with ``host/`` and ``work/``.

Knows no policy: names and prepared cgroups come from above. See docs/kernel.md for the shape of the tree.
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Callable, Iterable

from rcon_plugins import systemd
from rcon_plugins.errors import KernelError
from rcon_plugins.kernel.cgroup import Cgroup, Entrance, Hierarchy, files, find_base, mounts, owner, v2
from rcon_plugins.kernel.cgroup.delegation import own_cgroup, remove_root_base
from rcon_plugins.kernel.cgroup.names import INSTANCE_NAME

#: How long processes in a host/, which are ending in most cases, are waited for.
_HOST_SECONDS = 1.0
#: How often to begin again because another server's end took the base away.
_ATTEMPTS = 20


class Instance:
    """The cgroup tree of one server. A child inherits it by ``fork``, whatever user it becomes.

    Made by :meth:`create` in the process that will :meth:`close` it. ``hierarchy`` is narrowed to the
    controllers that ``base`` has. ``locks`` is the fd of an empty file in memory that all processes of the
    server share, for ``fcntl(2)`` record locks.
    """

    def __init__(self, hierarchy: Hierarchy, base: str, name: str, user: tuple[int, int] | None) -> None:
        self.hierarchy = hierarchy
        self.base = base
        self.user = user
        self._creator = os.getpid()
        self._root = hierarchy.cgroup(f"{base.rstrip('/')}/{name}")
        self._work = self._root.child("work", shared=True)
        self._host = self._root.child("host", shared=True)
        #: Our own cgroup is the base: it has to be left before it can pass controllers on.
        self._in_base = hierarchy.layout == "v2" and own_cgroup(hierarchy) == base
        #: The directories that adopt() took this process from, one for each of host/.
        self._origins: list[str] | None = None
        self.locks = os.memfd_create("rcon-locks", os.MFD_CLOEXEC)

    @classmethod
    def create(
        cls, hierarchy: Hierarchy, base: str | None = None, owner: tuple[int, int] | None = None
    ) -> Instance:
        """Find the base, remove what dead owners left there, and make the tree of the calling process.

        ``base`` is the setting, ``owner`` the (uid, gid) that workers will have; the tree is delegated to
        it. Raises DelegationError with the exact remedy, KernelError.
        """
        for _ in range(_ATTEMPTS):
            found = find_base(hierarchy, base, systemd.enter_scope)
            try:
                return cls._create_in(hierarchy.narrowed(found), found, owner)
            except KernelError as error:
                if error.errno != errno.ENOENT:
                    raise
                last = error
        raise last

    @classmethod
    def _create_in(cls, hierarchy: Hierarchy, base: str, user: tuple[int, int] | None) -> Instance:
        collect(hierarchy, base)
        taken = hierarchy.cgroup(base).children()
        first = name = f"rcon-{os.getpid()}-{owner.start_time(os.getpid())}"
        number = 1
        while name in taken:
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
        if self._in_base and self._origins is None:
            # No controllers before the base is empty: adopt() goes on from here.
            self.hierarchy.cgroup(self._host.path, controllers=frozenset()).create()
            return
        for cgroup in (self._root, self._host, self._work):
            cgroup.create()
            if self.user is not None:
                cgroup.delegate(*self.user)

    @property
    def needs_adoption(self) -> bool:
        """Whether :meth:`adopt` has to be called before anything can enter a cgroup of this tree.

        Our own cgroup is the base; or the workers are another user, who on v2 (and the v2 side of a hybrid)
        may only move processes inside of what was delegated.
        """
        return self._in_base or (self.user is not None and self.hierarchy.unified is not None)

    @property
    def path(self) -> str:
        """The path of the tree, for people."""
        return self._root.path

    @property
    def work(self) -> Cgroup:
        """``work/``: all that is confined in processes."""
        return self._work

    @property
    def host(self) -> Cgroup:
        """``host/``: the server's own processes, and the domain of the threaded cgroups."""
        return self._host

    def together(self, name: str) -> Cgroup:
        """``work/<name>``: the limits of all the work of one name. ValueError for what is no name."""
        return self._work.child(name, shared=True)

    def leaf(self, name: str, leaf: str) -> Cgroup:
        """``work/<name>/<leaf>``: the place of one executor process. ValueError for what is no name."""
        return self.together(name).child(leaf)

    def taken(self, name: str) -> Cgroup:
        """``taken/<name>``: running processes that were taken from elsewhere. ValueError for what is no name."""
        return self._root.child("taken", shared=True).child(name)

    def threaded(self, name: str) -> Cgroup:
        """``host/<name>``, to be entered by threads. On v2 the process has to be adopted first.

        ValueError for what is no name.
        """
        cgroup = self._host.child(name, shared=True)
        cgroup.become_threaded()
        return cgroup

    # -- the server's own processes -----------------------------------------------------------

    def adopt(self) -> None:
        """Move the calling process, all its threads, into ``host/`` in every hierarchy.

        Off the hot path; children forked later are born there. Again is harmless. Raises KernelError.
        """
        if self._origins is not None:
            return
        self._origins = self._whereabouts()
        self._host.attach(os.getpid())
        if self._in_base:
            self._make()

    def release(self) -> None:
        """Put the calling process back to where :meth:`adopt` took it from. Raises KernelError."""
        if self._origins is None:
            return
        if self._in_base:
            if os.getpid() != self._creator:
                raise KernelError(
                    f"{self.base} passes controllers on, so that no process can go back to it",
                    errno=errno.EBUSY,
                    path=self.base,
                    hint="its server can, when it ends",
                )
            self._pass_nothing_on()
        origins, self._origins = self._origins, None
        for directory in origins:
            files.write_patiently(directory, "cgroup.procs", str(os.getpid()))

    def _whereabouts(self) -> list[str]:
        own = mounts.parse_membership(files.read_own("cgroup"))
        found = []
        for mount in self._host.mounts:
            path = mounts.membership(mount, own)
            if path is None:
                raise KernelError(
                    f"this process is outside of what {mount.path} shows",
                    path=mount.path,
                    hint="start the server inside of its cgroup namespace",
                )
            found.append(mount.directory(path))
        return found

    def _pass_nothing_on(self) -> None:
        # The base cannot have processes while it passes controllers on, nor stop while its children do.
        for directory in (*self._work.directories, *self._host.directories, *self._root.directories):
            if files.is_directory(directory):
                v2.disable_all(directory)
        v2.disable_all(self.hierarchy.mounts[-1].directory(self.base))

    def exit(self, controllers: Iterable[str] | None = None) -> Entrance:
        """The way out of threaded cgroups: to ``host/``, or, not adopted, to where this process is.

        ``controllers`` as for :meth:`Cgroup.entrance`. Call it in a thread that has not entered one.
        Raises KernelError.
        """
        return self._host.entrance(controllers, None if self._origins is not None else self._home())

    def _home(self) -> dict[str, str]:
        """By mount, the cgroup of the calling thread."""
        own = mounts.parse_membership(files.read_own("cgroup", thread=True))
        return {mount.path: mounts.membership(mount, own) or "/" for mount in self.hierarchy.mounts}

    # -- the end ------------------------------------------------------------------------------

    def sweep(self, prefix: str, timeout: float = 5.0) -> None:
        """End and remove all leaves, of all names, that begin with ``prefix``, then empty names.

        Used with ``"<pid of a worker>-"``. Goes on after an error and raises the first KernelError.
        """
        if not prefix:
            raise ValueError("an empty prefix would end the work of everybody: close() does that")
        self._sweep(lambda leaf: leaf.startswith(prefix), timeout)

    def end_orphans(self, timeout: float = 5.0) -> None:
        """End what still runs for processes of the server that are gone: their fork servers do, in their own time.

        So for the work of other servers with the same base that are gone. Returns when nothing of it runs. Raises
        KernelError where that does not come true within ``timeout`` seconds.
        """
        deadline = time.monotonic() + timeout
        while orphans := [
            *filter(self._is_orphaned, self._leaves()),
            *_work_of_the_dead(self.hierarchy, self.base),
        ]:
            for leaf in orphans:
                leaf.kill_once()
            if time.monotonic() > deadline:
                raise KernelError(
                    "what a process that is gone left does not end", errno=errno.EBUSY, path=orphans[0].path
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
    def _is_orphaned(leaf: Cgroup) -> bool:
        pid = leaf.path.rpartition("/")[2].partition("-")[0]
        return pid.isdigit() and owner.start_time(int(pid)) is None and bool(leaf.processes(subtree=True))

    def _sweep(self, wanted: Callable[[str], bool], timeout: float) -> None:
        failed: KernelError | None = None
        for name in self._work.children():
            group = self.hierarchy.cgroup(f"{self._work.path}/{name}", shared=True)
            for leaf in filter(wanted, group.children()):
                try:
                    cgroup = self.hierarchy.cgroup(f"{group.path}/{leaf}")
                    cgroup.kill(timeout)
                    cgroup.delete()
                except KernelError as error:
                    failed = failed or error
            try:
                group.delete()
            except KernelError as error:
                failed = failed or error
        if failed is not None:
            raise failed

    def close(self, timeout: float = 5.0) -> bool:
        """End all work, put the calling process back and remove the tree; whether it is gone.

        It is not where other processes of the server are still in ``host/``: these are never killed, and
        the next start removes what is left. Does nothing in any other process than the one that made the
        tree. Raises KernelError.
        """
        if os.getpid() != self._creator:
            return False
        if self.locks >= 0:
            os.close(self.locks)
            self.locks = -1
        self._work.kill(timeout)
        self._work.delete(recursive=True)
        self.release()
        if _processes_leave(self._host):
            return False
        self._host.delete(recursive=True)
        if self._root.child("taken").processes(subtree=True):
            return False
        gone = self._root.delete(recursive=True)
        if gone:
            remove_root_base(self.hierarchy, self.base)
        return gone


def collect(hierarchy: Hierarchy, base: str) -> list[str]:
    """Remove what instances below ``base`` left whose owner is dead; one sentence for each.

    What runs in their ``work/`` is killed. What runs in their ``host/``, a server's own processes, never:
    it gets a second to end, then the instance is left for the next time. Nor what is in their ``taken/``: it is put
    back to where it was. Everything else below ``base`` is left alone. Raises KernelError only where ``base``
    cannot be read.
    """
    report = []
    for name in hierarchy.cgroup(base).children():
        match = INSTANCE_NAME.fullmatch(name)
        if match and not owner.lives(int(match[1]), int(match[2])):
            try:
                done = _collect_one(hierarchy, f"{base.rstrip('/')}/{name}")
                report.append(f"{name}: {done}")
            except KernelError as error:
                report.append(f"{name}: left for the next time: {error}")
    return report


def _work_of_the_dead(hierarchy: Hierarchy, base: str) -> list[Cgroup]:
    """``work/`` of each instance below ``base`` whose owner is dead and in which something runs still."""
    found = []
    for name in hierarchy.cgroup(base).children():
        match = INSTANCE_NAME.fullmatch(name)
        if match and not owner.lives(int(match[1]), int(match[2])):
            work = hierarchy.cgroup(f"{base.rstrip('/')}/{name}/work")
            running = work.processes(subtree=True)
            if running and 0 not in running:  # 0 is one of a PID namespace that cannot be seen from here
                found.append(work)
    return found


def _collect_one(hierarchy: Hierarchy, path: str) -> str:
    root = hierarchy.cgroup(path)
    work, host = hierarchy.cgroup(f"{path}/work"), hierarchy.cgroup(f"{path}/host")
    if has_unseen(hierarchy, path):
        return UNSEEN
    work.kill()
    work.delete()
    if (uid := stranger_in_taken(hierarchy, path)) is not None:
        return taken_by(uid)
    if staying := give_back(hierarchy, path):
        return f"left for the next time: processes {staying} that were taken cannot be put back"
    staying = _processes_leave(host)
    if staying:
        return f"left for the next time: processes {staying} of its server still run"
    host.delete()
    root.delete()
    return "removed"


#: What becomes of a tree that `has_unseen`.
UNSEEN = "left alone: it has processes of a PID namespace that cannot be seen from here"


def has_unseen(hierarchy: Hierarchy, path: str) -> bool:
    """Whether there are processes in the instance at ``path`` that have no number here. Raises KernelError."""
    return 0 in hierarchy.cgroup(path).processes(subtree=True)


def taken_by(uid: int) -> str:
    """What becomes of a tree with processes of another user in its ``taken/``."""
    return f"left alone: what is in taken/ is of uid {uid}, who can say where it was: rcon gc as that user"


def stranger_in_taken(hierarchy: Hierarchy, path: str) -> int | None:
    """The uid of another user whose processes are in ``taken/`` of the instance at ``path``; None where there are none.

    They are not put back: see :func:`~rcon_plugins.tree.origins.stranger`. Raises KernelError.
    """
    taken = hierarchy.cgroup(f"{path}/taken")
    if not taken.processes(subtree=True):
        return None
    from rcon_plugins.tree import origins

    return origins.stranger(taken)


def give_back(hierarchy: Hierarchy, path: str) -> list[int]:
    """Put what is in ``taken/`` of the instance at ``path`` back to where it was; those that stay. KernelError."""
    taken = hierarchy.cgroup(f"{path}/taken")
    if not any(files.is_directory(directory) for directory in taken.directories):
        return []
    from rcon_plugins.tree import origins

    instance = path.rpartition("/")[2]
    staying = origins.put_back(taken, origins.load(instance))
    if not staying:
        taken.delete()
        origins.forget(instance)
    return staying


def _processes_leave(host: Cgroup) -> list[int]:
    """Wait a moment for the processes in ``host``; those that stay."""
    deadline = time.monotonic() + _HOST_SECONDS
    while staying := host.processes(subtree=True):
        if time.monotonic() >= deadline:
            break
        time.sleep(0.01)
    return staying
