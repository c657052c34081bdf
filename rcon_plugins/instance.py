"""The cgroup tree of one server: ``<base>/rcon-<pid>-<starttime>/`` with ``host/`` and ``work/``.

Knows no policy: names and prepared cgroups come from above. See docs/kernel.md for the shape of the tree.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import time
from collections.abc import Callable, Iterable

from rcon_plugins.errors import KernelError
from rcon_plugins.kernel.cgroup import Cgroup, Entrance, Hierarchy, find_base
from rcon_plugins.kernel.cgroup import files, mounts, v2
from rcon_plugins.kernel.cgroup.delegation import own_cgroup

_NAME = re.compile(r"rcon-([1-9][0-9]{0,9})-([0-9]{1,20})")
_DEAD = frozenset("ZXx")
#: How long processes in the host/ of a dead owner, which are ending in most cases, are waited for.
_HOST_SECONDS = 1.0
_LEAF_ATTEMPTS = 100


class Instance:
    """The cgroup tree of one server. It holds nothing open: a child inherits it by ``fork``.

    Made by :meth:`create` in the process that will :meth:`close` it.
    """

    def __init__(
        self, hierarchy: Hierarchy, base: str, name: str, owner: tuple[int, int] | None, adoption: bool
    ) -> None:
        self.hierarchy = hierarchy
        self.base = base
        self.owner = owner
        #: Whether :meth:`adopt` has to be called before anything is made: our own cgroup is the base.
        self.needs_adoption = adoption
        self._creator = os.getpid()
        self._root = hierarchy.cgroup(f"{base.rstrip('/')}/{name}")
        self._work = self._root.child("work", shared=True)
        self._host = self._root.child("host", shared=True)
        #: Where each branch of host/ took this process from: (directory, path).
        self._origins: list[str] | None = None

    @classmethod
    def create(
        cls, hierarchy: Hierarchy, base: str | None = None, owner: tuple[int, int] | None = None
    ) -> Instance:
        """Find the base, remove what dead owners left there, and make the tree of the calling process.

        ``base`` is the setting, ``owner`` the (uid, gid) that workers will have; the tree is delegated to
        it. Raises DelegationError with the exact remedy, KernelError.
        """
        found = find_base(hierarchy, base)
        narrowed = hierarchy.narrowed(found)
        collect(narrowed, found)
        pid = os.getpid()
        adoption = narrowed.layout == "v2" and own_cgroup(narrowed) == found
        instance = cls(narrowed, found, f"rcon-{pid}-{start_time(pid)}", owner, adoption)
        try:
            instance._make()
        except BaseException:
            with contextlib.suppress(KernelError):
                instance.close()
            raise
        return instance

    def _make(self) -> None:
        if self.needs_adoption and self._origins is None:
            # No controllers before the base is empty: adopt() goes on from here.
            self.hierarchy.cgroup(self._host.path, controllers=frozenset()).create()
            return
        for cgroup in (self._root, self._host, self._work):
            cgroup.create()
        # Children of these get all controllers, whoever makes them.
        if self.hierarchy.layout == "v2":
            v2.enable(self._work.directories[-1], self._work.controllers)
        if self.owner is not None:
            for cgroup in (self._root, self._host, self._work):
                cgroup.delegate(*self.owner)

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

    def threaded(self, name: str) -> Cgroup:
        """``host/<name>``, to be entered by threads. On v2 the process has to be adopted first.

        ValueError for what is no name.
        """
        cgroup = self._host.child(name)
        cgroup.become_threaded()
        return cgroup

    def make_leaf(
        self,
        name: str,
        leaf: str,
        together: Callable[[Cgroup], None],
        each: Callable[[Cgroup], None],
    ) -> Cgroup:
        """Make ``work/<name>/<leaf>`` with its limits in force: both callables write them.

        Safe beside other processes that make and remove leaves of the same name: another may remove
        ``work/<name>`` at any moment before there is a leaf in it, and the limits with it, so they are
        written again when the leaf holds it in place. Raises what the callables raise, KernelError.
        """
        group, cgroup = self.together(name), self.leaf(name, leaf)
        for attempt in range(_LEAF_ATTEMPTS):
            try:
                group.create()
                together(group)
                cgroup.create()
                together(group)
                # Again: what is made depends on the limits above (v1 IO).
                cgroup.create()
                each(cgroup)
            except KernelError as error:
                if error.errno not in (errno.ENOENT, errno.ENODEV) or attempt + 1 == _LEAF_ATTEMPTS:
                    raise
            else:
                return cgroup
        raise AssertionError  # pragma: no cover  # the last attempt raises or returns

    # -- the server's own processes -----------------------------------------------------------

    def adopt(self) -> None:
        """Move the calling process, all its threads, into ``host/`` in every hierarchy.

        Off the hot path; children forked later are born there. Again is harmless. Raises KernelError.
        """
        if self._origins is not None:
            return
        self._origins = self._whereabouts()
        self._host.attach(os.getpid())
        if self.needs_adoption:
            self._make()

    def release(self) -> None:
        """Put the calling process back to where :meth:`adopt` took it from. Raises KernelError."""
        origins, self._origins = self._origins, None
        if origins is None:
            return
        if self.needs_adoption:
            self._pass_nothing_on()
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
        self._work.kill(timeout)
        self._work.delete(recursive=True)
        self.release()
        if _processes_leave(self._host):
            return False
        self._host.delete(recursive=True)
        return self._root.delete(recursive=True)


def start_time(pid: int) -> int | None:
    """When a process started, in clock ticks since boot (``proc(5)``, stat, field 22); None: it is dead."""
    try:
        text = files.read_if_there(f"/proc/{pid}", "stat")
    except KernelError as error:
        if error.errno == errno.ESRCH:
            return None
        raise
    if text is None:
        return None
    # The name, field 2, may hold spaces and brackets.
    fields = text[text.rindex(")") + 2 :].split()
    return None if fields[0] in _DEAD else int(fields[19])


def collect(hierarchy: Hierarchy, base: str) -> list[str]:
    """Remove what instances below ``base`` left whose owner is dead; one sentence for each.

    What runs in their ``work/`` is killed. What runs in their ``host/``, a server's own processes, never:
    it gets a second to end, then the instance is left for the next time. Everything else below ``base``
    is left alone. Raises KernelError only where ``base`` cannot be read.
    """
    report = []
    for name in hierarchy.cgroup(base).children():
        match = _NAME.fullmatch(name)
        if match and not _is_alive(int(match[1]), int(match[2])):
            try:
                done = _collect_one(hierarchy, f"{base.rstrip('/')}/{name}")
                report.append(f"{name}: {done}")
            except KernelError as error:
                report.append(f"{name}: left for the next time: {error}")
    return report


def _collect_one(hierarchy: Hierarchy, path: str) -> str:
    root = hierarchy.cgroup(path)
    work, host = hierarchy.cgroup(f"{path}/work"), hierarchy.cgroup(f"{path}/host")
    if 0 in root.processes(subtree=True):
        return "left alone: it has processes of a PID namespace that cannot be seen from here"
    work.kill()
    work.delete()
    staying = _processes_leave(host)
    if staying:
        return f"left for the next time: processes {staying} of its server still run"
    host.delete()
    root.delete()
    return "removed"


def _processes_leave(host: Cgroup) -> list[int]:
    """Wait a moment for the processes in ``host``; those that stay."""
    deadline = time.monotonic() + _HOST_SECONDS
    while staying := host.processes(subtree=True):
        if time.monotonic() >= deadline:
            break
        time.sleep(0.01)
    return staying


def _is_alive(pid: int, started: int) -> bool:
    """Whether the owner named so lives, also in a PID namespace below ours, where it has other numbers."""
    if start_time(pid) == started:
        return True
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        with contextlib.suppress(KernelError):
            status = files.read_if_there(f"/proc/{entry}", "status") or ""
            inner = next((line for line in status.splitlines() if line.startswith("NSpid:")), "")
            if str(pid) in inner.split()[2:] and start_time(int(entry)) == started:
                return True
    return False
