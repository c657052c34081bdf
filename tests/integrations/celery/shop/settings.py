"""The settings of the project, from environment variables."""

from __future__ import annotations

import os

SECRET_KEY = "of these tests"
USE_TZ = True
USE_I18N = True
LANGUAGES = [("en", "English"), ("de", "Deutsch")]
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
INSTALLED_APPS = [
    "django.contrib.contenttypes",
    "django.contrib.auth",
    "django_celery_results",
    "django_celery_beat",
    "tests.integrations.celery.shop",
]
if "SHOP_STRUCTLOG" in os.environ:
    INSTALLED_APPS.append("django_structlog")
    DJANGO_STRUCTLOG_CELERY_ENABLED = True
DATABASES = {
    "default": {
        "ENGINE": "django.db.backends.postgresql",
        "HOST": "127.0.0.1",
        "USER": "postgres",
        "PORT": os.environ["SHOP_PORT"],
        "NAME": os.environ["SHOP_DATABASE"],
        "CONN_MAX_AGE": int(os.environ.get("SHOP_CONN_MAX_AGE", "0")),
    }
}
CELERY_BROKER_URL = os.environ["SHOP_BROKER"]
CELERY_RESULT_BACKEND = os.environ.get("SHOP_BACKEND", CELERY_BROKER_URL)
CELERY_RESULT_EXTENDED = True
CELERY_BROKER_CONNECTION_RETRY_ON_STARTUP = True
CELERY_BEAT_MAX_LOOP_INTERVAL = 1
