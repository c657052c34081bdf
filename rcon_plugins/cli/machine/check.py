"""``rcon check`` and ``rcon which``: what a policy file comes to here."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping
from typing import Any

import click

from rcon_plugins.confinement.confinement import cgroup_name
from rcon_plugins.confinement.isolation import Server
from rcon_plugins.confinement.plan import Plan
from rcon_plugins.errors import ConfinementError, KernelError, RconError, SettingsError
from rcon_plugins.identity import userdb
from rcon_plugins.identity.resolution import check as check_identity
from rcon_plugins.identity.resolution import resolve
from rcon_plugins.settings.file import Settings, load
from rcon_plugins.settings.routing import Router, normalise_host
from rcon_plugins.tree import systemd
from rcon_plugins.tree.base import find_base
from rcon_plugins.work import Work

SERVERS = {
    "sync": Server(threads=False),
    "gthread": Server(threads=True),
    "gevent": Server(threads=False, greenlets=True),
    "celery": Server(threads=False, tasks=True),
}
_WIDTH = 100
#: How those steps of a remedy begin that are words, not commands.
_NO_COMMAND = ("and ", "or ", "else ", "outside ")


def check(file: str, server: str, as_json: bool) -> tuple[str, bool]:
    """What becomes of each policy, as text or JSON, and whether all is well.

    The base that the cgroups would be in is only looked for, and made where root has none, if all else is well.
    """
    found: dict[str, Any] = {"file": file, "good": False, "cgroup": None, "policies": {}, "notes": []}
    found["problem"] = None
    try:
        plan = Plan.make(load(file), SERVERS[server])
        _add_verdicts(found, plan)
        plan.check_budget()
        if not _wrong(found):
            found["cgroup"] = base = find_base(plan.hierarchy, plan.settings.cgroup, systemd.enter_scope)
            # There it may have fewer controllers.
            _add_verdicts(found, plan.within(plan.hierarchy.narrowed(base)))
    except RconError as error:
        found["problem"] = _problem(error)
    found["good"] = not found["problem"] and not _wrong(found)
    return (json.dumps(found, indent=2) if as_json else _as_text(found)), found["good"]


def which(file: str, attributes: Mapping[str, str], as_json: bool) -> tuple[str, bool]:
    """Which route, policy, key and identity a work has, as text or JSON, and whether it would run. `SettingsError`."""
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
                'no route names it, and there is no policy named default (add one, or write unmatched = "allow" to '
                "run such work without limits)"
            )
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


def _add_verdicts(found: dict[str, Any], plan: Plan) -> None:
    found["policies"] = judged = {name: _judged(plan, name) for name in plan.settings.policies}
    caveats = tuple(one["caveat"] for one in judged.values() if one["caveat"])
    found["notes"] = [warning for warning in plan.warnings() if not warning.endswith(caveats)]


def _judged(plan: Plan, name: str) -> dict[str, Any]:
    verdict = plan.verdicts[name]
    problems: list[dict[str, str | None]] = [
        {"limit": refusal.limit, "reason": refusal.reason, "remedy": refusal.remedy}
        for refusal in verdict.refusals
    ]
    try:
        check_identity(verdict.policy)
    except SettingsError as error:
        limit = (error.key or "user").removeprefix(f"policy.{name}.")
        problems.append({"limit": limit, "reason": error.problem, "remedy": error.hint})
    return {
        "isolation": verdict.isolation,
        "why": verdict.why,
        "caveat": verdict.caveat,
        "problems": problems,
    }


def _wrong(found: Mapping[str, Any]) -> list[str]:
    return [name for name, judged in found["policies"].items() if judged["problems"]]


def _problem(error: RconError) -> dict[str, str | None]:
    """What is wrong with all of the file, or with this machine."""
    if isinstance(error, SettingsError):
        return {"key": error.key, "reason": error.problem, "remedy": error.hint}
    if isinstance(error, KernelError):
        return {"key": None, "reason": error.problem, "remedy": error.hint}
    return {"key": None, "reason": str(error), "remedy": None}


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
    lines = []
    for name, judged in found["policies"].items():
        lines.append(_line(f"{name}: ", f"{judged['isolation']} - {judged['why']}"))
        if judged["caveat"]:
            lines.append(_line("    note: ", judged["caveat"]))
        for problem in judged["problems"]:
            lines += _refused("    REFUSED: ", problem["limit"], problem)
    lines += [_line("note: ", note) for note in found["notes"]]
    if found["problem"]:
        key = found["problem"]["key"]
        where = f"{found['file']}: {key}" if key else found["file"]
        lines += _refused("REFUSED: ", where, found["problem"])
    elif found["good"]:
        lines.append(
            f"{found['file']}: {_counted(len(found['policies']))} can be enforced here, "
            f"below the cgroup {found['cgroup']}"
        )
    else:
        wrong, policies = len(_wrong(found)), _counted(len(found["policies"]))
        lines.append(f"{found['file']}: {wrong} of {policies} cannot be enforced here")
    return "\n".join(lines)


def _refused(label: str, where: str, problem: Mapping[str, str | None]) -> list[str]:
    """One paragraph; but a remedy of several steps has a line for each, to be copied."""
    text = f"{where}: {problem['reason']}"
    remedy = problem["remedy"]
    if not remedy:
        return [_line(label, text)]
    first, *more = remedy.split("; ")
    if not more:
        return [_line(label, f"{text} ({remedy})")]
    lead, colon, command = first.partition(": ")
    lines = [_line(label, text), f"    {lead}{colon}".rstrip()]
    for step in (command, *more) if command else more:
        lines.append(f"    {step}" if step.startswith(_NO_COMMAND) else f"        {step}")
    return lines


def _counted(number: int) -> str:
    return f"{number} {'policy' if number == 1 else 'policies'}"


def _which_as_text(found: Mapping[str, Any]) -> str:
    route = f"route {found['route']}" if found["route"] else "no route"
    policy = "no policy" if found["policy"] is None else f"policy {found['policy']}"
    lines = [f"{route}, {policy}"]
    if found["problem"]:
        lines.append(_line("REFUSED: ", found["problem"]))
    elif found["policy"] is None:
        lines.append("it runs without limits (unmatched)")
    else:
        key = "" if found["key"] is None else f"key {found['key']!r}, "
        if found["per"] is not None and found["key"] is None:
            key = f"no key, as it has no {found['per']}, "
        lines.append(f"{key}in the cgroup {found['cgroup']}")
        lines.append(_as_whom(found["identity"]))
    return "\n".join(lines)


def _as_whom(identity: Mapping[str, Any] | None) -> str:
    if identity is None:
        return "as the server's own user"
    groups = ", ".join(map(str, identity["groups"])) or "none"
    account = userdb.user(identity["uid"])
    name = f" ({account.name})" if account else ""
    return f"as uid {identity['uid']}{name}, gid {identity['gid']}, groups {groups}"


def _line(label: str, text: str) -> str:
    return textwrap.fill(
        text,
        _WIDTH,
        initial_indent=label,
        subsequent_indent="    ",
        break_on_hyphens=False,
        break_long_words=False,
    )
