"""Which part of the cgroup tree is ours to write, or what would make one so."""

from __future__ import annotations

import contextlib
import errno
import os
import pwd
from typing import TYPE_CHECKING

from rcon_plugins.errors import DelegationError, KernelError
from rcon_plugins.kernel.cgroup import files, mounts, nested, v1
from rcon_plugins.kernel.cgroup.mounts import Mount
from rcon_plugins.kernel.cgroup.names import check_path

if TYPE_CHECKING:
    from rcon_plugins.kernel.cgroup.hierarchy import Hierarchy

#: The base for root where nothing was delegated.
ROOT_BASE = "/rcon"


def find_base(hierarchy: Hierarchy, setting: str | None = None) -> str:
    """The path of a cgroup that is ours to make others in; it exists when this returns.

    In this order: ``setting``; the cgroup this process is in, if it is alone there and may write it (or,
    where it is in the tree of a server, the base of that, if it may write it); for root ``/rcon``.
    In a group that holds it to limits, only inside of that: see :mod:`.nested`.
    Raises DelegationError with the exact remedy, ValueError for a setting that is no path.
    """
    place = nested.own_place(hierarchy)
    if place is not None and place.boundary is not None:
        return _inside(hierarchy, place, setting)
    if setting is not None:
        return _prepare(hierarchy, check_path(setting))
    if place is not None and place.base is not None and _is_writable(hierarchy, place.base):
        return place.base
    own = own_cgroup(hierarchy)
    if place is None and own is not None and _is_ours(hierarchy, own):
        return own
    if os.geteuid() == 0:
        return _prepare(hierarchy, ROOT_BASE)
    raise DelegationError(
        "no cgroup is delegated to this process",
        errno=errno.EACCES,
        path=own,
        hint=remedy(hierarchy, ROOT_BASE, own),
    )


def own_cgroup(hierarchy: Hierarchy) -> str | None:
    """Where this process is, if that is the same path in every hierarchy that carries limits."""
    own = mounts.parse_membership(files.read_own("cgroup"))
    paths = {mounts.membership(mount, own) for mount in limit_mounts(hierarchy)}
    return paths.pop() if len(paths) == 1 else None


def limit_mounts(hierarchy: Hierarchy) -> list[Mount]:
    """The mounts in which limits are set."""
    found = {hierarchy.mount_of(name) for name in hierarchy.controllers}
    return [mount for mount in hierarchy.mounts if mount in found]


def _inside(hierarchy: Hierarchy, place: nested.Place, setting: str | None) -> str:
    """The base of a process that is held to limits: inside of what holds it, or refused."""
    group = place.boundary or "/"
    base = place.base if setting is None else check_path(setting)
    if setting is not None and not nested.is_within(setting, group):
        raise DelegationError(
            f"{setting} is outside of {group}, whose limits hold for this process",
            errno=errno.EACCES,
            path=setting,
            hint=f'leave cgroup = "{setting}" out here, or start this outside of {group}',
        )
    if base is None:
        raise DelegationError(
            f"the limits of {group} hold for this process, and no cgroup can be made inside of it",
            errno=errno.EOPNOTSUPP,
            path=group,
            hint="what a thread has started stays in the cgroup of that thread: give the policy of the work "
            'isolation = "process", or start this outside of the work',
        )
    if not _has_room(hierarchy, base):
        raise DelegationError(
            f"the limits of {group} hold for this process, and others are in {base} with it",
            errno=errno.EBUSY,
            path=base,
            hint="write the limits into the policy of the work (each = ...), or start this outside of the "
            "work, or with rcon run",
        )
    try:
        return _prepare(hierarchy, base)
    except DelegationError as error:
        user = _user_name()
        if error.errno in (errno.EACCES, errno.EPERM):
            error.hint = (
                f"the limits of {group} hold for this process, and it is not {user}'s: start what is around "
                f"it with rcon run --user {user}, or this as the user that was started with"
            )
        raise


def _has_room(hierarchy: Hierarchy, base: str) -> bool:
    """Whether ``base`` can pass controllers on: on v2 it has no processes, or only this one."""
    for mount in limit_mounts(hierarchy):
        if mount.version == 2 and files.is_directory(mount.directory(base)):
            try:
                inside = files.read(mount.directory(base), "cgroup.procs").split()
            except KernelError:
                # EOPNOTSUPP: a threaded cgroup.
                return False
            if not set(inside) <= {str(os.getpid())}:
                return False
    return True


def _is_writable(hierarchy: Hierarchy, path: str) -> bool:
    """Whether this process may make cgroups in ``path`` and move processes below it."""
    for mount in limit_mounts(hierarchy):
        directory = mount.directory(path)
        needed = [directory, f"{directory}/cgroup.procs"]
        if mount.version == 2:
            needed.append(f"{directory}/cgroup.subtree_control")
        if mount.read_only or not all(os.access(name, os.W_OK) for name in needed):
            return False
    return True


def _is_ours(hierarchy: Hierarchy, path: str) -> bool:
    """Whether this process is alone in ``path`` and may write it."""
    if not _is_writable(hierarchy, path):
        return False
    for mount in limit_mounts(hierarchy):
        directory = mount.directory(path)
        if _is_machine_root(mount, directory):
            return False
        try:
            inside = files.read(directory, "cgroup.procs").split()
        except KernelError:
            # EOPNOTSUPP: a threaded cgroup is no place for ours.
            return False
        if inside != [str(os.getpid())] or not _was_delegated(directory):
            return False
    return True


