"""The user and group databases of this machine, asked seldom: passwd(5), group(5), nsswitch.conf(5).

Answers, also "there is none", are remembered for `LIFE` seconds, since a database may be far away. Safe in threads.
"""

from __future__ import annotations

import grp
import os
import pwd
import time
from collections.abc import Callable
from typing import Final, NamedTuple, TypeVar, TypeVarTuple

#: For how many seconds an answer is kept.
LIFE: Final = 10.0

_MOST = 4096  # answers kept
_Asked = TypeVarTuple("_Asked")
_Answer = TypeVar("_Answer")


class Entry(NamedTuple):
    """Of an entry of the user database, what matters here."""

    name: str
    uid: int
    gid: int


_kept: dict[tuple[object, ...], tuple[float, object]] = {}


def _for_a_while(ask: Callable[[*_Asked], _Answer]) -> Callable[[*_Asked], _Answer]:
    """Keep the answers, also "there is none", for `LIFE` seconds."""

    def answer(*asked: *_Asked) -> _Answer:
        now = time.monotonic()
        known = _kept.get((ask, *asked))
        if known is not None and now < known[0]:
            return known[1]  # type: ignore[return-value]
        found = ask(*asked)
        if len(_kept) >= _MOST:
            _kept.clear()
        _kept[(ask, *asked)] = (now + LIFE, found)
        return found

    return answer


@_for_a_while
def user(who: str | int) -> Entry | None:
    """The user of that name, or of that number."""
    try:
        known = pwd.getpwuid(who) if isinstance(who, int) else pwd.getpwnam(who)
    except KeyError:
        return None
    return Entry(known.pw_name, known.pw_uid, known.pw_gid)


@_for_a_while
def group_named(name: str) -> int | None:
    """The number of the group of that name."""
    try:
        return grp.getgrnam(name).gr_gid
    except KeyError:
        return None


@_for_a_while
def groups(name: str, gid: int) -> tuple[int, ...]:
    """The groups of a user, and ``gid``, in order; as initgroups(3) finds them."""
    return tuple(sorted(set(os.getgrouplist(name, gid))))


def forget() -> None:
    """Ask anew from now on."""
    _kept.clear()


@_for_a_while
def user_names() -> list[str]:
    """The users that the database lists; not every database lists all of its own."""
    return [known.pw_name for known in pwd.getpwall()]


@_for_a_while
def group_names() -> list[str]:
    """The groups that the database lists; not every database lists all of its own."""
    return [known.gr_name for known in grp.getgrall()]
