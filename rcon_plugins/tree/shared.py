"""Groups that several commands share, with one set of limits: ``rcon run --in NAME``.

The group is the cgroup ``<base>/rcon-in-<name>``. Each command has an instance of its own in it, as everywhere: so it
is known who owns what, and what a killed command leaves is removed like any other leftover. The first command makes the
group and its limits. The last one removes it: the kernel removes no cgroup in which another has an instance.

A command that joins makes its instance first, which keeps the group. Then it checks the limits: the group may have been
removed and made again meanwhile.
"""

from __future__ import annotations

import contextlib
import errno
import os
from typing import TYPE_CHECKING, Any

from rcon_plugins.errors import ControllerUnavailable, DelegationError, KernelError, RconError
from rcon_plugins.kernel import files
from rcon_plugins.kernel.cgroup import MAX, Cgroup, Hierarchy, IoMax, Resources, read_limits
from rcon_plugins.kernel.cgroup.branch import check_path
from rcon_plugins.kernel.cgroup.resources import parse_list
from rcon_plugins.tree import nested, systemd
from rcon_plugins.tree.base import find_base, own_cgroup, remove_root_base
from rcon_plugins.tree.garbage import collect
from rcon_plugins.tree.instance import Instance
from rcon_plugins.tree.owner import Owner
from rcon_plugins.tree.survey import shared_directory, survey

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rcon_plugins.kernel.cgroup.device import Device
    from rcon_plugins.kernel.cgroup.resources import Max

#: The most attempts to join while others remove the group.
_ATTEMPTS = 20
#: How long to wait while other commands join and leave, seconds. After that, go on without the lock: every user can
#: hold it, and it only keeps two commands from making the group at once.
_LOCK_SECONDS = 10.0
#: The shares of a limit that the kernel rounds away.
_ROUNDED = 1e-4


class NotShared(RconError):
    """Raised when a command cannot share a group: there is none, or it has other limits. Nothing was made.

    ``found`` are the limits of the group; None if there is none, and the command gives no limits to make it with.
    """

    def __init__(self, name: str, found: Resources | None) -> None:
        problem = f"there is no group {name}" if found is None else f"the group {name} has other limits"
        super().__init__(f"{problem} (give its limits)")
        self.name = name
        self.found = found

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.name, self.found)


class SharedGroup:
    """A group in which this command has an instance. Call `leave` at its end."""

    def __init__(self, cgroup: Cgroup, instance: Instance, around: Instance | None) -> None:
        self.cgroup = cgroup
        self.instance = instance
        self._around = around

    @classmethod
    def join(cls, hierarchy: Hierarchy, base: str | None, name: str, wanted: Resources) -> SharedGroup:
        """Make the group ``name`` with the limits ``wanted``, or join the one that has the same limits.

        Without any limits, join the group that is there, whatever its limits are. ``base`` is the user's setting.
        Raises `NotShared`, `DelegationError` and `KernelError`.
        """
        around = None
        try:
            for attempts_left in reversed(range(_ATTEMPTS)):
                try:
                    where = _existing_base(hierarchy, name, base) or find_base(
                        hierarchy, base, systemd.enter_scope
                    )
                    if hierarchy.layout == "v2" and own_cgroup(hierarchy) == where:
                        # The base passes no controllers on while this process is in it.
                        around = Instance.create(hierarchy, where)
                        around.adopt()
                    with _locked(hierarchy):
                        if (joined := cls._join(hierarchy, where, name, wanted, around)) is not None:
                            return joined
                except KernelError as error:
                    if not (files.gone(error) and attempts_left):
                        raise
            raise KernelError(
                f"other commands make and remove {name} all the time", errno=errno.EBUSY, path=name
            )
        except BaseException:
            _close(around)
            raise

    @classmethod
    def _join(
        cls, hierarchy: Hierarchy, base: str, name: str, wanted: Resources, around: Instance | None
    ) -> SharedGroup | None:
        """Join once. Return None if the group was removed meanwhile."""
        path = f"{base.rstrip('/')}/{shared_directory(name)}"
        group = hierarchy.narrowed(base).cgroup(path, shared=True)
        if any(files.is_directory(directory) for directory in group.directories):
            collect(hierarchy, path)
        if has_members(group):
            _check_owner(group, name)
            limits = read_limits(group)
            if wanted.written() and not is_same(wanted, limits, group):
                raise NotShared(name, limits)
        elif not wanted.written():
            raise NotShared(name, None)
        else:
            # What commands that have ended left has their limits.
            if not group.delete():
                raise KernelError(
                    f"{path} has cgroups of commands that have ended",
                    errno=errno.EBUSY,
                    path=path,
                    hint="rcon gc",
                )
            for refusal in hierarchy.narrowed(base).refusals(wanted):
                raise ControllerUnavailable(refusal.reason, path=path, hint=refusal.remedy)
            try:
                group.create()
                group.configure(wanted)
                limits = read_limits(group)
            except BaseException:
                with contextlib.suppress(KernelError):
                    group.delete()
                raise
        instance = None
        try:
            instance = Instance.create(hierarchy, path)
            if read_limits(group) == limits:
                return cls(group, instance, around)
            instance.close()
            return None
        except BaseException:
            if instance is not None:
                instance.close()
            with contextlib.suppress(KernelError):
                group.delete()
            raise

    def leave(self) -> None:
        """Remove the instance, and the group if no other command is in it. Raises `KernelError`."""
        try:
            self.instance.close()
            hierarchy, base = self.instance.hierarchy, os.path.dirname(self.cgroup.path)
            with _locked(hierarchy):
                collect(hierarchy, self.cgroup.path)  # of commands that were killed
                self.cgroup.delete()
                remove_root_base(hierarchy, base)
        finally:
            _close(self._around)


