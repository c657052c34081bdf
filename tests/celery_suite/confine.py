"""A pytest plugin: every task of the application under test runs confined."""

from __future__ import annotations

from typing import Any

from celery.contrib.testing import app as testing

from rcon_celery import install
from rcon_plugins.settings.file import from_mapping

SETTINGS = {
    "policy": {"each-task": {"memory": "4G", "each": {"memory": "1G", "timeout": "600s"}}},
    "route": [{"task": "**", "policy": "each-task"}],
}

_made = testing.TestApp


def confined_app(*arguments: Any, **parameters: Any) -> Any:
    """What `TestApp` makes, installed."""
    made = _made(*arguments, **parameters)
    install(made, from_mapping(SETTINGS))
    return made


testing.TestApp = confined_app
