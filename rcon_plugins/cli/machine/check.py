"""``rcon check``: how this machine would enforce each policy of a file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from rcon_plugins.cli.columns import paragraph
from rcon_plugins.confinement.isolation import Server
from rcon_plugins.confinement.plan import Plan
from rcon_plugins.errors import KernelError, RconError, SettingsError, on_one_line
from rcon_plugins.identity.resolution import check as check_identity
from rcon_plugins.settings.file import load
from rcon_plugins.tree import systemd
from rcon_plugins.tree.base import look_for_base

SERVERS = {
    "sync": Server(threads=False),
    "gthread": Server(threads=True),
    "gevent": Server(threads=False, greenlets=True),
    "celery": Server(threads=False, tasks=True),
}
#: The steps of a remedy that begin so are prose, not commands.
_NO_COMMAND = ("and ", "or ", "else ", "outside ")


def check(file: str, server: str, as_json: bool) -> tuple[str, bool]:
    """Return how each policy would be enforced, as text or JSON, and whether all can be.

    Only if all can be, the base cgroup is looked for. What has to be made for that is removed again.
    """
    found: dict[str, Any] = {"file": file, "good": False, "cgroup": None, "policies": {}, "notes": []}
    found["problem"] = None
    try:
        plan = Plan.make(load(file), SERVERS[server])
        _add_verdicts(found, plan)
        plan.check_budget()
        if not _wrong(found):
            with plan.finding_base():
                base, hierarchy, first = look_for_base(
                    plan.hierarchy, plan.settings.cgroup, systemd.enter_scope
                )
            found["cgroup"] = base
            # The base may have fewer controllers than the machine.
            _add_verdicts(found, plan.within(hierarchy))
            found["notes"] += [first] if first else []
    except RconError as error:
        found["problem"] = _problem(error)
    found["good"] = not found["problem"] and not _wrong(found)
    return (json.dumps(found, indent=2) if as_json else _as_text(found)), found["good"]


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
    """Return an error about the whole file or the machine, for JSON."""
    if isinstance(error, SettingsError):
        return {"key": error.key, "reason": error.problem, "remedy": error.hint}
    if isinstance(error, KernelError):
        return {"key": None, "reason": error.problem, "remedy": error.hint}
    return {"key": None, "reason": str(error), "remedy": None}


def _as_text(found: Mapping[str, Any]) -> str:
    lines, file = [], on_one_line(found["file"])
    for name, judged in found["policies"].items():
        lines.append(paragraph(f"{name}: ", f"{judged['isolation']} - {judged['why']}"))
        if judged["caveat"]:
            lines.append(paragraph("    note: ", judged["caveat"]))
        for problem in judged["problems"]:
            lines.append(_one_line(f"    REFUSED: {problem['limit']}", problem))
    lines += [paragraph("note: ", note) for note in found["notes"]]
    if found["problem"]:
        lines += _refused(file, found["problem"])
    elif found["good"]:
        lines.append(
            f"{file}: {_counted(len(found['policies']))} can be enforced here, "
            f"below the cgroup {found['cgroup']}"
        )
    else:
        wrong, policies = len(_wrong(found)), _counted(len(found["policies"]))
        lines.append(f"{file}: {wrong} of {policies} cannot be enforced here")
    return "\n".join(lines)


def _refused(file: str, problem: Mapping[str, str | None]) -> list[str]:
    """Return a problem of the whole file, or of the machine.

    A fault in the file has a key and is one line. The machine's remedies can be commands: each has a line of its own,
    so that it can be copied.
    """
    if problem["key"]:
        return [_one_line(f"REFUSED: {file}: {problem['key']}", problem)]
    first, *more = (problem["remedy"] or "").split("; ")
    if not more:
        return [_one_line(f"REFUSED: {file}", problem)]
    lead, colon, command = first.partition(": ")
    lines = [_one_line(f"REFUSED: {file}", {**problem, "remedy": None}), f"    {lead}{colon}".rstrip()]
    for step in (command, *more) if command else more:
        lines.append(f"    {step}" if step.startswith(_NO_COMMAND) else f"        {step}")
    return lines


def _one_line(where: str, problem: Mapping[str, str | None]) -> str:
    """Return a problem as one line, however long, so that programs and people find it whole."""
    remedy = f" ({problem['remedy']})" if problem["remedy"] else ""
    text = " ".join(f"{problem['reason']}{remedy}".split())
    return on_one_line(f"{where}: {text}")


def _counted(number: int) -> str:
    return f"{number} {'policy' if number == 1 else 'policies'}"
