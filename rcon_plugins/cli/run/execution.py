"""The execution of an `Order` of ``rcon run``, and the options that go with every order: group, timeout, report."""

from __future__ import annotations

import errno
import math
import os
import signal
import stat
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rcon_plugins.cli.exit import BAD_USAGE, OWN_FAILURE, BadUsage, Refused, say, shortened
from rcon_plugins.cli.options import seconds_of
from rcon_plugins.cli.program import find_program
from rcon_plugins.command import run as command_run
from rcon_plugins.command.run import Ended, NotRun, Order, check_group_name, group_name
from rcon_plugins.errors import KernelError, RconError
from rcon_plugins.kernel.cgroup import Hierarchy, Resources
from rcon_plugins.kernel.cgroup.resources import parse_list
from rcon_plugins.kernel.proc import exec_problem
from rcon_plugins.settings.limit_table import BY_KEY, FLAG_OF_FIELD, NEEDS_MEMORY

#: The variables of ``--export-cpus``. Python reads the first (since 3.13), nproc(1) and OpenMP the second.
CPU_VARIABLES = (b"PYTHON_CPU_COUNT", b"OMP_NUM_THREADS")
#: A command that one of these signals ends, ends without a message, as in a shell.
_SILENT = frozenset({signal.SIGINT, signal.SIGPIPE})
#: With so many bytes of memory the kernel can make the cgroups of a command.
_ENOUGH = 2**20


def check_enforceable(hierarchy: Hierarchy, resources: Resources) -> None:
    """Raise `BadUsage`, with the remedy, for the first limit that this machine cannot enforce. Note a gap in swap."""
    for refusal in hierarchy.refusals(resources):
        flag, remedy = FLAG_OF_FIELD[refusal.limit], refusal.remedy
        if refusal.limit == "swap_max" and resources.memory_max is None and "memory" in hierarchy.controllers:
            remedy = f"add {FLAG_OF_FIELD['memory_max']}"
        raise BadUsage(f"{flag}: cannot be enforced on this machine: {refusal.reason} ({remedy})")
    note_swap(hierarchy, resources)


def note_swap(hierarchy: Hierarchy, resources: Resources) -> None:
    """Say so where a limit of memory does not bound swap."""
    alone = isinstance(resources.memory_max, int) and resources.swap_max is None
    if alone and (gap := hierarchy.swap_gap()) is not None:
        say("rcon", f"note: the memory limit does not bound swap: {gap.reason} ({gap.remedy})")


def group_of(options: Mapping[str, Any], command: tuple[str, ...]) -> str:
    """Return the name of the group. Raises `BadUsage` for a name that is invalid or in use."""
    return named_group(options.get("group")) or group_name(command[0])


def named_group(name: str | None) -> str | None:
    """Return the value of ``--group``. Raises `BadUsage` for a name that is invalid or in use."""
    if name is None:
        return None
    try:
        check_group_name(name)
    except ValueError as error:
        raise BadUsage(f"--group: {error} (for example build-1)") from None
    from rcon_plugins.groups.find import find_groups

    known = (
        group for group in find_groups().groups if group.owner.alive is not False or group.kind == "attached"
    )
    if any(group.name == name for group in known):
        raise BadUsage(
            f"--group: {name!r} is in use (choose another name; rcon set changes the limits of a group)"
        )
    return name


def shared_of(options: Mapping[str, Any]) -> str | None:
    """Return the value of ``--in``. Raises `BadUsage` for a name that is invalid, or of a group of another kind."""
    name: str | None = options.get("in")
    if name is None:
        return None
    try:
        check_group_name(name)
    except ValueError as error:
        raise BadUsage(f"--in: {error} (for example build)") from None
    for option in ("expand", "up_to", "on_event"):
        if option in options:
            flag = f"--{option.replace('_', '-')}"
            raise BadUsage(
                f"{flag} does not go with --in: it watches a group of one command (leave it out; "
                f"rcon watch {name} prints events, rcon set {name} changes limits)"
            )
    from rcon_plugins.groups.find import find_groups

    known = [group for group in find_groups().groups if group.name == name and group.kind != "shared"]
    if any(group.owner.alive is not False for group in known):
        raise BadUsage(f"--in: {name!r} is a group that cannot be shared (choose another name)")
    return name


