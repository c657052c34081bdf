"""Make the tables of the project: ``python -m tests.integrations.celery.shop.migrate``."""

from __future__ import annotations

import os

import django
from django.core.management import call_command

if __name__ == "__main__":
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "tests.integrations.celery.shop.settings")
    django.setup()
    call_command("migrate", run_syncdb=True, verbosity=0)