def _is_machine_root(mount: Mount, directory: str) -> bool:
    """Whether this is the root of the machine's tree, where every process begins that nobody has moved."""
    if mount.version == 2:
        # The root of a container's cgroup namespace has this file, the real root has not.
        return not os.path.exists(f"{directory}/cgroup.type")
    return directory == mount.path and mount.root == "/"


def _was_delegated(directory: str) -> bool:
    """Whether systemd, where it manages the tree, gave this cgroup away.

    A root process may write everywhere, but systemd is the single writer of what it did not delegate
    (https://systemd.io/CGROUP_DELEGATION). The mark is on the unit's cgroup, which with DelegateSubgroup=
    is the one above.
    """
    if os.geteuid() != 0 or not os.path.isdir("/run/systemd/system"):
        return True
    for place in (directory, os.path.dirname(directory)):
        for name in ("trusted.delegate", "user.delegate"):
            with contextlib.suppress(OSError):
                if os.getxattr(place, name) == b"1":
                    return True
    return False


def _prepare(hierarchy: Hierarchy, path: str) -> str:
    """Make ``path`` where it is missing, and see that it can be written."""
    for mount in limit_mounts(hierarchy):
        if mount.read_only:
            raise _refused(hierarchy, path, errno.EROFS, f"{mount.path} is mounted read-only")
    cgroup = hierarchy.cgroup(path)
    try:
        with contextlib.suppress(KernelError):
            # Of a hybrid's v2 side, or a controller that stays away, the hierarchy is narrowed below.
            cgroup.create()
        for mount in limit_mounts(hierarchy):
            directory = mount.directory(path)
            if v1.io_holder(mount, path) is not None:
                continue
            files.make_directory(directory)
            if not os.access(directory, os.W_OK):
                raise _refused(hierarchy, path, errno.EACCES, f"{directory} is not ours to write")
            if mount.version == 2:
                _check_passed_on(hierarchy, path, directory)
    except DelegationError:
        raise
    except KernelError as error:
        raise _refused(hierarchy, path, error.errno or errno.EIO, error.problem) from error
    return path


def _check_passed_on(hierarchy: Hierarchy, path: str, directory: str) -> None:
    """That the cgroup got any controllers; a container's root keeps them while processes are in it."""
    wanted = {name for name in hierarchy.controllers if hierarchy.mount_of(name) == hierarchy.unified}
    if not wanted & set(files.read(directory, "cgroup.controllers").split()):
        raise _refused(hierarchy, path, errno.EBUSY, f"{directory} gets no controllers from the cgroup above")


def _refused(hierarchy: Hierarchy, path: str, number: int, problem: str) -> DelegationError:
    return DelegationError(
        problem, errno=number, path=path, hint=remedy(hierarchy, path, own_cgroup(hierarchy), number)
    )


def remedy(hierarchy: Hierarchy, path: str, own: str | None, number: int = errno.EACCES) -> str:
    """The commands or unit lines after which there is a base."""
    if number == errno.EROFS:
        return (
            "in a container, start it with a writable cgroup of its own: "
            "docker run --cgroupns=private --security-opt writable-cgroups=true ..., or, where that is not "
            "known, docker run --privileged --cgroupns=private ...; outside of one: "
            + "; ".join(f"mount -o remount,rw {mount.path}" for mount in limit_mounts(hierarchy))
        )
    if number == errno.EBUSY:
        return (
            "a cgroup that has processes passes no controllers on: let the server be the only process of the "
            'container (CMD ["gunicorn", ...] without a shell), or set cgroup = "..." to one without processes'
        )
    controllers = " ".join(sorted(hierarchy.controllers)) or "yes"
    if os.path.isdir("/run/systemd/system"):
        unit = next((part for part in (own or "").split("/") if part.endswith(".service")), None)
        edit = f"systemctl edit {unit}" if unit and os.geteuid() == 0 else "the unit of the server"
        return (
            f"in {edit}: [Service] Delegate={controllers}; or start it with: "
            f"systemd-run {'' if os.geteuid() == 0 else '--user '}--scope -p Delegate=yes COMMAND"
        )
    user = _user_name()
    commands = []
    for mount in hierarchy.mounts:
        directory = mount.directory(path)
        if mount.version == 1:
            commands.append(
                f"mkdir -p {directory} && chown {user} {directory} {directory}/tasks {directory}/cgroup.procs"
            )
        else:
            server = f"{directory}/server"
            enable = " ".join(f"+{name}" for name in sorted(mount.controllers))
            if enable:
                commands.append(f"echo '{enable}' > {mount.path}/cgroup.subtree_control")
            commands.append(
                f"mkdir -p {server} && chown {user} {directory} {directory}/cgroup.procs "
                f"{directory}/cgroup.subtree_control {server} {server}/cgroup.procs "
                f"{server}/cgroup.threads {server}/cgroup.subtree_control"
            )
            if mount.controllers:
                commands.append(f"echo PID-OF-THE-SHELL-THAT-STARTS-IT > {server}/cgroup.procs")
    return f'run the server as root, or as root once: {"; ".join(commands)}; and set cgroup = "{path}"'


def _user_name() -> str:
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return str(os.geteuid())
