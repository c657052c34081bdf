"""A Django project whose aliases of one database differ in how long a connection lives.

A path names the alias that its request works with. Sessions have the name of their alias.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from typing import Any

import django
from django.conf import settings
from django.core.wsgi import get_wsgi_application
from django.db import connections, transaction
from django.http import HttpRequest, HttpResponseBase, JsonResponse, StreamingHttpResponse
from django.urls import path

#: What each alias changes.
KINDS: dict[str, dict[str, Any]] = {
    "closed": {"CONN_MAX_AGE": 0},
    "kept": {"CONN_MAX_AGE": None},
    "checked": {"CONN_MAX_AGE": None, "CONN_HEALTH_CHECKS": True},
    "pooled": {"CONN_HEALTH_CHECKS": True},
}
POOL = {"pool": {"min_size": 1, "max_size": 4}}


def database(name: str, **more: Any) -> dict[str, Any]:
    return {
        "ENGINE": "django.db.backends.postgresql",
        "NAME": os.environ["PGDATABASE"],
        "OPTIONS": {"application_name": name, **(POOL if name == "pooled" else {})},
        **more,
    }


settings.configure(
    ALLOWED_HOSTS=["*"],
    DATABASES={"default": {}, **{name: database(name, **more) for name, more in KINDS.items()}},
    ROOT_URLCONF=__name__,
    SECRET_KEY="of these tests",
)
django.setup()


def run(alias: str, statement: str, *values: object) -> Any:
    """Run a statement, and return its first row."""
    with connections[alias].cursor() as cursor:
        cursor.execute(statement, values)
        return cursor.fetchone()


def add(alias: str, name: str) -> dict[str, Any]:
    """Add an order. Return its transaction, its session, and how many other orders that session sees."""
    seen = "xmin::text, pg_backend_pid(), (SELECT count(*) FROM orders)"
    found = run(alias, f"INSERT INTO orders VALUES (%s) RETURNING {seen}", name)
    return dict(zip(("transaction", "session", "others"), found, strict=True), pid=os.getpid())


def order(request: HttpRequest, alias: str, name: str) -> HttpResponseBase:
    """Add an order in a transaction, and take some time."""
    with transaction.atomic(alias):
        found = add(alias, name)
        if "seconds" in request.GET:
            run(alias, "SELECT pg_sleep(%s)::text", request.GET["seconds"])
    return JsonResponse(found)


def leave_open(request: HttpRequest, alias: str, name: str) -> HttpResponseBase:
    """Begin a transaction, add an order, and leave both as they are."""
    transaction.set_autocommit(False, using=alias)
    return JsonResponse(add(alias, name))


def die(request: HttpRequest, alias: str, name: str) -> HttpResponseBase:
    """End the process in the middle of a transaction."""
    with transaction.atomic(alias):
        add(alias, name)
        os._exit(1)


def fail(request: HttpRequest, alias: str, name: str) -> HttpResponseBase:
    """Fail in the middle of a transaction."""
    with transaction.atomic(alias):
        add(alias, name)
        raise LookupError(name)


def stream(request: HttpRequest, alias: str, name: str) -> HttpResponseBase:
    """Use the database while the response is sent, when the view has returned; leave a transaction open."""

    def lines() -> Iterator[str]:
        transaction.set_autocommit(False, using=alias)
        for _ in range(3):
            yield f"{add(alias, name)['session']}\n"
            time.sleep(0.01)

    return StreamingHttpResponse(lines())


def health(request: HttpRequest) -> HttpResponseBase:
    return JsonResponse({"pid": os.getpid()})


def started() -> None:
    """Forget what was opened at load, as the page says."""
    for connection in connections.all():
        connection.close()
        if hasattr(connection, "close_pool"):
            connection.close_pool()


VIEWS = (order, leave_open, die, fail, stream)
urlpatterns = [path("", health), *(path(f"<alias>/{view.__name__}/<name>", view) for view in VIEWS)]
app = get_wsgi_application()
connections.all()  # import the driver before the server forks, as a model does
