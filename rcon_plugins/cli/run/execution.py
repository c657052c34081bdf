"""``rcon run``: from a checked order to the exit status. Imports little; who makes the order may import more."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rcon_plugins.command import run
from rcon_plugins.command.run import Ended, NotRun, Order
from rcon_plugins.errors import RconError
from rcon_plugins.kernel.proc import exec_remedy

if TYPE_CHECKING:
    from rcon_plugins.kernel.cgroup import Hierarchy

#: The command itself failed and nothing was run; as env(1).
OWN_FAILURE = 125
#: Endings by these are silent, as in shells.
_SILENT = frozenset({signal.SIGINT, signal.SIGPIPE})


def open_report(path: str) -> int:
    """The open file for ``--json``, never one of the standard streams, which may be closed. Raises OSError."""
    import fcntl

    if path == "-":
        return fcntl.fcntl(1, fcntl.F_DUPFD_CLOEXEC, 3)
    opened = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
    try:
        return fcntl.fcntl(opened, fcntl.F_DUPFD_CLOEXEC, 3)
    finally:
        os.close(opened)


def execute(
    order: Order,
    hierarchy: Hierarchy,
    base: str | None = None,
    *,
    report: int | None = None,
    policy: str = "",
    finished: Callable[[Ended], object] | None = None,
) -> int:
    """Run it, say what there is to say, and return the exit status.

    A command that an interrupt ended takes this process along in the same way, that a loop of the shell ends too.
    """
    if report is not None:
        order = order._replace(keep=(*order.keep, report))
    try:
        ended = run.run(order, hierarchy, base)
    except NotRun as error:
        hint = exec_remedy(error.errno, as_another=order.become is not None)
        problem = f"{order.program}: {error}" + (f" ({hint})" if hint else "")
        return _not_run(order, report, policy, error.status, problem)
    except RconError as error:
        return _not_run(order, report, policy, OWN_FAILURE, str(error))
    if finished is not None:
        finished(ended)
    if ended.detail and ended.signal not in _SILENT:
        say(ended.detail if ended.limit else f"{order.arguments[0]}: {ended.detail}")
    if report is not None:
        _write(report, _told(order, ended, policy))
    if ended.ending == "killed" and ended.signal == signal.SIGINT:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    return ended.status


def say(message: str) -> None:
    """One line on standard error, whatever is in ``message``; none where that is closed."""
    line = f"rcon: {' '.join(message.split())}\n"
    try:
        os.write(2, line.encode(errors="surrogateescape"))
    except OSError:
        return


def _not_run(order: Order, report: int | None, policy: str, status: int, problem: str) -> int:
    say(problem)
    if report is not None:
        told = {"outcome": "refused", "status": status, "detail": problem, "policy": policy}
        _write(report, {**told, "command": _texts(order.arguments)})
    return status


def _told(order: Order, ended: Ended, policy: str) -> dict[str, Any]:
    import msgspec

    told = msgspec.to_builtins(ended.outcome(policy))
    return {
        "outcome": told["ending"],
        "status": ended.status,
        "signal": told["signal"],
        "limit": told["limit"],
        "detail": told["detail"],
        "policy": told["policy"],
        "group": order.group,
        "command": _texts(order.arguments),
        "usage": told["usage"],
    }


def _texts(arguments: Sequence[str]) -> list[str]:
    return [argument.encode(errors="surrogateescape").decode(errors="replace") for argument in arguments]


def _write(report: int, told: Mapping[str, Any]) -> None:
    import json

    try:
        with os.fdopen(report, "w") as file:
            json.dump(told, file, indent=2)
            file.write("\n")
    except OSError as error:
        say(f"--json: {error.strerror}")
