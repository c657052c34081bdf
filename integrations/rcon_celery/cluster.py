"""What every worker of an application confines, over Celery's own remote control: ``celery -A proj inspect rcon``."""

from __future__ import annotations

import logging
import time
from typing import Any

from celery.worker.control import control_command, inspect_command

from rcon_celery.worker import Node
from rcon_plugins.errors import KernelError, RconError
from rcon_plugins.groups.find import Group, find_groups
from rcon_plugins.groups.sample import as_data
from rcon_plugins.settings.limit_words import as_written

_NOT_CONFINED = {"error": "tasks are not confined: the application was not given to rcon_celery.install"}
_log = logging.getLogger("rcon")


def register() -> None:
    """Make the command known: to workers, and to ``celery inspect``, which loads the application too."""
    inspect_command(name="rcon", default_timeout=5.0)(rcon)
    control_command(
        name="rcon_set",
        args=[("policy", str), ("key", str), ("value", str)],
        signature="POLICY LIMIT VALUE",
        default_timeout=5.0,
    )(rcon_set)


def rcon(state: Any) -> dict[str, Any]:
    """Policies, running confinements, what they use, and deaths."""
    node = node_of(state)
    return _NOT_CONFINED if node is None else report(node)


def rcon_set(state: Any, policy: str = "", key: str = "", value: str = "") -> dict[str, Any]:
    """Change a limit of a policy, for tasks from now on and those that run."""
    node = node_of(state)
    if node is None:
        return _NOT_CONFINED
    if not (policy and key and value):
        return {"error": "say POLICY LIMIT VALUE, all three: rcon_set reports each.memory 512M"}
    try:
        made = node.change(policy, key, str(value))
    except RconError as error:
        return {"error": " ".join(str(error).split())}
    told = {"policy": policy, "limit": key, "old": made.old, "new": made.new}
    _log.warning("rcon: %s: %s is %s now, and was %s", policy, key, made.new, made.old or "not set")
    return {"ok": {**told, "cgroups": made.cgroups, "kept": made.kept}}


def node_of(state: Any) -> Node | None:
    """What the worker confines, if it does."""
    installation = getattr(state.app, "rcon", None)
    found: Node | None = None if installation is None else installation.node
    return found


def report(node: Node) -> dict[str, Any]:
    """What a worker tells of itself, as plain data; sizes are in bytes, times in seconds."""
    return {
        "when": time.monotonic(),
        "cgroup": node.instance.path,
        "policies": {name: written(policy) for name, policy in sorted(node.policies.items())},
        "confinements": confinements(node),
        "deaths": node.tally.read(),
    }


def written(policy: Any) -> dict[str, Any]:
    """The limits of a policy as a settings file spells them, without what is not set."""
    found = {name: as_written(getattr(policy, name)) for name in policy.asks() if "." not in name}
    each = {name: as_written(getattr(policy.each, name)) for name in policy.each.asks()}
    if policy.concurrency is not None:
        found["concurrency"] = policy.concurrency
    found |= {name: as_written(getattr(policy, name)) for name in policy.wants_tries}
    return {**found, "each": each} if each else found


def confinements(node: Node) -> dict[str, dict[str, Any]]:
    """The confinements of a worker that there are just now, by name."""
    instance = node.instance.path.rpartition("/")[2]
    found = {}
    for group in find_groups().groups:
        if group.instance == instance and group.kind == "work":
            try:
                found[group.name] = usage(group)
            except KernelError:
                continue  # it has gone meanwhile
    return found


def usage(group: Group) -> dict[str, Any]:
    """What a confinement uses, all its tasks together, and how many processes run in it."""
    return {"processes": len(group.pids()), **as_data(group.sample())}
