"""Landlock: a wall around an executor process that holds whatever its user, root too."""

from __future__ import annotations

import contextlib

from rcon_plugins.errors import KernelError
from rcon_plugins.hookspecs import hookimpl
from rcon_plugins.kernel import landlock
from rcon_plugins.kernel.capability import set_no_new_privs
from rcon_plugins.kernel.cgroup import mount_points, mount_table
from rcon_plugins.settings.policy import Policy


class Landlock:
    """The plugin. The fork server makes a wall ahead of need, since that is most of the work."""

    def __init__(self) -> None:
        self._wall: landlock.Wall | None = None
        #: What was mounted when it was made.
        self._mounts = ""

    @hookimpl
    def rcon_prepare(self) -> None:
        """Make the wall, or make it again where it is out of date."""
        if not landlock.abi() or self._has_wall():
            return
        self._forget()
        # Where it cannot be made the new process tries by itself, and says why.
        with contextlib.suppress(KernelError):
            self._mounts = mount_table()
            self._wall = _make(self._mounts)

    @hookimpl(trylast=True)
    def rcon_drop(self, policy: Policy, place: str) -> None:
        """Forbid a process to write below the cgroup mounts, and to reach into processes that are not its own.

        Work that keeps the server's user could otherwise write the files that bind it. Nothing where the kernel has no
        Landlock: the policy's `Verdict` has the caveat then. A thread shares all with its process, and gets none.
        """
        if place == "thread" or not landlock.abi():
            return
        if policy.no_new_privs:
            set_no_new_privs()  # which a user other than root needs for it; source: landlock(7)
        if not self._has_wall():
            self._forget()
            self._wall = _make(mount_table())
        if self._wall is not None:
            self._wall.put_up()
        self._forget()

    def _has_wall(self) -> bool:
        return self._wall is not None and self._wall.is_current and self._mounts == mount_table()

    def _forget(self) -> None:
        if self._wall is not None:
            self._wall.close()
            self._wall = None


def _make(mounts: str) -> landlock.Wall:
    return landlock.Wall(mount_points(mounts), signals=True)
