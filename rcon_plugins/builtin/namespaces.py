"""Private memory: mounts and shared memory of its own for each executor process, where the server may give them."""

from __future__ import annotations

from rcon_plugins.hookspecs import hookimpl
from rcon_plugins.kernel import namespaces
from rcon_plugins.kernel.capability import CAP_SYS_ADMIN, raise_capability, read_state
from rcon_plugins.kernel.cgroup import mount_table
from rcon_plugins.settings.policy import Policy
from rcon_plugins.tree import runtime


class Namespaces:
    """The plugin of the namespaces. The fork server prepares what it can, because that takes most of the time."""

    def __init__(self) -> None:
        #: The mount table as it was last looked at, before this plugin changed it. Landlock uses it too.
        self.table = ""
        #: The directories that got a mount of this process's own.
        self.private: tuple[str, ...] = ()
        self._view: namespaces.View | None = None
        #: Whether this process can give namespaces, and must raise the capability for it. None: not known yet.
        self._possible: bool | None = None
        self._must_raise = False
        #: Of the fork server alone.
        self._changes: namespaces.MountChanges | None = None

    @hookimpl(trylast=True)
    def rcon_prepare(self) -> None:
        """Look at the mounts if they have changed. Find out once whether this process can give namespaces."""
        if self._changes is None:
            self._changes = namespaces.MountChanges()
        elif not self._changes.happened():
            return
        self._look()

    @hookimpl(trylast=True)
    def rcon_drop(self, policy: Policy, target: str) -> None:
        """Enter a mount namespace with read-only cgroups, and with memory of its own unless the policy shares it.

        The folders in which servers count are hidden there.

        Do nothing where the server cannot do it: the policy's `Verdict` has a caveat then, or a refusal. Do nothing in
        a thread, which shares the mounts of the process.
        """
        if target == "thread":
            return
        self._look()  # a plugin may have mounted something
        if self._changes is not None:
            self._changes.close()
        if self._view is None:
            return
        if self._must_raise:
            raise_capability(CAP_SYS_ADMIN)
        is_private = policy.shared_memory != "server"
        namespaces.enter(self._view, private_memory=is_private, size=memory_size(policy))
        mounts = (*self._view.memory, *self._view.queues) if is_private else ()
        self.private = tuple(mount.path for mount in mounts)

    def _look(self) -> None:
        """Make the view again if a mount has changed."""
        table = mount_table()
        if table == self.table:
            return
        if self._possible is None:
            self._possible = namespaces.why_not() is None
            self._must_raise = CAP_SYS_ADMIN not in read_state().effective
        # Before Linux 6.2 Landlock does not forbid truncate(2), which would end a server that has mapped the file.
        self._view = namespaces.View.of(table, runtime.existing_folders()) if self._possible else None
        self.table = table


def memory_size(policy: Policy) -> int | None:
    """Return the most bytes of each private directory: as much as a unit of work may ever use of memory.

    None is the kernel's default, half of the memory. The size of an executor process stays what it was at its start.
    """
    memory = policy.each.memory or policy.memory
    if memory is None:
        return None
    return max(memory.most, policy.on_memory.up_to if policy.on_memory is not None else 0)
