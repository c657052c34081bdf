"""The lease of a task, where the process has no room for the thread that renews it."""

from __future__ import annotations

from rcon_celery.retry.lease import Heartbeat, Lease
from rcon_plugins.errors import MORE_PROCESSES, ConfinementError
from rcon_plugins.kernel.cgroup import Cgroup, Resources
from tests.kernel.cgroup.helpers import running


class Idle(Lease):
    """A lease that is never due."""

    def __init__(self) -> None:
        pass  # of no task

    def renew(self) -> bool:
        return False


def test_without_room_for_its_heartbeat_the_task_does_not_run(group: Cgroup) -> None:
    """The message has the remedy, and the next task begins once there is room."""
    group.configure(Resources(pids_max=1))

    def attempt() -> tuple[str, bool]:
        heartbeat, lease = Heartbeat(), Idle()
        try:
            heartbeat.add(lease)
        except ConfinementError as error:
            reason = str(error)
        group.configure(Resources(pids_max=2))
        heartbeat.add(lease)
        heartbeat.remove(lease)
        heartbeat.stop()
        return reason, True

    with running(group, attempt) as child:
        reason, began = child.result()
    assert reason == (
        "the lease of a task cannot be renewed: the thread rcon-heartbeat could not be started: "
        f"can't start new thread ({MORE_PROCESSES})"
    )
    assert began
