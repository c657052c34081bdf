"""The step of a worker's start that makes its cgroups: before its pool makes processes, and refused with a reason."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from celery import bootsteps
from celery.exceptions import CeleryCommandException

from rcon_celery.pools import pool_of, refusal
from rcon_celery.worker import Node
from rcon_plugins.errors import ConfinementError, RconError

if TYPE_CHECKING:
    from rcon_celery.installation import Installation


class StartRefused(RconError, CeleryCommandException):  # type: ignore[misc]
    """Raised where a worker must not start. Celery prints the message alone and exits with 1."""

    def __init__(self, message: str) -> None:
        CeleryCommandException.__init__(self, message=message, exit_code=1)


def make_step(installation: Installation) -> type:
    """The step for a worker of this installation's application."""

    class Confinement(bootsteps.StartStopStep):  # type: ignore[misc]
        """Makes the worker's cgroups when it is created, and ends what still runs when the worker ends."""

        label = "rcon"

        def create(self, parent: Any) -> None:
            try:
                pool = pool_of(parent.pool_cls)
                if pool is None:
                    raise ConfinementError(refusal(parent.pool_cls))
                if pool.children and parent.pool_start_method != "fork":
                    raise ConfinementError(
                        f'worker_pool_start_method = "{parent.pool_start_method}": only processes that were forked '
                        'share the limits of a node; use "fork"'
                    )
                settings = installation.settings()
                names, policies = installation.marked(settings)
                node = Node.start(settings, names, policies, pool, parent.hostname, installation.most())
                node.events = bool(parent.task_events)
                installation.begin(node)
            except RconError as error:
                raise StartRefused(str(error)) from None

    return Confinement
