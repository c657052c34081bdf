"""Confine each request or task of a Python web server or job runner with Linux cgroups and capabilities.

`Manager` and `Policy` are the core; `confine` is for any program; the adapters are the packages ``rcon_wsgi`` and
``rcon_gunicorn``. Errors are in `rcon_plugins.errors`, the kernel's side, useful by itself, in `rcon_plugins.kernel`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rcon_plugins.admission import Admission
    from rcon_plugins.confined import Confined, confine
    from rcon_plugins.events import Event, Events, watch
    from rcon_plugins.expansion import Expansion, expand
    from rcon_plugins.hookspecs import hookimpl
    from rcon_plugins.isolation import Server, Verdict
    from rcon_plugins.kernel.cgroup.events import Pressure
    from rcon_plugins.manager import Manager
    from rcon_plugins.outcome import Outcome
    from rcon_plugins.plan import Plan
    from rcon_plugins.settings.file import Settings, load
    from rcon_plugins.settings.limits import Each, IoLimits, Limits
    from rcon_plugins.settings.memory import Memory
    from rcon_plugins.settings.policy import Policy
    from rcon_plugins.usage import Usage
    from rcon_plugins.work import Work

__all__ = [
    "Admission",
    "Confined",
    "Each",
    "Event",
    "Events",
    "Expansion",
    "IoLimits",
    "Limits",
    "Manager",
    "Memory",
    "Outcome",
    "Plan",
    "Policy",
    "Pressure",
    "Server",
    "Settings",
    "Usage",
    "Verdict",
    "Work",
    "confine",
    "expand",
    "hookimpl",
    "load",
    "watch",
]

# Imported when first asked for, so that a command pays for what it uses, and the kernel layer for nothing above it.
_HOMES = {
    "Admission": "admission",
    "Confined": "confined",
    "Each": "settings.limits",
    "Event": "events",
    "Events": "events",
    "Expansion": "expansion",
    "IoLimits": "settings.limits",
    "Limits": "settings.limits",
    "Manager": "manager",
    "Memory": "settings.memory",
    "Outcome": "outcome",
    "Plan": "plan",
    "Policy": "settings.policy",
    "Pressure": "events",
    "Server": "isolation",
    "Settings": "settings.file",
    "Usage": "usage",
    "Verdict": "isolation",
    "Work": "work",
    "confine": "confined",
    "expand": "expansion",
    "hookimpl": "hookspecs",
    "load": "settings.file",
    "watch": "events",
}


def __getattr__(name: str) -> object:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{home}"), name)
