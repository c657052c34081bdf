"""``rcon which``: the route, policy, key and user of a request, task or command."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from rcon_plugins.cli.exit import BadUsage
from rcon_plugins.confinement.plan import Plan
from rcon_plugins.errors import ConfinementError
from rcon_plugins.identity import userdb
from rcon_plugins.identity.resolution import resolve
from rcon_plugins.settings.file import Settings, load
from rcon_plugins.settings.routing import Router, normalise_host
from rcon_plugins.tree.group_names import cgroup_name
from rcon_plugins.work import Work


def which(file: str, attributes: Mapping[str, str], as_json: bool) -> tuple[str, bool]:
    """Return the route, policy, key and identity as text or JSON, and whether it would run. Raises `SettingsError`."""
    plan = Plan.make(load(file))
    settings = plan.settings
    work = Work("command" if "command" in attributes else "request", "which", attributes)
    route = Router(settings.routes).find(work)
    policy = plan.plugins.hook.rcon_select_policy(work=work) or settings.fallback
    found: dict[str, Any] = dict.fromkeys(("route", "policy", "per", "key", "cgroup", "identity", "problem"))
    if route is not None and route.policy == policy:
        found["route"] = route.order + 1
    found["policy"] = policy
    if policy is None:
        if settings.unmatched == "refuse":
            found["problem"] = (
                "no route matches, and there is no policy named default "
                '(add one, or write unmatched = "allow" to run without limits)'
            )
    elif policy not in settings.policies:
        found["problem"] = f"there is no policy {policy}"
    else:
        _add_details(found, settings, policy, attributes)
    return (json.dumps(found, indent=2) if as_json else _as_text(found)), found["problem"] is None


def attributes_of(named: Mapping[str, str | None], more: tuple[str, ...]) -> dict[str, str]:
    """Return the attributes that the options name. Raises BadUsage."""
    found = {name: value for name, value in named.items() if value is not None}
    for one in more:
        name, equals, value = one.partition("=")
        if not equals or not name:
            raise BadUsage(f"--attribute: {one!r} is not NAME=VALUE (for example remote_addr=192.0.2.1)")
        found[name] = value
    if "host" in found:
        found["host"] = normalise_host(found["host"])
    if not found:
        raise BadUsage("no attribute given: add --host, --path, --task ...")
    for number, segment in enumerate(found.get("path", "").split("/")[1:], 1):
        if segment:
            found.setdefault(f"path:{number}", segment)
    return found


def _add_details(
    found: dict[str, Any], settings: Settings, policy_name: str, attributes: Mapping[str, str]
) -> None:
    policy = settings.policies[policy_name]
    found["per"] = policy.per
    found["key"] = key = attributes.get(policy.per) if policy.per is not None else None
    found["cgroup"] = cgroup_name(policy_name, key)
    try:
        identity = resolve(policy, attributes)
    except ConfinementError as error:
        found["problem"] = str(error)
    else:
        found["identity"] = None if identity is None else identity._asdict()


def _as_text(found: Mapping[str, Any]) -> str:
    route = f"route {found['route']}" if found["route"] else "no route"
    policy = "no policy" if found["policy"] is None else f"policy {found['policy']}"
    lines = [f"{route}, {policy}"]
    if found["problem"]:
        lines.append(f"REFUSED: {' '.join(found['problem'].split())}")
    elif found["policy"] is None:
        lines.append('it runs without limits (unmatched = "allow")')
    else:
        key = "" if found["key"] is None else f"key {found['key']!r}, "
        if found["per"] is not None and found["key"] is None:
            key = f"no key, because it has no {found['per']}, "
        lines.append(f"{key}in the cgroup {found['cgroup']}")
        lines.append(_user(found["identity"]))
    return "\n".join(lines)


def _user(identity: Mapping[str, Any] | None) -> str:
    if identity is None:
        return "as the user of the server"
    groups = ", ".join(map(str, identity["groups"])) or "none"
    account = userdb.user(identity["uid"])
    name = f" ({account.name})" if account else ""
    return f"as uid {identity['uid']}{name}, gid {identity['gid']}, groups {groups}"
