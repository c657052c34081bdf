"""``rcon run`` with a policy: one of a settings file (``--policy``), or one made of options that need its checks."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import msgspec

from rcon_plugins.builtin.plugins import limits_manager, make_plugin_manager
from rcon_plugins.cli.capcon.run import environment_of
from rcon_plugins.cli.exit import BadUsage
from rcon_plugins.cli.limit_options import limits_of, policy_keys, refused
from rcon_plugins.cli.options import named_base
from rcon_plugins.cli.request import Request
from rcon_plugins.cli.run.execution import (
    ends_all,
    execute,
    grace_of,
    group_of,
    note_swap,
    program_of,
    report_of,
    shared_of,
    timeout_of,
    with_cpu_count,
)
from rcon_plugins.command.run import Ended, Order
from rcon_plugins.confinement import isolation
from rcon_plugins.errors import ConfinementError, KernelError, SettingsError
from rcon_plugins.identity.resolution import check as check_identity
from rcon_plugins.identity.resolution import resolve
from rcon_plugins.kernel.cgroup import Hierarchy, Resources
from rcon_plugins.kernel.proc import original_environment
from rcon_plugins.settings.conversion import did_you_mean, one_of
from rcon_plugins.settings.file import Settings, load
from rcon_plugins.settings.units import format_size
from rcon_plugins.work import Work

if TYPE_CHECKING:
    import pluggy

    from rcon_plugins.settings.policy import Policy


def limit_fields(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of an `Order` for the limits and events of the options. Raises `BadUsage`."""
    policy = limits_of(options)
    manager = limits_manager()
    return {
        "resources": resources_of(manager.hook, policy),
        **_watch_fields(policy, manager, options.get("on_event")),
    }


def run(options: Mapping[str, Any], command: tuple[str, ...]) -> int:
    """Run a command under a policy of a settings file and return the exit status. Raises `BadUsage`, `RconError`."""
    settings, manager, policy = _load(options)
    file = options["settings"]
    oom_group = ends_all(options, policy.oom)
    policy = msgspec.structs.replace(policy, oom="group" if oom_group else "process")
    hook, hierarchy = manager.hook, Hierarchy.discover()
    work = Work("command", " ".join(command), {"command": command[0].rpartition("/")[2]})
    if policy.per is not None and policy.per not in work.attributes:
        raise BadUsage(
            f"--policy: {policy.name} is per {policy.per}, and a command has no {policy.per} "
            '(choose a policy without per, or with per = "command")'
        )
    try:
        isolation.judge_command(policy, hierarchy, hook).check(file)
    except SettingsError as error:
        raise BadUsage(f"--policy: {error}") from None
    resources, each = (isolation.resources_of(hook, limits, policy) for limits in (policy, policy.each))
    note_swap(hierarchy, resources if isinstance(resources.memory_max, int) else each)
    identity = resolve(policy, work.attributes)
    timeout = timeout_of(options)
    if timeout is None and policy.each.timeout is not None:
        timeout = policy.each.timeout
    grace = grace_of(options, timeout)
    variables = environment_of(Request(command, identity)) if identity else original_environment()
    shared = shared_of(options)
    watching = _watch_fields(policy, manager, options.get("on_event"))
    if shared is not None and watching:
        raise BadUsage(
            f"--in: policy {policy.name} has memory that expands, or plugins that receive events, which watch a group "
            "of one command (leave out --in, or use another policy)"
        )
    order = Order(
        program=program_of(options, command, policy.name),
        arguments=command,
        variables=with_cpu_count(variables, options, resources, each),
        group=group_of(options, command),
        resources=resources,
        each=each,
        become=partial(hook.rcon_drop, policy=policy, target="command", identity=identity),
        timeout=timeout,
        grace=policy.each.grace if grace is None else grace,
        oom_group=oom_group,
        cpu_time=policy.rlimits.cpu,
        shared=shared,
        **watching,
    )
    base = named_base(options.get("cgroup"), settings.cgroup)
    report = report_of(options)
    hook.rcon_work_started(work=work, policy=policy)

    def finished(ended: Ended) -> None:
        hook.rcon_work_finished(work=work, outcome=ended.outcome(policy.name))

    return execute(order, hierarchy, base, report=report, policy=policy.name, finished=finished)


def resources_of(hook: pluggy.HookRelay, policy: Policy) -> Resources:
    """Return the limits of a policy for the kernel. Raises `BadUsage` for a device that is not there."""
    try:
        return isolation.resources_of(hook, policy, policy)
    except KernelError as error:
        raise BadUsage(f"--device: {error}") from None


def _watch_fields(policy: Policy, manager: pluggy.PluginManager, on_event: str | None) -> dict[str, Any]:
    """Return the fields of an `Order` that watch the command: for memory that expands, for plugins, for --on-event."""
    if on_event is not None and not on_event.strip():
        raise BadUsage("--on-event: the command is empty (for example 'logger -t rcon')")
    note = ""
    if policy.memory is not None and policy.memory.expands:
        note = f", expanded from {format_size(policy.memory.limit)}"
    each_expands = policy.each.memory is not None and policy.each.memory.expands
    to_plugins = each_expands or bool(manager.hook.rcon_event.get_hookimpls())
    if on_event is None and not note and not to_plugins:
        return {}
    from rcon_plugins.cli.run.events import watched

    return {
        "watch": partial(watched, policy=policy, manager=manager, command=on_event, to_plugins=to_plugins),
        "memory_note": note,
    }


def _load(options: Mapping[str, Any]) -> tuple[Settings, pluggy.PluginManager, Policy]:
    """Return the settings, their plugins, and the policy, in which limits of the options replace its own."""
    name, file = options.get("policy"), options.get("settings")
    if name is None or file is None:
        missing = "--settings FILE" if file is None else "--policy NAME"
        raise BadUsage(f"--policy and --settings belong together (add {missing})")
    if "user" in options or "cap" in options:
        raise BadUsage("--user and --cap do not go with --policy, which sets both (leave them out)")
    try:
        settings = load(file)
        manager = make_plugin_manager(settings)
        # rcon run reports the outcome itself, and in --json.
        manager.unregister(name="rcon.log")
        contributed = [one for some in manager.hook.rcon_policies(settings=settings) for one in some]
        settings = settings.with_policies(contributed)
    except SettingsError as error:
        raise BadUsage(f"--settings: {error}") from None
    if name not in settings.policies:
        hint = did_you_mean(name, settings.policies) or one_of(settings.policies)
        raise BadUsage(f"--policy: there is no policy {name!r} in {file} ({hint})")
    policy = settings.policies[name]
    given = limits_of(options)
    try:
        policy = msgspec.structs.replace(policy, **{key: getattr(given, key) for key in policy_keys(options)})
    except SettingsError as error:
        error.key = (error.key or "").removeprefix(f"policy.{name}.")
        raise refused(error) from None
    try:
        check_identity(policy, file)
    except (SettingsError, ConfinementError) as error:
        raise BadUsage(f"--policy: {error}") from None
    return settings, manager, policy
