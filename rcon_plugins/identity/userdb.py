"""The user and group databases of this machine, cached: passwd(5), group(5), nsswitch.conf(5).

Results, including "not found", are cached for `LIFE` seconds, since a database may be remote. Thread-safe.
"""

from __future__ import annotations

import errno
import grp
import os
import pwd
import time
from collections.abc import Callable
from typing import Final, NamedTuple, TypeVar, TypeVarTuple

from rcon_plugins.errors import KernelError

#: How long a result is cached, seconds.
LIFE: Final = 10.0

_MOST = 4096  # results in the cache
_Asked = TypeVarTuple("_Asked")
_Answer = TypeVar("_Answer")


class Entry(NamedTuple):
    """The fields of an entry of the user database that matter here."""

    name: str
    uid: int
    gid: int


_kept: dict[tuple[object, ...], tuple[float, object]] = {}


def _for_a_while(ask: Callable[[*_Asked], _Answer]) -> Callable[[*_Asked], _Answer]:
    """Cache the results of a function, including "not found", for `LIFE` seconds.

    The function raises `KernelError` (ENOMEM) if there is no memory for an entry.
    """

    def answer(*asked: *_Asked) -> _Answer:
        now = time.monotonic()
        known = _kept.get((ask, *asked))
        if known is not None and now < known[0]:
            return known[1]  # type: ignore[return-value]
        try:
            found = ask(*asked)
        except MemoryError:  # of getpwnam(3) and the like: ENOMEM, or an entry that is too large
            raise KernelError(
                "the user database cannot be read: there is no memory for the entry",
                errno=errno.ENOMEM,
                path="getpwnam(3), getgrnam(3)",
                hint="try again when the machine has more free memory",
            ) from None
        if len(_kept) >= _MOST:
            _kept.clear()
        _kept[(ask, *asked)] = (now + LIFE, found)
        return found

    return answer


@_for_a_while
def user(who: str | int) -> Entry | None:
    """Return the user with that name or uid; None if there is none."""
    try:
        known = pwd.getpwuid(who) if isinstance(who, int) else pwd.getpwnam(who)
    except KeyError:
        return None
    return Entry(known.pw_name, known.pw_uid, known.pw_gid)


@_for_a_while
def group_named(name: str) -> int | None:
    """Return the gid of the group with that name; None if there is none."""
    try:
        return grp.getgrnam(name).gr_gid
    except KeyError:
        return None


@_for_a_while
def groups(name: str, gid: int) -> tuple[int, ...]:
    """Return the groups of a user and ``gid``, sorted; as initgroups(3) finds them. Raises `KernelError`."""
    try:
        return tuple(sorted(set(os.getgrouplist(name, gid))))
    except OSError as error:
        raise KernelError.from_oserror(error, path=f"the groups of {name}") from None


def forget() -> None:
    """Empty the cache."""
    _kept.clear()


@_for_a_while
def user_names() -> list[str]:
    """Return the names of the users that the database lists. Not every database lists all."""
    return [known.pw_name for known in pwd.getpwall()]


@_for_a_while
def group_names() -> list[str]:
    """Return the names of the groups that the database lists. Not every database lists all."""
    return [known.gr_name for known in grp.getgrall()]
