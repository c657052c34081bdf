"""The application, ``app``, and its tasks."""

from __future__ import annotations

import os
from typing import Any

import django
from tenant_schemas_celery.app import CeleryApp

application: Any = CeleryApp
app = application("tenants")
app.config_from_object("django.conf:settings", namespace="CELERY")
if "SHOP_POLICY" in os.environ:
    import rcon_celery

    rcon_celery.install(app, os.environ["SHOP_POLICY"])
django.setup()


@app.task(name="notes")
def notes() -> list[Any]:
    """Return the tenant, and the notes that the body sees."""
    from django.db import connection

    with connection.cursor() as cursor:
        cursor.execute("SELECT text FROM note")
        return [connection.schema_name, [text for (text,) in cursor.fetchall()]]


@app.task(name="send_notes")
def send_notes() -> str:
    """Send ``notes``, for the same tenant; return its id."""
    return str(notes.delay().id)
