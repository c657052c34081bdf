"""``capcon explain``: what a command will hold after execve(2), and why.

The identity is really taken, by this process, so that what the kernel refuses is refused here too. Only the last step,
execve itself, is predicted.
"""

from __future__ import annotations

import errno
import os
import textwrap
from pathlib import Path
from typing import Any

from rcon_plugins.cli.capcon import run, show
from rcon_plugins.cli.request import Asked
from rcon_plugins.errors import CapabilityError
from rcon_plugins.kernel import landlock
from rcon_plugins.kernel.capability import Capabilities, State, read_state
from rcon_plugins.kernel.capability.exec_rule import File, Prediction, predict
from rcon_plugins.kernel.proc import exec_remedy


def explain(asked: Asked, as_json: bool) -> tuple[str, bool]:
    """The explanation, and whether the command would hold what was asked. Raises `Refused`."""
    program = run.find(asked.command[0])
    file = run.read_process(program)
    try:
        run.take(asked)
    except CapabilityError as error:
        return refused(asked, program, error, as_json), False
    before = read_state()
    prediction = predict(before, file)
    if prediction.error is None:
        problems = [
            *run.problems(asked, prediction.state),
            *access_problems(asked, program, file),
            *file_problems(asked),
        ]
    else:
        problems = [f"cannot be executed so: {prediction.steps[-1].why}"]
    if as_json:
        text = show.as_text(as_data(asked, program, before, prediction, problems))
    else:
        text = as_page(asked, program, before, prediction, problems)
    return text, not problems


def refused(asked: Asked, program: str, error: CapabilityError, as_json: bool) -> str:
    """The answer where the caller may not give what was asked, so that there is nothing to predict from."""
    if as_json:
        return show.as_text({**asked_data(asked, program), "problems": [str(error)], "as_asked": False})
    return "\n".join([*asked_rows(asked, program), answer([f"cannot be run so: {error}"])])


def access_problems(asked: Asked, program: str, file: File) -> list[str]:
    """Which of the files that execve(2) opens the user that was asked for, who this process is now, may not execute."""
    if asked.identity is None:
        return []
    paths = dict.fromkeys((program, *(script.path for script in file.scripts), file.path))
    closed = next((path for path in paths if not os.access(path, os.X_OK, effective_ids=True)), None)
    if closed is None:
        return []
    return [f"cannot be executed: {closed}: {exec_remedy(errno.EACCES, as_another=True)}"]


def file_problems(asked: Asked) -> list[str]:
    """Why Landlock could not be put in force."""
    if asked.read is None or asked.write is None:
        return []
    if landlock.abi() == 0:
        return ["cannot be confined to these files: this kernel has no Landlock"]
    missing = [path for path in (*asked.read, *asked.write) if not Path(path).exists()]
    return [f"cannot be confined to {path}: there is no such file" for path in missing]


def asked_rows(asked: Asked, program: str) -> list[str]:
    """What was asked, as lines of a table."""
    who = asked.identity
    keep = "as the caller has them" if asked.keep is None else show.listed(asked.keep)
    rows = [
        ("program", program),
        ("asked: user", "the caller's" if who is None else show.named(who.uid, show.user_name)),
        ("capabilities", keep),
        ("no_new_privs", "yes" if asked.no_new_privs else "not asked for"),
    ]
    if asked.read is not None and asked.write is not None:
        rows += [
            ("reads below", ", ".join(asked.read) or "none"),
            ("writes below", ", ".join(asked.write) or "none"),
        ]
    return [show.row(*pair) for pair in rows]


def as_page(asked: Asked, program: str, before: State, prediction: Prediction, problems: list[str]) -> str:
    """The explanation for a person."""
    lines = [*asked_rows(asked, program), "", "Before execve", show.table(before), "", "At execve"]
    for number, step in enumerate(prediction.steps, 1):
        lines += [indented(f"{number}. {step.what}"), indented(f"   {step.why}")]
    if not prediction.steps:
        lines.append("nothing changes: the file has nothing to give, and there is nothing to lose")
    lines += ["", "After execve", show.table(prediction.state), ""]
    lost, gained = difference(before, prediction.state)
    lines += [
        show.row("lost", show.listed(lost)),
        show.row("gained", show.listed(gained)),
        answer(problems),
    ]
    return "\n".join(lines)


def answer(problems: list[str]) -> str:
    """The last lines."""
    return "\n".join(show.row("no", f"the command {problem}") for problem in problems) or show.row(
        "yes", "the command will hold what was asked"
    )


def indented(text: str) -> str:
    """A step, or its reason, with its later lines under the first."""
    return textwrap.fill(text, show.width(), subsequent_indent="   ", break_on_hyphens=False)


def difference(before: State, after: State) -> tuple[Capabilities, Capabilities]:
    """What execve takes from the permitted set, and what it adds."""
    return before.permitted - after.permitted, after.permitted - before.permitted


def asked_data(asked: Asked, program: str) -> dict[str, Any]:
    """What was asked, as JSON has it; null is "not asked for"."""
    who = asked.identity
    return {
        "program": program,
        "command": list(asked.command),
        "asked": {
            "uid": None if who is None else who.uid,
            "gid": None if who is None else who.gid,
            "groups": None if who is None else list(who.groups),
            "capabilities": None if asked.keep is None else list(asked.keep.names()),
            "no_new_privs": asked.no_new_privs,
            "read_only": None if asked.read is None else list(asked.read),
            "write": None if asked.write is None else list(asked.write),
        },
    }


def as_data(
    asked: Asked, program: str, before: State, prediction: Prediction, problems: list[str]
) -> dict[str, Any]:
    """The explanation as JSON has it."""
    lost, gained = difference(before, prediction.state)
    return {
        **asked_data(asked, program),
        "before": show.data(before),
        "after": show.data(prediction.state),
        "error": None if prediction.error is None else errno.errorcode[prediction.error],
        "steps": [{"what": step.what, "why": step.why} for step in prediction.steps],
        "lost": list(lost.names()),
        "gained": list(gained.names()),
        "problems": [f"the command {problem}" for problem in problems],
        "as_asked": not problems,
    }
