"""Run a task that is due later once, even if its message was delivered several times before it was due.

A worker holds the message of such a task, unacknowledged, until the task is due. When Redis' visibility timeout or
RabbitMQ's consumer timeout is over, the broker delivers the message again, to this worker or another. All of them begin
to run the task when it is due. Celery's documentation of ``visibility_timeout`` says so.

If results are in Redis, each delivery claims the message there first, and one gets it. A task that is acknowledged late
may have to run again after its process died: its lease (`rcon_celery.retry.lease`) decides.
"""

from __future__ import annotations

import logging
from typing import Any

from celery.exceptions import Ignore

from rcon_celery.retry import redelivery
from rcon_celery.retry.lease import KEPT, is_redis

_log = logging.getLogger("rcon")


def claim(task: Any) -> None:
    """Claim the message of a task that was due later and is acknowledged already.

    Raises `Ignore` if another delivery of the message has claimed it. Another message with the same id, such as a
    retry, has another number of retries or another time.
    """
    eta = task.request.eta
    if not eta or not is_redis(backend := task.backend):
        return
    key = backend.key_t(f"rcon-due-{redelivery.message_id(task)}-{eta}")
    try:
        claimed = backend.client.set(key, "1", nx=True, ex=int(backend.expires or KEPT))
    except Exception as error:  # noqa: BLE001 - each client raises its own; the broker no longer has the message
        _log.warning(
            "rcon: %s[%s] runs, but it cannot be seen whether it has run: the result backend cannot be reached: %s",
            task.name,
            task.request.id,
            error,
        )
        return
    if not claimed:
        _log.warning(
            "rcon: %s[%s] was delivered again before it was due, and is ignored: another delivery runs it; "
            "set visibility_timeout above the longest countdown",
            task.name,
            task.request.id,
        )
        ignore: Exception = Ignore("another delivery runs it")
        raise ignore
