"""The application of the shop, ``app``; and the handlers of signals that its tasks look at."""

from __future__ import annotations

import os
from typing import Any

import celery
import django
from celery import signals

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "tests.integrations.celery.shop.settings")

app = celery.Celery("shop")
app.config_from_object("django.conf:settings", namespace="CELERY")
if "SHOP_POLICY" in os.environ:
    import rcon_celery

    rcon_celery.install(app, os.environ["SHOP_POLICY"])

if "SHOP_STRUCTLOG" in os.environ:
    from django_structlog.celery.steps import DjangoStructLogInitStep

    app.steps["worker"].add(DjangoStructLogInitStep)

#: What a handler of ``task_prerun`` sets: the id of the task under way.
under_way: dict[str, str] = {}
django.setup()


@signals.task_prerun.connect
def begin(task_id: str, task: Any, **_: object) -> None:
    from django.utils import translation

    under_way["id"] = task_id
    translation.activate(task.request.get("language") or "en")


@signals.task_postrun.connect
def end(**_: object) -> None:
    under_way.clear()


@app.task(name="count")
def count(seconds: float = 0.0) -> list[int]:
    """Return the number of orders, the pid, and the pid of the database's session."""
    from django.db import connection

    from tests.integrations.celery.shop.models import Order

    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_backend_pid()")
        session = cursor.fetchone()[0]
        if seconds:
            cursor.execute("SELECT pg_sleep(%s)", [seconds])
    return [int(Order.objects.count()), os.getpid(), session]


@app.task(name="order")
def order(name: str) -> int:
    from tests.integrations.celery.shop.models import Order

    return int(Order.objects.create(name=name).pk)


@app.task(name="leave_open")
def leave_open(name: str) -> list[int]:
    """Begin a transaction, write a row, and leave both as they are."""
    from django.db import transaction

    transaction.set_autocommit(False)
    order(name)
    found: list[int] = count()
    return found


@app.task(name="context", bind=True)
def context(self: Any) -> list[Any]:
    """Return what the handlers of ``task_prerun`` have set, beside the id of the task."""
    from django.utils import translation

    return [self.request.id, under_way.get("id"), translation.get_language()]


@app.task(name="logged")
def logged() -> dict[str, Any]:
    """Return the context variables of structlog."""
    import structlog

    return structlog.contextvars.get_contextvars()
