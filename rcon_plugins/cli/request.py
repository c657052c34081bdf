"""What a command line asks for, read and looked up: users, groups, capabilities, files."""

from __future__ import annotations

import difflib
import grp
import os
import pwd
from dataclasses import dataclass

import click

from rcon_plugins.kernel.capability import Capabilities, Identity

_HIGHEST_ID = 2**32 - 2  # the one above means "leave as it is" to the kernel


@dataclass(frozen=True)
class Asked:
    """What the command shall be and hold.

    ``identity`` None: that of the caller. ``keep`` None: nothing was said about capabilities, those of the caller
    stay. ``read`` and ``write`` None: Landlock is not asked for.
    """

    command: tuple[str, ...]
    identity: Identity | None = None
    keep: Capabilities | None = None
    no_new_privs: bool = False
    read: tuple[str, ...] | None = None
    write: tuple[str, ...] | None = None
    keep_env: bool = False

    @classmethod
    def of(
        cls,
        *,
        command: tuple[str, ...],
        user: str | None,
        group: str | None,
        groups: str | None,
        caps: tuple[str, ...],
        drop_all: bool,
        no_new_privs: bool,
        read_only: tuple[str, ...],
        write: tuple[str, ...],
        keep_env: bool,
    ) -> Asked:
        """From the options of the command line. Raises `click.UsageError`."""
        if not command[0]:
            raise click.UsageError("the command is empty: name a program after --")
        if drop_all and caps:
            raise click.UsageError("--drop-all leaves nothing for --cap to name: give one of them")
        if user is None and (group is not None or groups is not None):
            raise click.UsageError("--group and --groups need --user: add --user, it may be your own")
        files = bool(read_only or write)
        if files and not no_new_privs:
            raise click.UsageError(
                "--read-only and --write need --no-new-privs, or a setuid program could be led astray: add it"
            )
        if "" in (*read_only, *write):
            raise click.UsageError(
                "--read-only or --write has an empty path: name one, . is the working directory"
            )
        keep = parse_capabilities(caps) if caps or drop_all or user is not None else None
        return cls(
            command=command,
            identity=None if user is None else look_up(user, group, groups),
            keep=keep,
            no_new_privs=no_new_privs,
            read=read_only if files else None,
            write=write if files else None,
            keep_env=keep_env,
        )


def is_number(text: str) -> bool:
    """Whether it is written in the digits 0 to 9 alone."""
    return text.isascii() and text.isdigit()


def short_names() -> list[str]:
    """The capabilities that this kernel knows, as one writes them: net_raw."""
    return [name.removeprefix("cap_") for name in Capabilities.known().names()]


def parse_capabilities(texts: tuple[str, ...]) -> Capabilities:
    """The capabilities that the values of --cap name together. Raises `click.UsageError`."""
    wanted = Capabilities.none()
    for name in (part.strip() for text in texts for part in text.split(",")):
        try:
            found = Capabilities.parse(name)
        except ValueError:
            near = difflib.get_close_matches(name.lower().removeprefix("cap_"), short_names(), n=1)
            hint = f"did you mean {near[0]}?" if near else "capabilities(7) lists them"
            raise click.UsageError(f"unknown capability {name!r}: {hint}") from None
        if not found <= Capabilities.known():
            last = len(Capabilities.known()) - 1
            raise click.UsageError(f"this kernel has no capability {name}: its last is {last}")
        wanted |= found
    return wanted


def look_up(user: str, group: str | None, groups: str | None) -> Identity:
    """The ids of a user and its groups, as the databases have them (getpwnam(3), getgrouplist(3)).

    A number is an id, also where a user has it for a name. Raises `click.UsageError`.
    """
    account = find_account(user)
    if account is None and not is_number(user):
        near = difflib.get_close_matches(user, [entry.pw_name for entry in pwd.getpwall()], n=1)
        hint = f"did you mean {near[0]}?" if near else "getent passwd lists them"
        raise click.UsageError(f"unknown user {user!r}: {hint}")
    uid = _number(user) if account is None else account.pw_uid
    if group is not None:
        gid = _group(group)
    elif account is not None:
        gid = account.pw_gid
    else:
        raise click.UsageError(f"uid {uid} has no account, and so no group: add --group")
    if groups is not None:
        others = [_group(name.strip()) for name in groups.split(",") if name.strip()]
    else:
        others = [] if account is None else os.getgrouplist(account.pw_name, gid)
    return Identity(uid, gid, tuple(sorted(set(others))))


def find_account(user: str | int) -> pwd.struct_passwd | None:
    """The account of this name or uid; None where there is none."""
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
        raise click.UsageError(f"unknown group {group!r}: {hint}") from None


def _number(text: str | int) -> int:
    number = int(text) if len(str(text)) <= 10 else _HIGHEST_ID + 1
    if number > _HIGHEST_ID:
        raise click.UsageError(f"{text} is no user or group id: they end at {_HIGHEST_ID}")
    return number
