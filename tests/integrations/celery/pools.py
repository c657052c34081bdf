"""A pool of somebody's own."""

from celery.concurrency.base import BasePool


class OwnPool(BasePool):
    pass
