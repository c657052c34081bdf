"""Landlock: keep executor processes away from the cgroup files and from other processes, whatever their user."""

from __future__ import annotations

import contextlib

from rcon_plugins.builtin.namespaces import Namespaces
from rcon_plugins.errors import CapabilityError, KernelError
from rcon_plugins.hookspecs import hookimpl
from rcon_plugins.kernel import landlock
from rcon_plugins.kernel.capability import set_no_new_privs
from rcon_plugins.kernel.cgroup import mount_points
from rcon_plugins.settings.policy import Policy
from rcon_plugins.tree import runtime

#: After so many new processes the fork server makes the ruleset again: each may have added rules of its own to it.
_MOST_USES = 64


class Landlock:
    """The Landlock plugin. The fork server prepares the ruleset, because that takes most of the time.

    It must come after the `namespaces` plugin: a process with a layer of Landlock cannot mount anything.
    """

    def __init__(self, namespaces: Namespaces) -> None:
        self._namespaces = namespaces
        self._wall: landlock.Wall | None = None
        #: The ABI that the verdict on the policies found. What was there at the start must be there in every drop.
        self._abi = landlock.abi()
        #: The mount table when the ruleset was made.
        self._mounts = ""
        self._uses = 0

    @hookimpl(trylast=True)
    def rcon_prepare(self) -> None:
        """Make the ruleset. Make it again when the mounts have changed."""
        if not self._abi:
            return
        self._uses += 1
        if self._has_wall() and self._uses <= _MOST_USES:
            return
        # On an error, `rcon_drop` in the new process tries again and reports the reason.
        with contextlib.suppress(KernelError, CapabilityError):
            self._make()

    @hookimpl(trylast=True)
    def rcon_drop(self, policy: Policy, target: str) -> None:
        """Forbid the process to write below the cgroup mounts and to signal or trace processes outside of its group.

        Without this, code that runs as the server's user could write the files that limit it, and those in which the
        server counts. Do nothing if the kernel has no Landlock: the policy's `Verdict` has a caveat then. Do nothing in
        a thread, which cannot be restricted by itself.
        """
        if target == "thread" or not self._abi:
            return
        if policy.no_new_privs:
            set_no_new_privs()  # users other than root need it for Landlock; source: landlock(7)
        if not self._has_wall():
            self._make()
        if self._wall is not None:
            # The ruleset has rules for what was mounted there when it was made.
            self._wall.allow_beside(self._namespaces.private)
            self._wall.put_up()
        self._forget()

    def _has_wall(self) -> bool:
        return self._wall is not None and self._wall.is_current and self._mounts == self._namespaces.table

    def _make(self) -> None:
        self._forget()
        self._uses = 0
        self._mounts = self._namespaces.table
        paths = [*mount_points(self._mounts), *runtime.existing_folders()]
        self._wall = landlock.Wall(paths, signals=True)

    def _forget(self) -> None:
        if self._wall is not None:
            self._wall.close()
            self._wall = None
