"""Resolve the user and groups that a policy names to the ids of this machine.

Call `check` at the start: it refuses every fault that does not depend on the request or task. Call `resolve` for each
unit of work. It opens and reads no file that a tenant could have made: it only looks up the owner of a path.

Results of the user and group databases are cached for `userdb.LIFE` seconds. So a change of a user's groups takes
effect after that time at the latest. The owner of a path is looked up for every unit of work.
"""

from __future__ import annotations

import errno
import os
import posix
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, NoReturn

from rcon_plugins.errors import ConfinementError, IdentityRefused, KernelError, SettingsError
from rcon_plugins.identity import userdb
from rcon_plugins.kernel import paths
from rcon_plugins.kernel.capability import Capabilities, Identity, read_state
from rcon_plugins.settings.conversion import did_you_mean
from rcon_plugins.settings.units import show

if TYPE_CHECKING:
    from rcon_plugins.settings.accounts import Account, PathTemplate
    from rcon_plugins.settings.policy import Policy

#: Errors caused by the path that the request or task named. Any other error has its cause in the machine.
_OF_THE_PATH = frozenset(
    {
        *(errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EXDEV, errno.ENAMETOOLONG, errno.EACCES),
        *(errno.EINVAL, errno.EILSEQ, errno.ESTALE),
    }
)
_Find = Callable[[str, "PathTemplate"], paths.Owner]


class _Fault(Exception):
    """Raised for a fault of an identity. The caller turns it into an error of the settings or of the work."""

    def __init__(
        self, key: str, problem: str, hint: str, value: object = None, *, of_work: bool = False
    ) -> None:
        super().__init__(problem)
        self.key = key
        self.problem = problem
        self.hint = hint
        self.value = value
        self.of_work = of_work


class _OnlyWithWork(Exception):
    """Raised when the identity depends on the request or task, so that it cannot be checked at the start."""


def check(policy: Policy, file: str | None = None) -> None:
    """Check the identity of a policy on this machine, at the start.

    Fixed users and groups, and paths without placeholders, must exist and be allowed. The part of a path before its
    first placeholder must be a directory. The kernel must know the capabilities. Raises `SettingsError`.
    """
    try:
        _check_capabilities(policy)
        for key, template in _templates(policy):
            if template.placeholders:
                posix.close(_open_trusted(key, template))
        for key, account in _groups_named(policy):
            if account.path is None or not account.path.placeholders:
                _gid(key, account, policy, _find_at_start)
        if policy.user is not None:
            _resolve(policy, _find_at_start)
    except _OnlyWithWork:
        return
    except _Fault as fault:
        raise SettingsError(
            fault.problem,
            key=f"policy.{policy.name}.{fault.key}",
            value=fault.value,
            hint=fault.hint,
            file=file,
        ) from None


def resolve(policy: Policy, attributes: Mapping[str, str]) -> Identity | None:
    """Return the identity for work with these attributes; None if the policy names no user.

    Raises `IdentityRefused` if the policy does not allow the identity, or if the attributes of the work lead to none;
    `ConfinementError` if the lookup fails on this machine, for example because a user was removed since the start.
    """
    if policy.user is None:
        return None
    seen: dict[PathTemplate, paths.Owner] = {}

    def find(key: str, template: PathTemplate) -> paths.Owner:
        found = seen.get(template)
        if found is None:
            found = seen[template] = _find(key, template, attributes)
        return found

    try:
        return _resolve(policy, find)
    except _Fault as fault:
        kind = IdentityRefused if fault.of_work else ConfinementError
        raise kind(f"{fault.key} of policy {policy.name}: {fault.problem} ({fault.hint})") from None


def kept_capabilities(policy: Policy) -> Capabilities:
    """Return the capabilities that work of the policy keeps. ``all`` means the calling thread's permitted set."""
    if policy.capabilities == ("all",):
        return read_state().permitted
    return Capabilities.of(*(int(name) if name.isdigit() else name for name in policy.capabilities or ()))


def _resolve(policy: Policy, find: _Find) -> Identity:
    user = policy.user
    if user is None:
        raise _OnlyWithWork
    uid, entry, found = _user(user, find)
    of_work = user.path is not None
    _check_uid(uid, user, policy, of_work=of_work)
    gid = _primary(policy, entry, found, find)
    groups = _supplementary(policy, entry, gid, find)
    if policy.owner_must_be is not None:
        holder = find("owner_must_be", policy.owner_must_be)
        _check_known("owner_must_be", "uid", holder.uid, paths.overflow_uid())
        if holder.uid != uid:
            raise _Fault(
                "owner_must_be",
                f"{show(str(policy.owner_must_be))} belongs to uid {holder.uid}, but the user is uid {uid}",
                "give the path to that user, or remove owner_must_be",
                policy.owner_must_be,
                of_work=True,
            )
    return Identity(uid, gid, groups)


