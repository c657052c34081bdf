"""A pool that rcon_celery does not know."""

from celery.concurrency.base import BasePool


class OwnPool(BasePool):
    pass
