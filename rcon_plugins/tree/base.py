"""Find a base: a cgroup in which this process may make others. Without one, explain how to get it."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import pwd
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from rcon_plugins.errors import ControllerUnavailable, DelegationError, KernelError
from rcon_plugins.kernel import files
from rcon_plugins.kernel.cgroup import mounts, v1, v2
from rcon_plugins.kernel.cgroup.branch import check_path, levels
from rcon_plugins.kernel.cgroup.limits import read_limits
from rcon_plugins.kernel.cgroup.mounts import Mount
from rcon_plugins.tree import container_root, nested
from rcon_plugins.tree.owner import INSTANCE_NAME

if TYPE_CHECKING:
    from rcon_plugins.kernel.cgroup.hierarchy import Hierarchy

#: The base for root if nothing was delegated.
ROOT_BASE = "/rcon"


def find_base(
    hierarchy: Hierarchy, setting: str | None = None, enter_scope: Callable[[], None] | None = None
) -> str:
    """Return the path of an existing cgroup in which this process may make others: the base.

    The first of these that applies:

    1. ``setting``, which is made if it is missing.
    2. In the tree of a server: the base of that server, if this process may write it.
    3. The cgroup delegated to this process, its own or the one above: see `given`.
    4. On v2: the scope that ``enter_scope`` moves this process into. It raises DelegationError if it cannot.
    5. For root: ``/rcon``.
    6. On v1: the one cgroup that root gave to this user.

    On v2 with ``enter_scope``, a process in a systemd unit with limits gets neither the scope nor ``/rcon``: both would
    be outside of these limits. If a group limits this process, the base is inside that group: see :mod:`.nested`.

    Raises DelegationError with the exact remedy, and ValueError if ``setting`` is not a path.
    """
    return _find(hierarchy, setting, enter_scope, partial(_prepare, hierarchy))


class Prospect(NamedTuple):
    """The base that a start would find, and the hierarchy with the controllers that it has there."""

    base: str
    hierarchy: Hierarchy
    #: What the start would do first, for people; None if nothing.
    first: str | None


def look_for_base(
    hierarchy: Hierarchy, setting: str | None = None, enter_scope: Callable[[], None] | None = None
) -> Prospect:
    """Return the base that `find_base` would find. Move no other process, and leave no cgroup.

    Raises what `find_base` raises.
    """
    missing: list[str] = []

    with contextlib.ExitStack() as afterwards:

        def prepare(path: str) -> str:
            if container_root.would_move(hierarchy):
                missing.append(path)
                return path
            afterwards.enter_context(left_as_it_was(hierarchy, path))
            return _prepare(hierarchy, path)

        base = _find(hierarchy, setting, enter_scope, prepare)
        if base in missing:
            # A start would make it, with the controllers of the root.
            return Prospect(base, hierarchy.narrowed("/"), container_root.ANNOUNCEMENT)
        return Prospect(base, hierarchy.narrowed(base), None)


@contextlib.contextmanager
def left_as_it_was(hierarchy: Hierarchy, path: str) -> Iterator[None]:
    """Remove the directories of ``path`` and of those above that the ``with`` block makes, where nobody uses them."""
    directories = [mount.directory(level) for level in levels(path) for mount in hierarchy.mounts]
    missing = [directory for directory in directories if not files.is_directory(directory)]
    try:
        yield
    finally:
        for directory in reversed(missing):
            with contextlib.suppress(KernelError):
                files.remove_directory(directory)


def _find(
    hierarchy: Hierarchy,
    setting: str | None,
    enter_scope: Callable[[], None] | None,
    prepare: Callable[[str], str],
) -> str:
    """Return the base. ``prepare`` gets one that may be missing, and returns it; see `find_base`."""
    if setting is None and any(mount.root.startswith("/..") for mount in hierarchy.limit_mounts):
        raise DelegationError(
            "this process cannot see its own cgroup and the limits of that cgroup: it is in a cgroup namespace, "
            "but the cgroup file systems were mounted outside of it",
            errno=errno.EXDEV,
            path=hierarchy.limit_mounts[0].path,
            hint="mount them inside the namespace (unshare --cgroup --mount), or start this process outside of it",
        )
    location = nested.own_location(hierarchy)
    if location is not None and location.boundary is not None:
        return _inside(hierarchy, location, setting, prepare)
    if setting is not None:
        return prepare(check_path(setting))
    if location is not None and location.base is not None and _is_writable(hierarchy, location.base):
        return location.base
    if location is None and (found := given(hierarchy)) is not None:
        return found
    own, refused = own_cgroup(hierarchy), None
    if (
        enter_scope is not None
        and location is None
        and hierarchy.layout == "v2"
        and not _read_only(hierarchy)
    ):
        _check_may_leave(hierarchy, own)
        try:
            enter_scope()
        except DelegationError as error:
            refused = error
        else:
            own = own_cgroup(hierarchy)
            if own is not None and _is_ours(hierarchy, own, {str(os.getpid())}, from_systemd=True):
                return own
    if os.geteuid() == 0:
        return prepare(ROOT_BASE)
    if owned := owned_on_v1(hierarchy):
        if len(owned) == 1:
            return owned[0]
        raise DelegationError(
            f"{len(owned)} cgroups belong to this user: {', '.join(owned)}",
            errno=errno.ENOTUNIQ,
            path=owned[0],
            hint=f"choose one: rcon run --cgroup {owned[0]}; or set RCON_CGROUP={owned[0]} in the environment; "
            f'or, for a server, set cgroup = "{owned[0]}"',
        )
    raise DelegationError(
        "no cgroup is delegated to this process" + (f"; {refused.problem}" if refused else ""),
        errno=errno.EROFS if _read_only(hierarchy) else errno.EACCES,
        path=own,
        hint=remedy(hierarchy, ROOT_BASE, own, scope_error=refused),
    )


def remove_root_base(hierarchy: Hierarchy, base: str) -> None:
    """Remove ``base`` if it is ``/rcon``, belongs to root, and this process runs as root, which may have made it.

    It stays while it has processes or cgroups of others, or if root has given it to a user. Raises KernelError.
    """
    if base != ROOT_BASE or os.geteuid() != 0:
        return
    cgroup = hierarchy.cgroup(base, shared=True)
    if all(files.owner_of(directory) in (0, None) for directory in cgroup.directories):
        cgroup.delete()


def given(hierarchy: Hierarchy) -> str | None:
    """Return the cgroup delegated to this process: its own, or the one above; None if neither is.

    Its own cgroup counts if this process is alone in it and may write it. The one above counts if no process is in it:
    it belongs to a unit with DelegateSubgroup= (systemd 254), or it is a directory of this user in which root made a
    cgroup for this user's processes.
    """
    own = own_cgroup(hierarchy)
    if own is None:
        return None
    ours = _is_ours(hierarchy, own, {str(os.getpid())})
    if ours and _has_controllers(hierarchy, own):
        return own
    around = os.path.dirname(own)
    if own != "/" and _is_ours(hierarchy, around, set()) and _is_given(hierarchy, around):
        return around
    return own if ours else None


def owned_on_v1(hierarchy: Hierarchy) -> list[str]:
    """Return the cgroups that root gave to this user (chown), if all limits are on v1; none below another of them.

    On v1 a process may enter such a cgroup from anywhere. This user owns each of them, and may write it, in every
    hierarchy that carries limits. Leaves out cgroups in the tree of a server or command, whose limits would hold.
    """
    there = hierarchy.limit_mounts
    if any(mount.version == 2 for mount in there):
        return []
    uid, found, waiting = os.geteuid(), [], ["/"]
    while waiting:
        above = waiting.pop()
        try:
            names = files.subdirectories(there[0].directory(above))
        except KernelError as error:
            if not files.refused(error):
                raise
            continue  # a directory that this user may not read is not its own either
        for name in names:
            path = f"{above.rstrip('/')}/{name}"
            if INSTANCE_NAME.fullmatch(name):
                continue
            if all(files.owner_of(mount.directory(path)) == uid for mount in there) and _is_writable(
                hierarchy, path
            ):
                found.append(path)
            else:
                waiting.append(path)
    return sorted(found)


def _has_controllers(hierarchy: Hierarchy, path: str) -> bool:
    """Return whether ``path`` gets any controllers from the cgroup above. True on v1, where it has all."""
    mount = hierarchy.unified
    if mount is None or mount not in hierarchy.limit_mounts:
        return True
    wanted = {name for name in hierarchy.controllers if hierarchy.mount_of(name) == mount}
    return bool(wanted & v2.offered(mount.directory(path)))


def _is_given(hierarchy: Hierarchy, path: str) -> bool:
    """Return whether systemd delegated the cgroup ``path``, or root gave it to this user.

    A cgroup below the user's own systemd manager does not count by its owner: the user owns all of them, and the
    manager is in charge of them.
    """
    directories = [mount.directory(path) for mount in hierarchy.limit_mounts]
    if all(_is_marked(directory) for directory in directories):
        return True
    uid = os.geteuid()
    if uid == 0 or f"/user@{uid}.service" in path:
        return False
    return all(os.stat(directory).st_uid == uid for directory in directories)


def _check_may_leave(hierarchy: Hierarchy, own: str | None) -> None:
    """Raise DelegationError if the systemd unit of this process has limits, which a scope or ``/rcon`` would escape.

    Slices do not count, because the scope is in them, too. TasksMax= does not count, because every unit has it.
    """
    unit = own or "/"
    while mounts.is_systemds() and (name := os.path.basename(unit)) and not name.endswith(".slice"):
        if nested.limits_something(read_limits(hierarchy.cgroup(unit)), but_pids=True):
            raise DelegationError(
                f"the systemd unit {name} has limits, and a cgroup outside of the unit would escape them",
                errno=errno.EACCES,
                path=unit,
                hint=remedy(hierarchy, ROOT_BASE, own),
            )
        unit = os.path.dirname(unit)


def _read_only(hierarchy: Hierarchy) -> bool:
    return any(mount.read_only for mount in hierarchy.limit_mounts)


def own_cgroup(hierarchy: Hierarchy) -> str | None:
    """Return the cgroup of this process; None unless it is the same path in every hierarchy that carries limits."""
    own = mounts.parse_membership(files.read_own("cgroup"))
    paths = {mounts.membership(mount, own) for mount in hierarchy.limit_mounts}
    return paths.pop() if len(paths) == 1 else None


def _inside(
    hierarchy: Hierarchy, location: nested.Location, setting: str | None, prepare: Callable[[str], str]
) -> str:
    """Return the base of a process that a group holds to limits. Raises DelegationError unless it is in that group."""
    group = location.boundary or "/"
    base = location.base if setting is None else check_path(setting)
    if setting is not None and not nested.is_within(setting, group):
        raise DelegationError(
            f"the limits of {group} apply to this process, and the cgroup {setting} is outside of it",
            errno=errno.EACCES,
            path=setting,
            hint=f"do not set the cgroup {setting} here, or start this process outside of {group}",
        )
    if base is None:
        raise DelegationError(
            f"the limits of {group} apply to this process, and it cannot make a cgroup inside of it",
            errno=errno.EOPNOTSUPP,
            path=group,
            hint="a program that a confined thread starts stays in the cgroup of the thread: "
            'write isolation = "process" in the policy, or start this process outside of the request or task',
        )
    if not _has_room(hierarchy, base):
        raise DelegationError(
            f"the limits of {group} apply to this process, and it shares {base} with other processes",
            errno=errno.EBUSY,
            path=base,
            hint="write the limits into the policy (each = ...), or start this process with rcon run, "
            "or outside of the request or task",
        )
    try:
        return prepare(base)
    except DelegationError as error:
        user = _user_name()
        if error.errno in (errno.EACCES, errno.EPERM):
            error.hint = (
                f"the limits of {group} apply to this process, and {user} does not own that group: "
                f"start the group with rcon run --user {user}, or start this process as the owner of the group"
            )
        raise


def _has_room(hierarchy: Hierarchy, base: str) -> bool:
    """Return whether ``base`` can pass controllers on: on v2 it must have no process but this one."""
    for mount in hierarchy.limit_mounts:
        if mount.version == 2 and files.is_directory(mount.directory(base)):
            try:
                inside = files.read(mount.directory(base), "cgroup.procs").split()
            except KernelError as error:
                # EOPNOTSUPP: a threaded cgroup.
                if not (files.gone(error) or files.refused(error)):
                    raise
                return False
            if not set(inside) <= {str(os.getpid())}:
                return False
    return True


def _is_writable(hierarchy: Hierarchy, path: str) -> bool:
    """Return whether this process may make cgroups in ``path`` and move processes below it."""
    for mount in hierarchy.limit_mounts:
        directory = mount.directory(path)
        needed = [directory, f"{directory}/cgroup.procs"]
        if mount.version == 2:
            needed.append(f"{directory}/cgroup.subtree_control")
        if mount.read_only or not all(os.access(name, os.W_OK) for name in needed):
            return False
    return True


def _is_ours(hierarchy: Hierarchy, path: str, inside: set[str], *, from_systemd: bool = False) -> bool:
    """Return whether this process may write ``path``, it was delegated, and exactly the processes ``inside`` are in it.

    ``from_systemd``: systemd made the cgroup for this process, so that the mark of delegation need not be checked.
    """
    if not _is_writable(hierarchy, path):
        return False
    for mount in hierarchy.limit_mounts:
        directory = mount.directory(path)
        if _is_machine_root(mount, directory):
            return False
        try:
            found = files.read(directory, "cgroup.procs").split()
        except KernelError as error:
            # EOPNOTSUPP: a threaded cgroup cannot be a base.
            if not (files.gone(error) or files.refused(error)):
                raise
            return False
        if set(found) != inside or not (from_systemd or _was_delegated(mount, path)):
            return False
    return True


def _is_machine_root(mount: Mount, directory: str) -> bool:
    """Return whether ``directory`` is the root of the machine's tree, in which every process starts by default."""
    if mount.version == 2:
        # The root of a container's cgroup namespace has this file; the real root does not.
        return not os.path.exists(f"{directory}/cgroup.type")
    return directory == mount.path and mount.root == "/"


