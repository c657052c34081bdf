"""``capcon explain``: predict which rights a command will hold after execve(2), and why.

This process takes the requested user and capabilities itself. So the kernel refuses here whatever it would refuse to
``capcon run``. Only the last step, execve, is predicted.
"""

from __future__ import annotations

import errno
import os
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rcon_plugins.cli.capcon import run, show
from rcon_plugins.cli.options import EXPLAIN_OPTIONS, parse
from rcon_plugins.cli.program import find_program
from rcon_plugins.cli.request import Request
from rcon_plugins.errors import CapabilityError
from rcon_plugins.kernel import landlock, seccomp
from rcon_plugins.kernel.capability import Capabilities, State, read_state
from rcon_plugins.kernel.capability.exec_rule import File, Prediction, predict
from rcon_plugins.kernel.proc import exec_remedy


def explain(words: Sequence[str]) -> tuple[str, bool]:
    """Return the explanation for the words after ``capcon explain``, and whether the command would get the request.

    Raises `BadUsage`, `HelpRequested` and `Refused`.
    """
    options, command = parse(words, EXPLAIN_OPTIONS)
    as_json = "json" in options
    request = Request.of(options, command)
    program = find_program(command[0])
    file = run.executable(program)
    try:
        run.become(request)
    except CapabilityError as error:
        return refused(request, program, error, as_json), False
    before = read_state()
    prediction = predict(before, file)
    if prediction.error is None:
        problems = [
            *run.problems(request, prediction.state),
            *access_problems(request, program, file),
            *file_problems(request),
        ]
    else:
        problems = [f"cannot be executed with these rights: {prediction.steps[-1].why}"]
    if as_json:
        text = show.as_text(as_data(request, program, before, prediction, problems))
    else:
        text = as_page(request, program, before, prediction, problems)
    return text, not problems


def refused(request: Request, program: str, error: CapabilityError, as_json: bool) -> str:
    """Return the explanation for a caller that may not give the requested rights."""
    if as_json:
        return show.as_text(
            {**request_data(request, program), "problems": [str(error)], "as_requested": False}
        )
    return "\n".join(
        [*request_rows(request, program), verdict([f"cannot be run with these rights: {error}"])]
    )


def access_problems(request: Request, program: str, file: File) -> list[str]:
    """Return a problem if this process, as the requested user, may not execute a file that execve(2) opens."""
    if request.identity is None:
        return []
    paths = dict.fromkeys((program, *(script.path for script in file.scripts), file.path))
    closed = next((path for path in paths if not os.access(path, os.X_OK, effective_ids=True)), None)
    if closed is None:
        return []
    return [f"cannot be executed: {closed}: {exec_remedy(errno.EACCES, as_another=True)}"]


def file_problems(request: Request) -> list[str]:
    """Return why Landlock could not restrict the command to the requested files."""
    if request.read is None or request.write is None:
        return []
    if landlock.abi() == 0:
        return ["cannot be confined to these files: this kernel has no Landlock"]
    missing = [path for path in (*request.read, *request.write) if not Path(path).exists()]
    found = [f"cannot be confined to {path}: there is no such file" for path in missing]
    return found if seccomp.is_available() else [*found, f"can leave its cgroups: {seccomp.NONE_HERE}"]


def request_rows(request: Request, program: str) -> list[str]:
    """Return the request as lines of a table."""
    who = request.identity
    keep = "same as the caller" if request.keep is None else show.listed(request.keep)
    rows = [
        ("program", program),
        ("user", "same as the caller" if who is None else show.named(who.uid, show.user_name)),
        ("capabilities", keep),
        ("no_new_privs", "yes" if request.no_new_privs else "not requested"),
    ]
    if request.read is not None and request.write is not None:
        rows += [
            ("reads below", ", ".join(request.read) or "none"),
            ("writes below", ", ".join(request.write) or "none"),
        ]
    return [show.row(*pair) for pair in rows]


def as_page(
    request: Request, program: str, before: State, prediction: Prediction, problems: list[str]
) -> str:
    """Return the explanation as text."""
    lines = [*request_rows(request, program), "", "Before execve", show.table(before), "", "At execve"]
    for number, step in enumerate(prediction.steps, 1):
        lines += [indented(f"{number}. {step.what}"), indented(f"   {step.why}")]
    if not prediction.steps:
        lines.append("nothing changes: the file grants no rights, and execve removes none")
    lines += ["", "After execve", show.table(prediction.state), ""]
    lost, gained = difference(before, prediction.state)
    lines += [
        show.row("lost", show.listed(lost)),
        show.row("gained", show.listed(gained)),
        verdict(problems),
    ]
    return "\n".join(lines)


def verdict(problems: list[str]) -> str:
    """Return the last lines: whether the command would get the requested rights."""
    return "\n".join(show.row("no", f"the command {problem}") for problem in problems) or show.row(
        "yes", "the command will hold what was requested"
    )


def indented(text: str) -> str:
    """Return a step, or its reason, wrapped with its later lines indented."""
    return textwrap.fill(text, show.width(), subsequent_indent="   ", break_on_hyphens=False)


def difference(before: State, after: State) -> tuple[Capabilities, Capabilities]:
    """Return the capabilities that execve removes from the permitted set, and those it adds."""
    return before.permitted - after.permitted, after.permitted - before.permitted


def request_data(request: Request, program: str) -> dict[str, Any]:
    """Return the request for JSON; null means "not requested"."""
    who = request.identity
    return {
        "program": program,
        "command": list(request.command),
        "requested": {
            "uid": None if who is None else who.uid,
            "gid": None if who is None else who.gid,
            "groups": None if who is None else list(who.groups),
            "capabilities": None if request.keep is None else list(request.keep.names()),
            "no_new_privs": request.no_new_privs,
            "read_only": None if request.read is None else list(request.read),
            "write": None if request.write is None else list(request.write),
        },
    }


def as_data(
    request: Request, program: str, before: State, prediction: Prediction, problems: list[str]
) -> dict[str, Any]:
    """Return the explanation for JSON."""
    lost, gained = difference(before, prediction.state)
    return {
        **request_data(request, program),
        "before": show.data(before),
        "after": show.data(prediction.state),
        "error": None if prediction.error is None else errno.errorcode[prediction.error],
        "steps": [{"what": step.what, "why": step.why} for step in prediction.steps],
        "lost": list(lost.names()),
        "gained": list(gained.names()),
        "problems": [f"the command {problem}" for problem in problems],
        "as_requested": not problems,
    }
