"""The user, groups, capabilities and files that a command line requests for its command."""

from __future__ import annotations

import difflib
import grp
import os
import pwd
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rcon_plugins.cli.exit import BadUsage
from rcon_plugins.kernel.capability import Capabilities, Identity

_HIGHEST_ID = 2**32 - 2  # 2**32 - 1 means "do not change" to the kernel


@dataclass(frozen=True)
class Request:
    """The rights to give to a command.

    ``identity``: None for that of the caller. ``keep``: the capabilities; None for those of the caller. ``read`` and
    ``write``: the paths that Landlock allows; None for no restriction.
    """

    command: tuple[str, ...]
    identity: Identity | None = None
    keep: Capabilities | None = None
    no_new_privs: bool = False
    read: tuple[str, ...] | None = None
    write: tuple[str, ...] | None = None
    keep_env: bool = False

    @classmethod
    def of(cls, options: Mapping[str, Any], command: tuple[str, ...]) -> Request:
        """Return the request of parsed options (`rcon_plugins.cli.options`). Raises `BadUsage`."""
        user, caps = options.get("user"), options.get("cap", ())
        read, write = options.get("read_only", ()), options.get("write", ())
        if "drop_all" in options and caps:
            raise BadUsage("--drop-all and --cap exclude each other (leave out one of them)")
        if user is None and ("group" in options or "groups" in options):
            raise BadUsage("--group and --groups need --user (add it; it may be your own)")
        restricted = bool(read or write)
        if restricted and "no_new_privs" not in options:
            raise BadUsage(
                "--read-only and --write need --no-new-privs, or setuid programs could be misled (add it)"
            )
        if "" in (*read, *write):
            raise BadUsage("--read-only or --write: the path is empty (name one; . is the working directory)")
        keep = parse_capabilities(caps) if caps or "drop_all" in options or user is not None else None
        return cls(
            command=command,
            identity=None if user is None else look_up(user, options.get("group"), options.get("groups")),
            keep=keep,
            no_new_privs="no_new_privs" in options,
            read=tuple(read) if restricted else None,
            write=tuple(write) if restricted else None,
            keep_env="keep_env" in options,
        )


def is_number(text: str) -> bool:
    """Return whether ``text`` consists of the digits 0 to 9."""
    return text.isascii() and text.isdigit()


def short_names() -> list[str]:
    """Return the capabilities of this kernel without ``cap_``: ``net_raw``."""
    return [name.removeprefix("cap_") for name in Capabilities.known().names()]


def parse_capabilities(texts: Sequence[str]) -> Capabilities:
    """Return the capabilities that the values of --cap name together. Raises `BadUsage`."""
    wanted = Capabilities.none()
    for name in (part.strip() for text in texts for part in text.split(",")):
        try:
            found = Capabilities.parse(name)
        except ValueError:
            near = difflib.get_close_matches(name.lower().removeprefix("cap_"), short_names(), n=1)
            hint = f"did you mean {near[0]}?" if near else "capabilities(7) lists them"
            raise BadUsage(f"--cap: unknown capability {name!r} ({hint})") from None
        if not found <= Capabilities.known():
            last = len(Capabilities.known()) - 1
            raise BadUsage(f"--cap: this kernel has no capability {name} (the highest is {last})")
        wanted |= found
    return wanted


def look_up(user: str, group: str | None, groups: str | None) -> Identity:
    """Return the ids of a user and its groups from the databases (getpwnam(3), getgrouplist(3)).

    A number is always an id, never a name. Raises `BadUsage`.
    """
    account = find_account(user)
    if account is None and not is_number(user):
        near = difflib.get_close_matches(user, [entry.pw_name for entry in pwd.getpwall()], n=1)
        hint = f"did you mean {near[0]}?" if near else "getent passwd lists them"
        raise BadUsage(f"--user: unknown user {user!r} ({hint})")
    uid = _number(user) if account is None else account.pw_uid
    if group is not None:
        gid = _group(group)
    elif account is not None:
        gid = account.pw_gid
    else:
        raise BadUsage(f"--user: uid {uid} has no account, and so no group (add --group)")
    if groups is not None:
        others = [_group(name.strip()) for name in groups.split(",") if name.strip()]
    else:
        others = [] if account is None else os.getgrouplist(account.pw_name, gid)
    return Identity(uid, gid, tuple(sorted(set(others))))


def find_account(user: str | int) -> pwd.struct_passwd | None:
    """Return the account of this name or uid, or None."""
    try:
        if isinstance(user, int) or is_number(user):
            return pwd.getpwuid(_number(user))
        return pwd.getpwnam(user)
    except KeyError:
        return None


def _group(group: str) -> int:
    if is_number(group):
        return _number(group)
    try:
        return grp.getgrnam(group).gr_gid
    except KeyError:
        near = difflib.get_close_matches(group, [entry.gr_name for entry in grp.getgrall()], n=1)
        hint = f"did you mean {near[0]}?" if near else "getent group lists them"
        raise BadUsage(f"--group: unknown group {group!r} ({hint})") from None


def _number(text: str | int) -> int:
    number = int(text) if len(str(text)) <= 10 else _HIGHEST_ID + 1
    if number > _HIGHEST_ID:
        raise BadUsage(f"{text} is not a user or group id (the highest is {_HIGHEST_ID})")
    return number