def _was_delegated(mount: Mount, path: str) -> bool:
    """Return whether systemd delegated the cgroup ``path``. True also if systemd does not manage that part of the tree.

    Root may write everywhere, and a user everywhere below the user's own manager. But a manager must be the only writer
    of a cgroup that it did not delegate (https://systemd.io/CGROUP_DELEGATION). The mark of delegation is on the unit's
    cgroup; with DelegateSubgroup= that is the one above. Older user managers cannot set the mark. Then the manager's
    own cgroup shows the user no mark either, and this returns True.
    """
    if os.geteuid() == 0:
        managed = mounts.is_systemds()
    else:
        above, name, _ = path.partition(f"/user@{os.geteuid()}.service/")
        managed = bool(name) and _is_marked(mount.directory(above + name.rstrip("/")))
    directory = mount.directory(path)
    return not managed or _is_marked(directory) or _is_marked(os.path.dirname(directory))


def _is_marked(directory: str) -> bool:
    """Return whether the directory has systemd's mark of delegation (``user.delegate`` since kernel 5.7)."""
    for name in ("trusted.delegate", "user.delegate"):
        with contextlib.suppress(OSError):
            if os.getxattr(directory, name) == b"1":
                return True
    return False


def _prepare(hierarchy: Hierarchy, path: str) -> str:
    """Make ``path`` if it is missing, check that it can be written, and return it. Raises DelegationError."""
    for mount in hierarchy.limit_mounts:
        if mount.read_only:
            raise _refused(hierarchy, path, errno.EROFS, f"{mount.path} is mounted read-only")
    cgroup = hierarchy.cgroup(path)
    try:
        if moved := container_root.empty(hierarchy):
            import logging  # slow, and seldom needed

            logging.getLogger("rcon").info(
                "rcon: moved %d processes of this container to the cgroup /%s, because %s",
                len(moved),
                container_root.LEAF,
                container_root.REASON,
            )
        try:
            cgroup.create()
        except KernelError as error:
            # If a hybrid's v2 side or a controller is not for this process, the caller narrows the hierarchy; a file
            # that is no directory is named below. An error of memory or descriptors says nothing about that.
            is_answer = files.gone(error) or files.refused(error) or error.errno == errno.ENOTDIR
            if not (isinstance(error, ControllerUnavailable) or is_answer):
                raise
        for mount in hierarchy.limit_mounts:
            directory = mount.directory(path)
            if v1.io_holder(mount, path) is not None:
                continue
            if not files.make_directory(directory) and files.is_file(*os.path.split(directory)):
                raise _refused(hierarchy, path, errno.ENOTDIR, f"{directory} is a file of the kernel")
            if not os.access(directory, os.W_OK):
                # Another server that ended may have removed it just now.
                number = errno.EACCES if files.is_directory(directory) else errno.ENOENT
                raise _refused(hierarchy, path, number, f"this process may not write {directory}")
            if mount.version == 2:
                _check_passed_on(hierarchy, path, directory)
    except DelegationError:
        raise
    except KernelError as error:
        raise _refused(hierarchy, path, error.errno or errno.EIO, error.problem) from error
    return path


