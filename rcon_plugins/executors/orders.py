"""What host and fork server send each other: orders to make, kill or signal an executor process, and how each ended.

They talk over a ``SOCK_SEQPACKET`` pair. The host sends a `SpawnOrder` (with one end of the new executor's channel, and
of the pipe for its output), a `KillOrder` or a `SignalOrder`. The fork server sends an `ExitReport`. Both ends are this
project's own code, so orders are pickled; an exit report is a fixed record.
"""

from __future__ import annotations

import os
import pickle
import struct
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from rcon_plugins.kernel.capability import Identity
    from rcon_plugins.settings.policy import Policy

#: An order is at most this long, bytes.
LONGEST_ORDER = 128 * 1024
#: The most policies that the fork server keeps.
_MOST_POLICIES = 128
_EXIT_REPORT = struct.Struct("!qii")


class SpawnOrder(NamedTuple):
    """Make an executor process in the cgroup ``work/<name>/<leaf>``. It serves one policy until it ends.

    ``identity`` is the user and groups that it changes to; None keeps those of the server. With ``output``, a pipe
    comes with the order, for its output: see `InheritedFiles`.
    """

    number: int
    name: str
    leaf: str
    policy: Policy
    identity: Identity | None = None
    output: bool = False


def has_own_user(order: SpawnOrder) -> bool:
    """Return whether the executor process of an order runs as another user than this process."""
    return order.identity is not None and order.identity.uid != os.geteuid()


class KillOrder(NamedTuple):
    """Kill an executor process by its pid, because it may have left its cgroup.

    With ``cgroup``, its name and leaf as in `SpawnOrder`, kill all in that too: the host could not.
    """

    number: int
    cgroup: tuple[str, str] | None = None


class SignalOrder(NamedTuple):
    """Send a signal, which its service handles, to an executor process by its pid."""

    number: int
    signal: int


Order = SpawnOrder | KillOrder | SignalOrder


def pack(order: Order) -> bytes:
    """Return the message for an order."""
    if isinstance(order, SpawnOrder):
        number, name, leaf, policy, identity, output = order
        return pickle.dumps((number, name, leaf, pickle.dumps(policy), identity, output))
    return pickle.dumps(order)


def unpack(message: bytes) -> Order:
    """Return the order that a message encodes."""
    order = pickle.loads(message)  # noqa: S301 - from our own host, never from an executor process
    if type(order) is not tuple:
        return order  # type: ignore[no-any-return]
    number, name, leaf, policy, identity, output = order
    return SpawnOrder(number, name, leaf, _policy(policy), identity, output)


# Making a policy checks it, which touches 80 pages of memory. After each fork the fork server has to copy them again.
@lru_cache(_MOST_POLICIES)
def _policy(pickled: bytes) -> Policy:
    policy: Policy = pickle.loads(pickled)  # noqa: S301 - as above
    return policy


class ExitReport(NamedTuple):
    """An executor process ended with a wait status. With pid 0 it could not be forked, and ``status`` is an errno."""

    number: int
    pid: int
    status: int

    def pack(self) -> bytes:
        """Return the record to send."""
        return _EXIT_REPORT.pack(*self)

    @classmethod
    def unpack(cls, data: bytes) -> ExitReport:
        """Return the report that a record encodes."""
        return cls(*_EXIT_REPORT.unpack(data))
