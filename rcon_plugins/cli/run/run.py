"""``rcon run``: what its options come to, checked, before anything is made."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from rcon_plugins.builtin.plugins import limits_manager, make_plugin_manager
from rcon_plugins.cli.base_option import named_base
from rcon_plugins.cli.capcon.run import find, take, variables_of
from rcon_plugins.cli.limit_options import limits_of, policy_keys, refused
from rcon_plugins.cli.request import Asked
from rcon_plugins.cli.run.execution import execute, open_report
from rcon_plugins.command.run import Ended, Order, check_group_name, group_name
from rcon_plugins.confinement.isolation import asked_resources
from rcon_plugins.errors import ConfinementError, KernelError, SettingsError
from rcon_plugins.identity import privileges
from rcon_plugins.identity.resolution import check as check_identity
from rcon_plugins.identity.resolution import resolve
from rcon_plugins.kernel.capability import Identity
from rcon_plugins.kernel.cgroup import Hierarchy, Resources
from rcon_plugins.kernel.proc import original_environment
from rcon_plugins.settings.conversion import did_you_mean, one_of
from rcon_plugins.settings.file import Settings, load
from rcon_plugins.settings.limit_table import FLAG_OF_FIELD
from rcon_plugins.settings.units import Duration
from rcon_plugins.work import Work

if TYPE_CHECKING:
    import pluggy

    from rcon_plugins.settings.policy import Policy


def run(options: Mapping[str, Any]) -> int:
    """What the command does with its options; the exit status. Raises `click.UsageError`, `RconError`."""
    arguments: tuple[str, ...] = options["command"]
    if not arguments[0]:
        raise click.UsageError("the command is empty: name a program after --")
    group = named_group(options["group"]) or group_name(arguments[0])
    timeout = _timeout(options["timeout"])
    if options["policy"] is not None or options["settings"] is not None:
        return _run_policy(options, arguments, group, timeout)
    policy = limits_of(options)
    manager = limits_manager()
    hook = manager.hook
    hierarchy = Hierarchy.discover()
    resources = resources_of(hook, policy)
    check_enforceable(hierarchy, resources)
    asked = Asked.of(
        command=arguments,
        user=options["user"],
        group=None,
        groups=None,
        caps=options["cap"],
        drop_all=False,
        no_new_privs=False,
        read_only=(),
        write=(),
        keep_env=False,
    )
    order = Order(
        program=find(arguments[0]),
        arguments=arguments,
        variables=variables_of(asked),
        group=group,
        resources=resources,
        configure=partial(hook.rcon_configure_cgroup, limits=policy, policy=policy),
        become=partial(take, asked),
        delegate_to=_owner(asked.identity),
        timeout=timeout,
        **_attended(policy, manager, options["on_event"]),
    )
    base = named_base(options["cgroup"])
    return execute(order, hierarchy, base, report=_report(options["json"]))


def _attended(policy: Policy, manager: pluggy.PluginManager, on_event: str | None) -> dict[str, Any]:
    """What of an `Order` has to do with events."""
    memory = policy.memory
    expands = memory is not None and memory.expands
    each_expands = policy.each.memory is not None and policy.each.memory.expands
    if on_event is not None and not on_event.strip():
        raise click.UsageError("--on-event: the command is empty (for example 'logger -t rcon')")
    told = each_expands or bool(manager.hook.rcon_event.get_hookimpls())
    if on_event is None and not expands and not told:
        return {}
    from rcon_plugins.cli.run.events import attend

    note = f", expanded from {memory}" if expands else ""
    return {
        "attend": partial(attend, policy=policy, manager=manager, command=on_event, told=told),
        "memory_note": note,
    }


def named_group(name: str | None) -> str | None:
    """The name that ``--group`` gives. Raises `click.UsageError` for what is none, or is in use."""
    if name is None:
        return None
    try:
        check_group_name(name)
    except ValueError as error:
        raise click.UsageError(f"--group: {error} (for example build-1)") from None
    from rcon_plugins.groups.find import find_groups

    known = (group for group in find_groups().groups if group.owner.alive or group.kind == "attached")
    if any(group.name == name for group in known):
        raise click.UsageError(
            f"--group: {name!r} is in use (take another name; rcon set changes its limits, "
            "rcon attach puts running processes in a group)"
        )
    return name


def resources_of(hook: pluggy.HookRelay, policy: Policy) -> Resources:
    """What the kernel is asked for. Raises `click.UsageError` for a device that is not there."""
    try:
        return asked_resources(hook, policy, policy)
    except KernelError as error:
        hint = f" ({error.hint})" if error.hint else ""
        raise click.UsageError(f"--device: {error.problem}{hint}") from None


def check_enforceable(hierarchy: Hierarchy, resources: Resources) -> None:
    """Raise `click.UsageError`, with the remedy, for the first limit that this machine cannot enforce."""
    for refusal in hierarchy.refusals(resources):
        flag = FLAG_OF_FIELD[refusal.limit]
        raise click.UsageError(
            f"{flag}: cannot be enforced on this machine: {refusal.reason} ({refusal.remedy})"
        )


def _timeout(text: str | None) -> float | None:
    if text is None:
        return None
    try:
        return float(Duration.parse(text))
    except SettingsError as error:
        raise click.UsageError(f"--timeout: {error}") from None


def _report(path: str | None) -> int | None:
    if path is None:
        return None
    try:
        return open_report(path)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise click.UsageError(f"--json: {path!r}: {reason} (name a file that can be written)") from None


def _owner(identity: Identity | None) -> tuple[int, int] | None:
    return None if identity is None or identity.uid == os.geteuid() else (identity.uid, identity.gid)


# -- a policy of a settings file


def _run_policy(
    options: Mapping[str, Any], arguments: tuple[str, ...], group: str, timeout: float | None
) -> int:
    settings, manager, policy = _policy(options)
    hook, hierarchy = manager.hook, Hierarchy.discover()
    work = Work("command", " ".join(arguments), {"command": arguments[0].rpartition("/")[2]})
    if policy.per is not None and policy.per not in work.attributes:
        raise click.UsageError(
            f"--policy: {policy.name} is per {policy.per}, which a command has not (take one that is per command)"
        )
    resources = resources_of(hook, policy)
    each = asked_resources(hook, policy.each, policy)
    for refusal in (*hierarchy.refusals(resources), *hierarchy.refusals(each, within=resources)):
        raise click.UsageError(
            f"--policy: {policy.name} cannot be enforced on this machine: {refusal.reason} ({refusal.remedy})"
        )
    for refusal in privileges.refusals(policy):
        raise click.UsageError(f"--policy: {policy.name}: {refusal.reason} ({refusal.remedy})")
    identity = resolve(policy, work.attributes)
    asked = Asked(command=arguments, identity=identity)
    limit = timeout or (None if policy.each.timeout is None else float(policy.each.timeout))
    order = Order(
        program=find(arguments[0]),
        arguments=arguments,
        variables=variables_of(asked) if identity else original_environment(),
        group=group,
        resources=resources,
        each=each,
        configure=partial(hook.rcon_configure_cgroup, limits=policy, policy=policy),
        configure_leaf=partial(hook.rcon_configure_cgroup, limits=policy.each, policy=policy),
        become=partial(hook.rcon_drop, policy=policy, place="command", identity=identity),
        timeout=limit,
        **_attended(policy, manager, options["on_event"]),
    )
    base = named_base(options["cgroup"], settings.cgroup)
    report = _report(options["json"])
    hook.rcon_work_started(work=work, policy=policy)

    def finished(ended: Ended) -> None:
        hook.rcon_work_finished(work=work, outcome=ended.outcome(policy.name))

    return execute(order, hierarchy, base, report=report, policy=policy.name, finished=finished)


def _policy(options: Mapping[str, Any]) -> tuple[Settings, pluggy.PluginManager, Policy]:
    """The settings, their plugins, and the policy with the limits of the command line in place of its own."""
    name, file = options["policy"], options["settings"]
    if name is None or file is None:
        raise click.UsageError(
            "--policy and --settings belong together: name the policy, and the file it is in"
        )
    if options["user"] is not None or options["cap"]:
        raise click.UsageError(
            "--user and --cap: with --policy these are the policy's to say (leave them out)"
        )
    try:
        settings = load(file)
        manager = make_plugin_manager(settings)
        manager.unregister(name="rcon.log")  # how it ended is said in one line for people, and in --json
        contributed = [one for some in manager.hook.rcon_policies(settings=settings) for one in some]
        settings = settings.with_policies(contributed)
    except SettingsError as error:
        raise click.UsageError(f"--settings: {error}") from None
    if name not in settings.policies:
        hint = did_you_mean(name, settings.policies) or one_of(settings.policies)
        raise click.UsageError(f"--policy: there is no policy {name!r} in {file} ({hint})")
    policy = settings.policies[name]
    given = limits_of(options)
    try:
        import msgspec

        policy = msgspec.structs.replace(policy, **{key: getattr(given, key) for key in policy_keys(options)})
        check_identity(policy, file)
    except SettingsError as error:
        raise refused(error) from None
    except ConfinementError as error:
        raise click.UsageError(f"--policy: {error}") from None
    return settings, manager, policy
