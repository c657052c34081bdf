"""``rcon doctor``: which limits work on this machine, and a remedy for each that does not."""

from __future__ import annotations

import json
import os
from typing import Any

import msgspec

from rcon_plugins.cli.exit import BadUsage, Refused
from rcon_plugins.identity import userdb
from rcon_plugins.kernel import descriptors
from rcon_plugins.kernel.capability import Identity, drop
from rcon_plugins.tree.doctor import Finding, Report, examine

#: The steps of a remedy that begin so are prose, not commands.
_NO_COMMAND = ("and ", "or ", "outside ")
_MARKS = {"there": "ok", "missing": "NO", "absent": "--"}
_AREAS = {
    "machine": "this machine",
    "kernel": "its kernel",
    "limits": "limits",
    "works": "what works",
}


def doctor(user: str | None, as_json: bool, base: str | None = None) -> tuple[str, bool]:
    """Return the findings as text or JSON, and whether every limit can be set. ``base`` is the cgroup to use."""
    report = examine(base) if user is None else _as_user(user, base)
    good = not report.missing
    if as_json:
        found: dict[str, Any] = {"good": good, **report._asdict()}
        found["findings"] = [finding._asdict() for finding in report.findings]
        found["missing"] = [finding._asdict() for finding in report.missing]
        return json.dumps(found, indent=2), good
    return _as_text(report), good


def _as_user(name: str, base: str | None) -> Report:
    """Return the report of a child process that becomes the user. Raises Refused."""
    account = userdb.user(int(name) if name.isdigit() else name)
    if account is None:
        raise BadUsage(f"--user: unknown user {name!r} (getent passwd lists them)")
    if os.geteuid() != 0:
        raise BadUsage(f"--user needs root (sudo rcon doctor --user {name}, or: sudo -u {name} rcon doctor)")
    reading, writing = descriptors.pipe()
    child = descriptors.fork_beside(reading, writing)
    if child == 0:
        status = 1
        try:
            os.close(reading)
            drop(Identity(account.uid, account.gid, userdb.groups(account.name, account.gid)))
            report = examine(base)
            with os.fdopen(writing, "wb") as pipe:
                pipe.write(msgspec.json.encode(report))
            status = 0
        finally:
            os._exit(status)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        data = pipe.read()
    os.waitpid(child, 0)
    if not data:
        raise Refused(f"--user: the examination as {name} failed (run rcon doctor as {name})")
    return msgspec.json.decode(data, type=Report)


def _as_text(report: Report) -> str:
    account = userdb.user(report.user)
    who = f"{account.name} (uid {report.user})" if account else f"uid {report.user}"
    layout = f"cgroup {report.layout}" if report.layout else "no cgroups"
    lines = [f"Linux {report.kernel}, {layout}, as {who}"]
    for area, title in _AREAS.items():
        lines += ["", title]
        for finding in report.findings:
            if finding.area == area:
                lines += _finding_lines(finding)
    held = report.capabilities
    lines += ["", f"capabilities: {'all' if len(held) > 38 else ', '.join(held) or 'none'}"]
    if report.missing:
        names = ", ".join(finding.name for finding in report.missing)
        lines += ["", f"missing for limits: {names}"]
    else:
        lines += ["", f"every limit can be set here, below the cgroup {report.base}"]
    return "\n".join(lines)


def _finding_lines(finding: Finding) -> list[str]:
    """Return the line of a finding, and below it the remedy, a line for each step, so that they can be copied."""
    lines = [f"  {_MARKS[finding.state]}  {finding.name}: {finding.text}"]
    if finding.remedy and finding.state != "there":
        first, *more = finding.remedy.split("; ")
        lead, colon, command = first.partition(": ")
        if more and colon:
            lines.append(f"        {lead}:")
            more.insert(0, command)
        else:
            lines.append(f"        {first}")
        lines += [
            f"        {step}" if step.startswith(_NO_COMMAND) else f"            {step}" for step in more
        ]
    return lines