def _check_passed_on(hierarchy: Hierarchy, path: str, directory: str) -> None:
    """Raise DelegationError if the cgroup got no controllers: a root of a container with processes passes none on."""
    wanted = {name for name in hierarchy.controllers if hierarchy.mount_of(name) == hierarchy.unified}
    if not wanted & set(files.read(directory, "cgroup.controllers").split()):
        raise _refused(hierarchy, path, errno.EBUSY, f"{directory} gets no controllers from the cgroup above")


def _refused(hierarchy: Hierarchy, path: str, number: int, problem: str) -> DelegationError:
    return DelegationError(
        problem, errno=number, path=path, hint=remedy(hierarchy, path, own_cgroup(hierarchy), number)
    )


# -- remedies: steps that give a base, separated by "; ", each to be copied


def remedy(
    hierarchy: Hierarchy,
    path: str,
    own: str | None,
    number: int = errno.EACCES,
    scope_error: DelegationError | None = None,
) -> str:
    """Return the commands or unit lines that give this process a base.

    ``path`` is the base that was tried, ``own`` the cgroup of this process, ``number`` the errno of the refusal, and
    ``scope_error`` the error of a request for a scope.
    """
    if number == errno.EROFS:
        return mounts.writable_remedy(hierarchy.limit_mounts)
    if number == errno.ENOTDIR:
        return f'choose another path: cgroup = "{ROOT_BASE}"'
    if number == errno.EBUSY:
        if container_root.is_busy(hierarchy):
            reason = container_root.why_not(hierarchy) or "moving them failed"
            return (
                f"processes in the root of this container keep controllers from being passed on, and are not moved: "
                f"{reason}; run as root: {'; '.join(container_root.commands(hierarchy))}"
            )
        return (
            "a cgroup with processes passes no controllers on: make the server the only process of the container "
            '(CMD ["gunicorn", ...] without a shell), or set cgroup = "..." to a cgroup without processes'
        )
    if hierarchy.layout == "v2" and mounts.is_systemds():
        return _from_systemd(hierarchy, own or "", scope_error)
    used = hierarchy.cgroup(path).mounts
    commands = [command for mount in used for command in _by_hand(hierarchy, mount, path)]
    return f'run the server as root, or run once as root: {"; ".join(commands)}; and set cgroup = "{path}"'


