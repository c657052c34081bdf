"""``rcon run``: run a command within limits.

With plain limits, a timeout or a report it starts quickly: it imports neither click nor msgspec nor pluggy
(tests/unit/cli/test_run_start.py). The other options import what they need.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from rcon_plugins.cli.exit import BadUsage
from rcon_plugins.cli.options import RUN_OPTIONS, named_base, parse
from rcon_plugins.cli.run.execution import (
    check_enforceable,
    ends_all,
    execute,
    grace_of,
    group_of,
    program_of,
    report_of,
    shared_of,
    timeout_of,
    with_cpu_count,
)
from rcon_plugins.command.run import Order
from rcon_plugins.errors import KernelError, SettingsError
from rcon_plugins.kernel.cgroup import Hierarchy, IoMax, Resources, device_of
from rcon_plugins.kernel.proc import original_environment
from rcon_plugins.settings.limit_table import BY_KEY, IO_LIMITS, OPTIONS

if TYPE_CHECKING:
    from rcon_plugins.kernel.cgroup import Device

#: These options need a policy: limits that are checked against others, and events.
_NEED_POLICY = frozenset({*(limit.key for limit in OPTIONS if limit.needs), "expand", "up_to", "on_event"})


def run(words: Sequence[str]) -> int:
    """Run the command of the words after ``rcon run`` and return the exit status.

    Raises `BadUsage`, `HelpRequested`, `Refused` and `RconError`; nothing was run then.
    """
    options, command = parse(words, RUN_OPTIONS)
    if "policy" in options or "settings" in options:
        from rcon_plugins.cli.run import policy

        return policy.run(options, command)
    hierarchy = Hierarchy.discover()
    fields = _limit_fields(options)
    check_enforceable(hierarchy, fields["resources"])
    fields |= _user_fields(options, command)
    fields["variables"] = with_cpu_count(fields["variables"], options, fields["resources"])
    timeout = timeout_of(options)
    order = Order(
        program=program_of(options, command),
        arguments=command,
        group=group_of(options, command),
        timeout=timeout,
        grace=grace_of(options, timeout),
        oom_group=ends_all(options),
        shared=shared_of(options),
        **fields,
    )
    return execute(order, hierarchy, named_base(options.get("cgroup")), report=report_of(options))


def _limit_fields(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of the `Order` that limit and watch the command."""
    if _NEED_POLICY & options.keys():
        from rcon_plugins.cli.run import policy

        return policy.limit_fields(options)
    return {"resources": resources_of(options)}


def resources_of(options: Mapping[str, Any]) -> Resources:
    """Return the limits that the options set. Raises `BadUsage` with the option, its value and the remedy."""
    limits: dict[str, Any] = {}
    devices: dict[str, Any] = {}
    for limit in OPTIONS:
        if limit.key in options and limit.field:
            try:
                value = limit.parse(options[limit.key])
            except SettingsError as error:
                raise BadUsage(f"{limit.flag}: {error}") from None
            (devices if limit.table == "io" else limits)[limit.field] = value
    device = options.get("device")
    if devices:
        limits["io"] = {_device(device or ".", given=device): IoMax(**devices)}
    elif device is not None:
        flags = " or ".join(limit.flag for limit in IO_LIMITS)
        raise BadUsage(f"--device limits nothing by itself (add {flags})")
    return Resources(**limits)


def _device(path: str, given: str | None) -> Device:
    if given == "" or "\0" in path:
        raise BadUsage(f"--device: {given!r} is not a path ({BY_KEY['device'].description})")
    try:
        return device_of(path)
    except KernelError as error:
        raise BadUsage(f"--device: {error}") from None


def _user_fields(options: Mapping[str, Any], command: tuple[str, ...]) -> dict[str, Any]:
    """Return the fields of the `Order` that change the user, the capabilities and the environment."""
    requested = {name: options[name] for name in ("user", "cap") if name in options}
    if not requested:
        return {"variables": original_environment()}
    from rcon_plugins.cli.capcon.run import become, environment_of
    from rcon_plugins.cli.request import Request

    request = Request.of(requested, command)
    identity = request.identity
    is_other = identity is not None and identity.uid != os.geteuid()
    return {
        "variables": environment_of(request),
        "become": partial(become, request),
        "delegate_to": (identity.uid, identity.gid) if identity is not None and is_other else None,
    }
