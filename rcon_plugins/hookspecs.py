"""The hooks of this project: pluggy, project name ``rcon``.

A plugin is a module or an object with functions of these names, each marked with `rcon_plugins.hookimpl`. It may
take any subset of a hook's parameters. Installed plugins (entry-point group ``rcon_plugins``) become active
by being named in the settings: ``plugins = ["name"]``. The built-in behaviour, in `rcon_plugins.builtin`,
stands on the same hooks.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    import click

    from rcon_plugins.groups.events import Event
    from rcon_plugins.kernel.capability import Identity
    from rcon_plugins.kernel.cgroup import Resources
    from rcon_plugins.outcome import Outcome
    from rcon_plugins.settings.file import Settings
    from rcon_plugins.settings.limits import Limits
    from rcon_plugins.settings.policy import Policy
    from rcon_plugins.work import Work

PROJECT = "rcon"

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def rcon_policies(settings: Settings) -> Iterable[Policy]:  # type: ignore[empty-body]
    """Contribute policies in addition to those of the settings file, from a database for example.

    Called once when a manager is made, in the host process, before it forks the processes that serve.

    :param settings: the settings as loaded.
    :returns: the policies. A name that already exists is an error.
    """


@hookspec(firstresult=True)
def rcon_select_policy(work: Work) -> str | None:
    """Choose the policy of one unit of work. The first result that is not None wins.

    Called for every unit of work, on the hot path, in the thread that serves it. The built-in router comes last, so
    that a plugin can decide before it. If every plugin returns None, the policy named ``default`` is used; without
    one the work is refused, unless the settings say ``unmatched = "allow"``.

    :param work: the request, task or command.
    :returns: the name of a policy, or None to leave the choice to the next plugin.
    """


@hookspec
def rcon_resources(limits: Limits, policy: Policy) -> Resources | None:
    """Return what the kernel shall limit in one cgroup. The built-in plugin turns the limits of the policy into it.

    Called off the hot path, in the host process or the fork server: at start, to check that this machine can enforce
    the policy, and before anything runs in a new cgroup. ``limits`` is the policy itself for the cgroup that holds all
    of its work together, ``policy.each`` for the cgroup of one executor process, or the limits that a plugin returned
    from `rcon_event`.

    The results of all plugins are merged. Where two set the same field, the same rate of a device or the same file, the
    first result decides: plugins are called before the built-in one, the last named in the settings first.

    :param limits: the limits of this cgroup.
    :param policy: the policy they belong to.
    :returns: the limits, or None to add nothing; ``files`` is for files of controllers that no other field sets, as in
        ``Resources(files={"hugetlb.2MB.max": "0"})``. A file that the kernel does not have is refused.
    :raises Exception: anything raised means that the request, task or command does not run.
    """


@hookspec(firstresult=True)
def rcon_event(event: Event) -> Limits | None:
    """Handle an event of a cgroup, and optionally change its limits.

    Called in the host process, in the thread that watches its cgroups, for work in executor processes and in threads
    of the host, and in the process of ``rcon run --policy`` for its command. Events are: memory at nine tenths of its
    limit, slowed down, at its limit or about to be raised; a process killed for memory; no more processes allowed; CPU
    time throttled; pressure of memory or IO. It must not take long. Without a plugin that has this hook, and without
    memory that expands, nothing is watched. See docs/howto/events.md for the kinds of events.

    :param event: what happened, where, and which limit it is about. Where ``event.limit`` begins with ``each.`` the
        cgroup is that of one executor process, else that of all the work together.
    :returns: None, or new limits for that cgroup, passed to `rcon_resources` and applied at once; what they do not set
        stays as it is. Those of all work hold until its cgroup goes; those of one work until its end. The first
        result that is not None wins.
    """


@hookspec
def rcon_prepare(policy: Policy) -> None:
    """Prepare in the fork server what each new executor process would otherwise make for itself.

    Called in the fork server, which has a single thread and all privileges of the server, before each fork. The plugin
    keeps the result, which is then available in the new process, for `rcon_drop`. It must not take long, start
    threads, or leave descriptors open that confined code must not have.

    :param policy: the policy that the process will serve for the rest of its life.
    :raises Exception: anything raised means that the process ends and the work does not run.
    """


@hookspec
def rcon_drop(policy: Policy, target: str, identity: Identity | None) -> None:
    """Drop what the policy does not grant: identity, capabilities, resource limits, anything irreversible.

    Called in the new process or thread, already in its cgroup, before its first work. The built-in plugins take the
    identity, drop the capabilities and set rlimits last, so that other plugins run with all privileges of the server.
    In a thread, do only what acts on the calling thread alone: the other threads belong to the server.

    :param policy: the policy that the process or thread will serve for the rest of its life.
    :param target: ``"process"``, ``"thread"``, or ``"command"``: a process that executes a program next.
    :param identity: the user and groups it will have, resolved for its first work; None keeps the server's.
    :raises Exception: anything raised means that the process or thread ends and the work does not run.
    """


@hookspec
def rcon_executor_started(policy: Policy) -> None:
    """Prepare a new executor process for its work: connect to a database, start threads, warm a cache.

    Called in each executor process, confined and with the rights of its work, after the application's fork hooks
    (`os.register_at_fork`) and before its first request or task. The built-in plugin calls the function that the
    setting ``executor_started`` names. What the hook does counts against the limits of the policy, but not against
    ``each.timeout``: a process that is not ready within ten seconds is killed.

    :param policy: the policy that the process serves for the rest of its life.
    :raises Exception: anything raised means that the process ends and the work does not run.
    """


@hookspec
def rcon_work_started(work: Work, policy: Policy) -> None:
    """Hear that work is about to run. Called in the host process, in the thread that serves it.

    :param work: the request, task or command.
    :param policy: the policy it runs under.
    :raises Exception: anything raised means that the work does not run.
    """


@hookspec
def rcon_work_finished(work: Work, outcome: Outcome) -> None:
    """Hear how work ended, or that it was refused. Called in the host process.

    :param work: the request, task or command.
    :param outcome: how it ended, and what it used.
    """


@hookspec
def rcon_commands(cli: click.Group) -> None:
    """Add subcommands to the command ``rcon``.

    Called in the process of the command line, for the plugins that the environment variable ``RCON_PLUGINS`` names
    (settings belong to a server), and only to run a subcommand that is not built in, or to list all of them. No server
    calls it: import modules that only commands need inside the function.

    :param cli: add to it with ``cli.command()``, ``cli.group()`` or ``cli.add_command()``. A command returns its exit
        status, or None for 0. The name of a built-in command is an error.
    """
