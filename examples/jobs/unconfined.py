"""The tasks without limits, for the first half of the demonstration: ``celery -A unconfined``."""

import rcon_celery

vars(rcon_celery).update(confined=lambda **_: lambda task: task, install=lambda _: None)

from tasks import app  # noqa: E402 - with the names above

__all__ = ["app"]