def has_members(group: Cgroup) -> bool:
    """Return whether a command that lives, or may live, is in a shared group."""
    owners = (Owner.of(name) for name in group.children())
    return any(owner is not None and owner.is_alive() is not False for owner in owners)


def is_same(wanted: Resources, found: Resources, group: Cgroup) -> bool:
    """Return whether ``wanted`` are the limits ``found`` of a group, as far as the kernel rounds them."""
    if wanted.cpus is not None:
        if _cpus(group) != parse_list(wanted.cpus):
            return False
        found = found.replaced(cpus=wanted.cpus)
    if isinstance(wanted.memory_max, int) and wanted.swap_max is None and found.swap_max == 0:
        found = found.replaced(swap_max=None)  # a limit of memory allows no swap
    return _plain(wanted) == _plain(found)


def _plain(limits: Resources) -> dict[str, object]:
    """Return the limits that limit something, as the kernel rounds them."""
    sizes = {
        name: value // os.sysconf("SC_PAGE_SIZE")
        for name in ("memory_max", "memory_high", "swap_max")
        if isinstance(value := getattr(limits, name), int)
    }
    quota, burst, pids = limits.cpu_quota, limits.cpu_burst, limits.pids_max
    return {
        **sizes,
        "cpu_quota": round(quota / _ROUNDED) if isinstance(quota, int | float) else None,
        "cpu_burst": round(burst, 6) if burst else None,
        "cpu_weight": limits.cpu_weight if limits.cpu_weight != 100 else None,
        "cpus": limits.cpus,
        "pids_max": pids if isinstance(pids, int) else None,
        "io": _plain_io(limits.io),
    }


def _plain_io(io: Mapping[Device, IoMax]) -> dict[Device, list[int | Max]]:
    plain = {device: [MAX if rate is None else rate for rate in rates] for device, rates in io.items()}
    return {device: rates for device, rates in plain.items() if any(rate is not MAX for rate in rates)}


def _check_owner(group: Cgroup, name: str) -> None:
    """Raise KernelError for a group of another user, who could kill and freeze what is in it."""
    for directory in group.directories:
        if (uid := files.owner_of(directory)) not in (None, os.geteuid()):
            raise KernelError(
                f"the group {name} belongs to uid {uid}",
                errno=errno.EACCES,
                path=directory,
                hint="choose another name, or run rcon as that user",
            )


def _cpus(group: Cgroup) -> frozenset[int]:
    for directory in group.directories:
        for name in ("cpuset.cpus.effective", "cpuset.cpus"):
            if text := files.read_if_there(directory, name):
                return parse_list(text)
    return frozenset()


def _existing_base(hierarchy: Hierarchy, name: str, base: str | None) -> str | None:
    """Return the base of the group ``name`` that this process may join; None without one.

    Under systemd each command may have a scope of its own, so the group may be in that of another. A process that a
    group limits joins only groups inside of it.
    """
    location = nested.own_location(hierarchy)
    boundary = None if location is None else location.boundary
    if base is not None:
        return None
    found = [
        path
        for path, its_name in survey(hierarchy).shared.items()
        if its_name == name
        and (boundary is None or nested.is_within(path, boundary))
        and has_members(hierarchy.cgroup(path))
        and _is_own(hierarchy, path)
    ]
    if not found:
        return None
    if len(found) > 1:
        raise DelegationError(
            f"{len(found)} groups have the name {name}: {', '.join(found)}",
            errno=errno.ENOTUNIQ,
            path=found[0],
            hint=f"choose one: rcon run --cgroup {os.path.dirname(found[0])}",
        )
    if hierarchy.layout == "v2" and os.geteuid() != 0:
        # A user may move processes to that scope from another one, but not from a session.
        with contextlib.suppress(DelegationError):
            systemd.enter_scope()
    return os.path.dirname(check_path(found[0]))


def _is_own(hierarchy: Hierarchy, path: str) -> bool:
    """Return whether this user made a group. Another one, also a confined one, could kill and freeze what is in it."""
    here = hierarchy.where(path)
    return here is not None and all(
        files.owner_of(directory) == os.geteuid() for directory in here.cgroup(path).directories
    )


def _locked(hierarchy: Hierarchy) -> contextlib.AbstractContextManager[None]:
    """Keep other commands from joining or leaving a group of this tree in the block."""
    return files.locked([*hierarchy.limit_mounts, *hierarchy.mounts][0].path, _LOCK_SECONDS)


def _close(around: Instance | None) -> None:
    """Close the instance that this process moved itself into. Without the base to itself, it stays there."""
    if around is not None:
        with contextlib.suppress(KernelError):
            around.close()