def _user(user: Account, find: _Find) -> tuple[int, userdb.Entry | None, paths.Owner | None]:
    """Return the uid, its entry in the user database, and the owner of the path. Each is None if it does not exist."""
    if user.path is not None:
        found = find("user", user.path)
        _check_known("user", "uid", found.uid, paths.overflow_uid())
        return found.uid, userdb.user(found.uid), found
    if user.number is not None:
        return user.number, userdb.user(user.number), None
    entry = userdb.user(user)
    if entry is None:
        raise _Fault(
            "user",
            f"there is no user {show(str(user))}",
            did_you_mean(user, userdb.user_names()) or "create it: useradd --system",
            user,
        )
    return entry.uid, entry, None


def _primary(policy: Policy, entry: userdb.Entry | None, found: paths.Owner | None, find: _Find) -> int:
    """Return the group of the policy, else the user's primary group, else the group of the path."""
    if policy.group is not None:
        return _gid("group", policy.group, policy, find)
    if entry is not None:
        gid, whose = entry.gid, f"the primary group of {entry.name}"
    elif found is not None:
        gid, whose = found.gid, "the group of the path"
        _check_known("group", "gid", gid, paths.overflow_gid())
    else:
        raise _Fault(
            "user",
            f"uid {policy.user} has no entry in the user database, so its group is unknown",
            "name the group: group = …",
            policy.user,
        )
    _check_gid("group", gid, whose, policy, of_work=found is not None)
    return gid


def _supplementary(policy: Policy, entry: userdb.Entry | None, gid: int, find: _Find) -> tuple[int, ...]:
    """Return the groups of the policy, else those of the group database, as initgroups(3) does."""
    if policy.groups is not None:
        return tuple(
            sorted(
                {
                    _gid(f"groups[{number}]", group, policy, find)
                    for number, group in enumerate(policy.groups, 1)
                }
            )
        )
    if entry is None:
        return ()
    groups = userdb.groups(entry.name, gid)
    of_work = policy.user is not None and policy.user.path is not None
    for group in groups:
        if group != gid:
            whose = f"a group that {entry.name} is a member of"
            _check_gid("groups", group, whose, policy, of_work=of_work)
    return groups


def _gid(key: str, group: Account, policy: Policy, find: _Find) -> int:
    if group.path is not None:
        gid, whose = find(key, group.path).gid, "the group of the path"
        _check_known(key, "gid", gid, paths.overflow_gid())
    elif group.number is not None:
        gid, whose = group.number, "the group"
    else:
        known = userdb.group_named(group)
        if known is None:
            near = did_you_mean(group, userdb.group_names())
            raise _Fault(
                key, f"there is no group {show(str(group))}", near or "create it: groupadd --system", group
            )
        gid, whose = known, f"the group {group}"
    _check_gid(key, gid, whose, policy, of_work=group.path is not None)
    return gid


def _check_known(key: str, kind: str, number: int, overflow: int) -> None:
    """Refuse the overflow id, which means that the owner of the path has no id in this user namespace."""
    if number == overflow:
        problem = f"the path belongs to {kind} {number}, which stands for all unknown owners (overflow id)"
        hint = "give it to an account of this machine (a user namespace or NFS may hide the owner)"
        raise _Fault(key, problem, hint, number, of_work=True)


def _check_uid(uid: int, user: Account, policy: Policy, *, of_work: bool) -> None:
    if policy.allow_root if uid == 0 else uid >= policy.min_uid:
        return
    path = user.path
    what = f"the owner of {show(str(path))} is" if path is not None else f"{show(str(user))} is"
    remedy = "give the path to another user" if path is not None else "name another user"
    if uid == 0:
        problem, hint = f"{what} root, and the policy forbids root", f"{remedy}, or write allow_root = true"
    else:
        problem = f"{what} uid {uid}, which is below min_uid = {policy.min_uid}"
        hint = f"{remedy}, or write min_uid = {uid}"
    raise _Fault("user", problem, hint, user, of_work=of_work)


def _check_gid(key: str, gid: int, whose: str, policy: Policy, *, of_work: bool) -> None:
    if policy.allow_root if gid == 0 else gid >= policy.min_gid:
        return
    remedy = "groups = []" if key == "groups" else "name another group"
    if gid == 0:
        problem = f"{whose} is gid 0, and the policy forbids root's group"
        hint = f"{remedy}, or write allow_root = true"
    else:
        problem = f"{whose} is gid {gid}, which is below min_gid = {policy.min_gid}"
        hint = f"{remedy}, or write min_gid = {gid}"
    raise _Fault(key, problem, hint, gid, of_work=of_work)


def _check_capabilities(policy: Policy) -> None:
    known = Capabilities.known()
    names = {name.removeprefix("cap_") for name in known.names()}
    for number, name in enumerate(policy.capabilities or (), 1):
        if name == "all" or name in names or (name.isdigit() and int(name) in known):
            continue
        raise _Fault(
            f"capabilities[{number}]",
            f"this kernel has no capability {show(str(name))}",
            did_you_mean(name, names) or "capabilities(7) lists them",
            name,
        )


