"""Make the tables, and tenants with a note each: ``python -m tests.integrations.celery.tenants.prepare NAME...``."""

from __future__ import annotations

import os
import sys

import django

if __name__ == "__main__":
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "tests.integrations.celery.tenants.settings")
    django.setup()
    from django.db import connection

    from tests.integrations.celery.tenants.models import Client, Domain

    with connection.schema_editor() as editor:
        editor.create_model(Client)
        editor.create_model(Domain)
    for name in sys.argv[1:]:
        Client(schema_name=name, name=name).save()
        with connection.cursor() as cursor:
            cursor.execute(f"CREATE SCHEMA {name}")
            cursor.execute(f"CREATE TABLE {name}.note (text text)")
            cursor.execute(f"INSERT INTO {name}.note VALUES ('of {name}')")
