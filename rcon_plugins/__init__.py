"""Confine each request or task of a Python web server or job runner with Linux cgroups and capabilities.

`Manager` and `Policy` are the core; `confine` is for any program; the adapters are the packages ``rcon_wsgi``,
``rcon_gunicorn`` and ``rcon_celery``. Errors are in `rcon_plugins.errors`; the kernel layer, useful by itself, is
`rcon_plugins.kernel`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rcon_plugins.confinement.admission import Admission
    from rcon_plugins.confinement.confine import Confined, confine
    from rcon_plugins.confinement.expansion import Expansion, expand
    from rcon_plugins.confinement.isolation import Server, Verdict
    from rcon_plugins.confinement.manager import Deployment, Manager
    from rcon_plugins.confinement.plan import Plan
    from rcon_plugins.confinement.running import RunningManager
    from rcon_plugins.groups.events import Event, Events, watch
    from rcon_plugins.hookspecs import hookimpl
    from rcon_plugins.kernel.cgroup import Resources
    from rcon_plugins.kernel.events import Pressure
    from rcon_plugins.outcome import Outcome
    from rcon_plugins.settings.file import Settings, load
    from rcon_plugins.settings.limits import Each, IoLimits, Limits
    from rcon_plugins.settings.memory import Memory
    from rcon_plugins.settings.policy import Policy
    from rcon_plugins.work import Usage, Work

__all__ = [
    "Admission",
    "Confined",
    "Deployment",
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
    "Resources",
    "RunningManager",
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

# Imported on first use: a command imports only what it needs, and the kernel layer nothing above it.
_HOMES = {
    "Admission": "confinement.admission",
    "Confined": "confinement.confine",
    "Deployment": "confinement.manager",
    "Each": "settings.limits",
    "Event": "groups.events",
    "Events": "groups.events",
    "Expansion": "confinement.expansion",
    "IoLimits": "settings.limits",
    "Limits": "settings.limits",
    "Manager": "confinement.manager",
    "Memory": "settings.memory",
    "Outcome": "outcome",
    "Plan": "confinement.plan",
    "Policy": "settings.policy",
    "Pressure": "groups.events",
    "Resources": "kernel.cgroup",
    "RunningManager": "confinement.running",
    "Server": "confinement.isolation",
    "Settings": "settings.file",
    "Usage": "work",
    "Verdict": "confinement.isolation",
    "Work": "work",
    "confine": "confinement.confine",
    "expand": "confinement.expansion",
    "hookimpl": "hookspecs",
    "load": "settings.file",
    "watch": "groups.events",
}


def __getattr__(name: str) -> object:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{home}"), name)
