"""``rcon check`` and ``rcon which``: what a policy file comes to here."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping
from typing import Any

import click

from rcon_plugins.confinement import cgroup_name
from rcon_plugins.errors import ConfinementError, RconError, SettingsError
from rcon_plugins.identity import check as check_identity
from rcon_plugins.identity import resolve
from rcon_plugins.isolation import Server
from rcon_plugins.kernel.cgroup import find_base
from rcon_plugins.plan import Plan
from rcon_plugins.routing import Router, normalise_host
from rcon_plugins.settings import Settings, load
from rcon_plugins.work import Work

SERVERS = {
    "sync": Server(threads=False),
    "gthread": Server(threads=True),
    "gevent": Server(threads=False, greenlets=True),
}
_WIDTH = 100


def check(file: str, server: str, as_json: bool) -> tuple[str, bool]:
    """What becomes of each policy, as text or JSON, and whether all is well."""
    found: dict[str, Any] = {"file": file, "good": False, "policies": {}, "problem": None}
    try:
        plan = Plan.make(load(file), SERVERS[server])
        found["policies"] = {name: _judged(plan, name) for name in plan.settings.policies}
        found["good"] = not any(judged["problems"] for judged in found["policies"].values())
        base = find_base(plan.hierarchy, plan.settings.cgroup)
        found["cgroup"] = base
        plan.within(plan.hierarchy.narrowed(base)).check()
    except RconError as error:
        found["good"] = False
        if not any(judged["problems"] for judged in found["policies"].values()):
            found["problem"] = str(error)
    return (json.dumps(found, indent=2) if as_json else _as_text(found)), found["good"]


def which(file: str, attributes: Mapping[str, str], as_json: bool) -> tuple[str, bool]:
    """Which route, policy, key and identity a work has, as text or JSON, and whether it would run. `SettingsError`."""
    plan = Plan.make(load(file))
    settings = plan.settings
    work = Work("command" if "command" in attributes else "request", "which", attributes)
    route = Router(settings.routes).find(work)
    policy = plan.plugins.hook.rcon_select_policy(work=work) or settings.fallback
    found: dict[str, Any] = {"route": None, "policy": policy, "key": None, "identity": None, "problem": None}
    if route is not None and route.policy == policy:
        found["route"] = route.order + 1
    if policy is None:
        found["unmatched"] = settings.unmatched
        if settings.unmatched == "refuse":
            found["problem"] = "no route names it, and there is no policy named default"
    elif policy not in settings.policies:
        found["problem"] = f"there is no policy {policy}"
    else:
        _add_details(found, settings, policy, attributes)
    return (json.dumps(found, indent=2) if as_json else _which_as_text(found)), found["problem"] is None


def attributes_of(named: Mapping[str, str | None], more: tuple[str, ...]) -> dict[str, str]:
    """The attributes of a work from the options. Raises click.UsageError."""
    found = {name: value for name, value in named.items() if value is not None}
    for one in more:
        name, equals, value = one.partition("=")
        if not equals or not name:
            raise click.UsageError(f"{one!r} is not NAME=VALUE")
        found[name] = value
    if "host" in found:
        found["host"] = normalise_host(found["host"])
    if not found:
        raise click.UsageError("say something of the work: --host, --path, --task ...")
    for number, segment in enumerate(found.get("path", "").split("/")[1:], 1):
        if segment:
            found.setdefault(f"path:{number}", segment)
    return found


def _judged(plan: Plan, name: str) -> dict[str, Any]:
    verdict = plan.verdicts[name]
    problems: list[dict[str, str | None]] = [
        {"limit": refusal.limit, "reason": refusal.reason, "remedy": refusal.remedy}
        for refusal in verdict.refusals
    ]
    try:
        check_identity(verdict.policy, plan.settings.file)
    except SettingsError as error:
        problems.append({"limit": error.key or "user", "reason": error.problem, "remedy": error.hint})
    return {
        "isolation": verdict.isolation,
        "why": verdict.why,
        "caveat": verdict.caveat,
        "problems": problems,
    }


def _add_details(
    found: dict[str, Any], settings: Settings, policy_name: str, attributes: Mapping[str, str]
) -> None:
    policy = settings.policies[policy_name]
    found["key"] = key = attributes.get(policy.per) if policy.per is not None else None
    found["cgroup"] = cgroup_name(policy_name, key)
    try:
        identity = resolve(policy, attributes)
    except ConfinementError as error:
        found["problem"] = str(error)
    else:
        found["identity"] = None if identity is None else identity._asdict()


def _as_text(found: Mapping[str, Any]) -> str:
    lines = []
    for name, judged in found["policies"].items():
        lines.append(_line(f"{name}: ", f"{judged['isolation']} - {judged['why']}"))
        if judged["caveat"]:
            lines.append(_line("    note: ", judged["caveat"]))
        lines += [
            _line("    REFUSED: ", f"{problem['limit']}: {problem['reason']} ({problem['remedy']})")
            for problem in judged["problems"]
        ]
    if found["problem"]:
        lines.append(_line("REFUSED: ", found["problem"]))
    elif found["good"]:
        count = len(found["policies"])
        lines.append(
            f"{found['file']}: {count} {'policy' if count == 1 else 'policies'} can be enforced here, "
            f"below the cgroup {found['cgroup']}"
        )
    return "\n".join(lines)


def _which_as_text(found: Mapping[str, Any]) -> str:
    route = f"route {found['route']}" if found["route"] else "no route"
    if found["policy"] is None:
        runs = "it runs without limits" if found["problem"] is None else "it is refused"
        return f"{route}, no policy: {runs}"
    lines = [f"{route}, policy {found['policy']}"]
    if found["key"] is not None:
        lines.append(f"key {found['key']!r}, in the cgroup {found['cgroup']}")
    if found["identity"] is not None:
        identity = found["identity"]
        groups = ", ".join(map(str, identity["groups"])) or "none"
        lines.append(f"as uid {identity['uid']}, gid {identity['gid']}, groups {groups}")
    if found["problem"]:
        lines.append(_line("REFUSED: ", found["problem"]))
    return "\n".join(lines)


def _line(label: str, text: str) -> str:
    return textwrap.fill(
        text,
        _WIDTH,
        initial_indent=label,
        subsequent_indent="    ",
        break_on_hyphens=False,
        break_long_words=False,
    )