def timeout_of(options: Mapping[str, Any]) -> float | None:
    """Return ``--timeout`` in seconds. Raises `BadUsage`."""
    return seconds_of("timeout", options["timeout"]) if "timeout" in options else None


def grace_of(options: Mapping[str, Any], timeout: float | None) -> float | None:
    """Return ``--grace`` in seconds; None for SIGKILL at once. Raises `BadUsage`, also without a ``timeout``."""
    if "grace" not in options:
        return None
    if timeout is None:
        raise BadUsage("--grace needs a timeout to begin at (add --timeout 20s, or leave it out)")
    return seconds_of("grace", options["grace"])


def with_cpu_count(
    variables: Mapping[bytes, bytes], options: Mapping[str, Any], *limits: Resources
) -> Mapping[bytes, bytes]:
    """Return the environment; with ``--export-cpus``, also with the number of CPUs that ``limits`` leave.

    A share of a CPU counts as a whole one. Variables that are set already stay. Raises `BadUsage` without such limits.
    """
    if not options.get("export_cpus"):
        return variables
    shares = [math.ceil(one.cpu_quota) for one in limits if isinstance(one.cpu_quota, int | float)]
    sets = [len(parse_list(one.cpus)) for one in limits if one.cpus is not None]
    if not shares and not sets:
        raise BadUsage(
            "--export-cpus needs a limit that leaves some of the CPUs (add --cpu 150% or --cpus 0-1)"
        )
    number = str(min([*shares, *sets, len(os.sched_getaffinity(0))])).encode()
    return {**dict.fromkeys(CPU_VARIABLES, number), **variables}


def ends_all(options: Mapping[str, Any], of_policy: str | None = None) -> bool:
    """Return whether an OOM kill ends the whole command: by ``--oom``, else by the ``oom`` of its policy.

    If neither says so, it ends the whole command unless standard input is a terminal: a shell that a person uses
    survives what it runs. Raises `BadUsage`.
    """
    given = options.get("oom")
    if given not in (None, "group", "process"):
        raise BadUsage(f"--oom: {given!r} is not an answer to an OOM kill (write group or process)")
    chosen = given or of_policy
    return not os.isatty(0) if chosen is None else chosen == "group"


def report_of(options: Mapping[str, Any]) -> int | None:
    """Open the file of ``--json`` and return its descriptor, never a standard one. Raises `BadUsage`."""
    path = options.get("json")
    if path is None:
        return None
    import fcntl

    try:
        if path == "-":
            return fcntl.fcntl(1, fcntl.F_DUPFD_CLOEXEC, 3)
        # Without O_NONBLOCK, opening a FIFO would wait for a reader. ENXIO means that it has none.
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK
        opened = os.open(path, flags, 0o644)
        try:
            os.set_blocking(opened, True)
            # The standard descriptors may be closed, and are closed while the command runs.
            return fcntl.fcntl(opened, fcntl.F_DUPFD_CLOEXEC, 3)
        finally:
            os.close(opened)
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno == errno.ENXIO and _is_fifo(path):
            raise BadUsage(
                f"--json: {path!r}: no process reads this FIFO (start its reader first, or name a file)"
            ) from None
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise BadUsage(f"--json: {path!r}: {reason} (name a file that can be written)") from None


def program_of(options: Mapping[str, Any], command: Sequence[str], policy: str = "") -> str:
    """Return the path of the program. Raises `Refused` where there is none, and `--json` tells so, too."""
    try:
        return find_program(command[0])
    except Refused as error:
        # The file may still have the report of an earlier run.
        _report_refusal(report_of(options), command, policy, error.status, str(error))
        raise


def _is_fifo(path: str) -> bool:
    try:
        return stat.S_ISFIFO(os.stat(path).st_mode)  # noqa: PTH116 - pathlib is slow to import
    except OSError:
        return False