def _templates(policy: Policy) -> Iterator[tuple[str, PathTemplate]]:
    accounts = [("user", policy.user), *_groups_named(policy)]
    yield from ((key, account.path) for key, account in accounts if account is not None and account.path)
    if policy.owner_must_be is not None:
        yield "owner_must_be", policy.owner_must_be


def _groups_named(policy: Policy) -> Iterator[tuple[str, Account]]:
    if policy.group is not None:
        yield "group", policy.group
    yield from ((f"groups[{number}]", group) for number, group in enumerate(policy.groups or (), 1))


# Paths


def _find_at_start(key: str, template: PathTemplate) -> paths.Owner:
    if template.placeholders:
        raise _OnlyWithWork
    return _find(key, template, {})


def _find(key: str, template: PathTemplate, attributes: Mapping[str, str]) -> paths.Owner:
    """Return the owner of the path that results from the template and the attributes of the work."""
    if not template.pieces:
        try:
            found = paths.owner(template)
        except KernelError as error:
            _blame(key, template, str(template), error)
        _check_found(key, template, str(template), found)
        return found
    path = _fill(key, template, attributes)
    directory = _open_trusted(key, template)
    try:
        found = paths.owner_beneath(directory, path)
    except KernelError as error:
        _blame(key, template, f"{template.trusted.rstrip('/')}/{path}", error)
    finally:
        posix.close(directory)
    _check_movers(key, template, path, found)
    _check_found(key, template, f"{template.trusted.rstrip('/')}/{path}", found)
    return found


def _check_movers(key: str, template: PathTemplate, path: str, found: paths.Owner) -> None:
    """Refuse a file reached by a link that another user may have made.

    Otherwise a tenant could link to another tenant's file, or move a link that belongs to root, to get that identity.
    """
    foreign = found.movers - {found.uid}
    if not foreign:
        return
    link = f"a link on the way to {show(path)}, which leads to a file of uid {found.uid}"
    if paths.ANYBODY in foreign:
        problem = f"any user can make {link}"
        hint = "use a file with one hard link, in directories that only their owner can write"
    else:
        problem = f"uid {min(foreign)} can change {link}"
        hint = (
            f"give the link and its directories to root, to the owner of {template.trusted}, "
            "or to the owner of the file"
        )
    raise _Fault(key, problem, hint, template, of_work=True)


def _check_found(key: str, template: PathTemplate, path: str, found: paths.Owner) -> None:
    """Refuse a path that may have been made by another user than its owner."""
    if found.names > 1:
        problem = f"{show(path)} has {found.names} hard links, and another user may have made one"
        hint = "copy the file, so that it has one hard link"
    elif found.open_to_all:
        problem, hint = f"every user can write to {show(path)}", "chmod o-w"
    else:
        return
    raise _Fault(key, problem, hint, template, of_work=True)


def _blame(key: str, template: PathTemplate, path: str, error: KernelError) -> NoReturn:
    if error.errno == errno.EXDEV:
        problem = f"{show(path)} leads out of {template.trusted}"
    elif error.errno == errno.ENOENT:
        problem = f"there is no {show(path)}"
    else:
        problem = f"{show(path)}: {os.strerror(error.errno or errno.EIO)}"
    hint = f"{key} needs the owner of this path"
    raise _Fault(key, problem, hint, template, of_work=error.errno in _OF_THE_PATH) from None


def _open_trusted(key: str, template: PathTemplate) -> int:
    try:
        return paths.open_directory(template.trusted)
    except KernelError as error:
        raise _Fault(
            key,
            f"{show(template.trusted)}, the trusted directory of the path: {os.strerror(error.errno or errno.EIO)}",
            "create that directory, or name another",
            template,
        ) from None


def _fill(key: str, template: PathTemplate, attributes: Mapping[str, str]) -> str:
    """Return the path below the trusted part. Raises `_Fault` for a value that is not a plain name."""
    parts = []
    for text, name in template.pieces:
        parts.append(text)
        if name is not None:
            value = attributes.get(name)
            problem = _wrong_with(name, value)
            if problem or value is None:
                hint = f"{show(str(template))} cannot be filled in"
                raise _Fault(key, problem or "", hint, template, of_work=True)
            parts.append(value.lstrip("/") if name == "path" else value)
    path = "".join(parts)
    if ".." in path.split("/"):
        raise _Fault(key, f"{show(path)} contains ..", ".. is not resolved", template, of_work=True)
    return path or "."  # the root of all paths is the trusted directory itself


def _wrong_with(name: str, value: object) -> str | None:
    if value is None:
        return f"the attribute {name} is missing"
    if not isinstance(value, str):
        return f"the attribute {name} is not text"
    if value in ("", ".", "..") or "\0" in value or ("/" in value and name != "path"):
        return f"the attribute {name} is {show(value)}, which is not a file name"
    return None
