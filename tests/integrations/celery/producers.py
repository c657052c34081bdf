"""The applications with which tests send tasks, and their connections."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import celery
from celery.backends.redis import RedisBackend


@contextlib.contextmanager
def closing(app: celery.Celery) -> Iterator[celery.Celery]:
    """Close an application with its connections, which its own ``close()`` leaves open for good."""
    try:
        yield app
    finally:
        if isinstance(app.backend, RedisBackend):
            app.backend.result_consumer.stop()
            app.backend.client.connection_pool.disconnect()
        for pool in (app.producer_pool, app.pool):  # which are those of one with the same broker, too
            pool.force_close_all(close_pool=False)
            pool.setup()  # or that one would wait for ever
        app.pool.connection.release()
        app.close()