def execute(
    order: Order,
    hierarchy: Hierarchy,
    base: str | None = None,
    *,
    report: int | None = None,
    policy: str = "",
    finished: Callable[[Ended], object] | None = None,
) -> int:
    """Run the order, print how it ended, write the report, and return the exit status.

    If SIGINT ended the command, this process ends itself by SIGINT too, so that a shell loop around it stops.
    """
    if report is not None:
        order = order._replace(keep=(*order.keep, report))
    try:
        ended = command_run.run(order, hierarchy, base)
    except NotRun as error:
        become = order.become is not None
        problem = exec_problem(order.program, error.errno, as_another=become, interpreter=error.interpreter)
        return _not_run(order, report, policy, error.status, problem)
    except RconError as error:
        if (too_little := _too_little_memory(error, order)) is not None:
            return _not_run(order, report, policy, BAD_USAGE, too_little)
        refusal = None if order.shared is None else _not_shared(order, error)
        if refusal is not None:
            return _not_run(order, report, policy, BAD_USAGE, refusal)
        return _not_run(order, report, policy, OWN_FAILURE, shortened(error))
    if finished is not None:
        finished(ended)
    end = ended.end
    if end.detail and (end.signal not in _SILENT or ended.reading.oom_kills):
        say("rcon", end.detail if end.limit else f"{order.arguments[0]}: {end.detail}")
    if report is not None:
        _write(report, _report_data(order, ended, policy))
    if end.ending == "killed" and end.signal == signal.SIGINT:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    return ended.status


def _too_little_memory(error: RconError, order: Order) -> str | None:
    """Return the message if the kernel could not even make the cgroups of the command within its memory limit."""
    limit = order.resources.memory_max
    if not isinstance(error, KernelError) or error.errno != errno.ENOMEM:
        return None
    if not isinstance(limit, int) or limit >= _ENOUGH:
        return None
    from rcon_plugins.settings.units import format_size  # loads slowly

    return f"{BY_KEY['memory'].flag}: {format_size(limit)} is too little to start a command ({NEEDS_MEMORY})"


def _not_shared(order: Order, error: RconError) -> str | None:
    """Return why a command cannot share a group, and the remedy; None for another error."""
    from rcon_plugins.cli.columns import limits_in_words
    from rcon_plugins.tree.shared import NotShared

    if not isinstance(error, NotShared):
        return None
    name = error.name
    if error.found is None:
        return f"--in: there is no group {name!r} (give its limits: the first command makes it)"
    found, given = (", ".join(limits_in_words(one)) or "no limits" for one in (error.found, order.resources))
    return (
        f"--in: the group {name!r} has {found}, and not {given} (give the same limits or none, or change them "
        f"first: rcon set {name})"
    )


def _not_run(order: Order, report: int | None, policy: str, status: int, problem: str) -> int:
    say("rcon", problem)
    _report_refusal(report, order.arguments, policy, status, problem)
    return status


def _report_refusal(
    report: int | None, command: Sequence[str], policy: str, status: int, problem: str
) -> None:
    if report is not None:
        data = {"outcome": "refused", "status": status, "detail": problem, "policy": policy}
        _write(report, {**data, "command": list(command)})


def _report_data(order: Order, ended: Ended, policy: str) -> dict[str, Any]:
    import msgspec

    outcome = msgspec.to_builtins(ended.outcome(policy))
    return {
        "outcome": outcome["ending"],
        "status": ended.status,
        "signal": outcome["signal"],
        "limit": outcome["limit"],
        "needed_kill": outcome["needed_kill"],
        "detail": outcome["detail"],
        "policy": outcome["policy"],
        "group": order.group,
        "in": order.shared,
        "command": list(order.arguments),
        "usage": outcome["usage"],
    }


def _write(report: int, data: Mapping[str, Any]) -> None:
    """Write the report. A byte that is no UTF-8 becomes an escape such as ``\\udcff``: `os.fsencode` restores it."""
    import json

    try:
        with os.fdopen(report, "w") as file:
            json.dump(data, file, indent=2)
            file.write("\n")
    except OSError as error:
        say("rcon", f"--json: {error.strerror}")