def _from_systemd(hierarchy: Hierarchy, own: str, scope_error: DelegationError | None) -> str:
    delegate = f"[Service] Delegate={' '.join(sorted(hierarchy.controllers)) or 'yes'}"
    user = "" if os.geteuid() == 0 else "--user "
    unit = next((part for part in reversed(own.split("/")) if part.endswith(".service")), None)
    if unit is not None and not unit.startswith("user@"):
        its = "--user " if "/user@" in own else ""
        steps = f"systemctl {its}edit {unit}: {delegate}"
    else:
        steps = f"add to the unit of the server: {delegate}"
    if scope_error is not None and scope_error.hint:
        steps += f"; or, to get a scope: {scope_error.hint}"
    return f"{steps}; or start it with: systemd-run {user}--scope -p Delegate=yes COMMAND"


def _by_hand(hierarchy: Hierarchy, mount: Mount, path: str) -> list[str]:
    """Return the commands that root runs once to give this user ``path`` in one hierarchy."""
    user = _user_name()
    directory = mount.directory(path)
    if mount.version == 1:
        chown = f"chown {user} {directory} {directory}/tasks {directory}/cgroup.procs"
        return [f"mkdir -p {directory} && {chown}", *_fill_cpuset(mount, path)]
    commands = []
    server = f"{directory}/server"
    passed = [name for name in sorted(mount.controllers) if hierarchy.mount_of(name) == mount]
    enable = " ".join(f"+{name}" for name in passed)
    if enable:
        above = [mount.directory(level) for level in levels(path)[:-1]]
        if len(above) > 1:
            commands.append(f"mkdir -p {above[-1]}")
        commands += [f"echo '{enable}' > {one}/cgroup.subtree_control" for one in above]
    commands.append(
        f"mkdir -p {server} && chown {user} {directory} {directory}/cgroup.procs "
        f"{directory}/cgroup.subtree_control {server} {server}/cgroup.procs "
        f"{server}/cgroup.threads {server}/cgroup.subtree_control"
    )
    # Without write permission above, this user may only move processes that are in the delegated part already.
    commands.append(f"echo PID-OF-THE-SHELL-THAT-STARTS-IT > {server}/cgroup.procs")
    return commands


def _fill_cpuset(mount: Mount, path: str) -> list[str]:
    """Return the commands that copy the cpuset of the cgroups above, down to ``path``.

    A new v1 cpuset is empty, and no process can enter an empty one (cgroup-v1/cpusets.rst). A directory of another user
    gets the commands even if it is filled: it may be removed with its last user, and be new when the commands run.
    """
    if "cpuset" not in mount.controllers:
        return []
    above = [mount.directory(level) for level in levels(path)]
    return [
        f"cat {parent}/{name} > {child}/{name}"
        for parent, child in itertools.pairwise(above)
        for name in ("cpuset.cpus", "cpuset.mems")
        if not (files.read_if_there(child, name) or "").strip()
        or (child == above[-1] and files.owner_of(child) != os.geteuid())
    ]


def _user_name() -> str:
    """Return the name of the effective user; the uid if it has no name."""
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return str(os.geteuid())
