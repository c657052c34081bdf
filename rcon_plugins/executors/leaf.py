"""The cgroup of one executor process."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from rcon_plugins.errors import KernelError
from rcon_plugins.kernel.cgroup import Resources

if TYPE_CHECKING:
    import pluggy

    from rcon_plugins.executors.fork_server import SpawnOrder
    from rcon_plugins.kernel.cgroup import Cgroup
    from rcon_plugins.settings.limits import Limits
    from rcon_plugins.tree.instance import Instance

#: How often a leaf is tried to be made while other workers remove what holds it.
_ATTEMPTS = 20


def make_leaf(instance: Instance, hook: pluggy.HookRelay, birth: SpawnOrder, limits: Limits) -> Cgroup:
    """Make ``work/<name>/<leaf>`` with all limits in force: ``limits`` are those of all work together.

    Until there is a leaf in it, another worker of the server, which has no use for it any more, may remove
    ``work/<name>``, and the limits with it: so they are written once the leaf holds it in place.
    """
    together, leaf = instance.policy_cgroup(birth.name), instance.executor_cgroup(birth.name, birth.leaf)
    whole = Resources.merged(hook.rcon_resources(limits=limits, policy=birth.policy))
    each = Resources.merged(hook.rcon_resources(limits=birth.policy.each, policy=birth.policy))
    for attempts_left in reversed(range(_ATTEMPTS)):
        try:
            leaf.create()
            together.configure(whole)
            leaf.configure(each)
            break
        except BaseException as error:
            gone = isinstance(error, KernelError) and error.errno in (errno.ENOENT, errno.ENODEV)
            if not gone or not attempts_left:
                leaf.delete()
                raise
    return leaf
