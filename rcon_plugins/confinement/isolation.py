"""Choose the isolation of each policy on this machine and server, and find the limits that cannot be enforced.

``auto`` chooses the cheaper of ``inline`` and ``process`` that enforces *all* limits of the policy. ``thread`` is used
only if the policy names it. See docs/explanation/isolation.md.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Literal, NamedTuple

from rcon_plugins.errors import KernelError, RconError, SettingsError
from rcon_plugins.identity import privileges
from rcon_plugins.identity.resolution import resolve
from rcon_plugins.kernel import landlock, namespaces, seccomp
from rcon_plugins.kernel.capability import CAP_SYS_ADMIN, read_state
from rcon_plugins.kernel.cgroup import Hierarchy, Refusal, Resources
from rcon_plugins.settings.limit_table import KEY_OF_FIELD
from rcon_plugins.settings.limits import Limits
from rcon_plugins.settings.policy import Policy

if TYPE_CHECKING:
    import pluggy

#: The `each` limits that only send a signal to the work. The work reaches them before the hard limit.
SOFT_LIMITS = ("timeout_soft", "memory_soft")

Isolation = Literal["inline", "thread", "process"]


class Server(NamedTuple):
    """The traits of a server that decide how its work can be confined.

    ``threads``: other threads of the process serve other work, and share the GIL with it. ``greenlets``: several units
    of work share one thread, so none can own the thread it runs in. ``tasks``: its work is tasks, which receive
    `SOFT_LIMITS` as signals, and whose child processes end with them.
    """

    threads: bool = True
    greenlets: bool = False
    tasks: bool = False


class Verdict(NamedTuple):
    """The isolation chosen for one policy, the reason, and the limits that cannot be enforced.

    ``caveat`` is one sentence: why this policy only guards against accidents. None if it contains untrusted code.
    """

    policy: Policy
    isolation: Isolation
    why: str
    refusals: tuple[Refusal, ...]
    caveat: str | None = None

    def check(self, file: str | None = None) -> None:
        """Raise `SettingsError` with the limit, the reason and the remedy if anything cannot be enforced."""
        for refusal in self.refusals:
            raise SettingsError(
                f"cannot be enforced on this machine: {refusal.reason}",
                key=f"policy.{self.policy.name}.{refusal.limit}",
                hint=refusal.remedy,
                file=file,
            )


def resources_of(hook: pluggy.HookRelay, limits: Limits, policy: Policy) -> Resources:
    """Return the merged results of the hook `rcon_resources`. Raises what the plugins raise."""
    return Resources.merged(hook.rcon_resources(limits=limits, policy=policy))


def judge(policy: Policy, server: Server, hierarchy: Hierarchy, hook: pluggy.HookRelay) -> Verdict:
    """Return the verdict on a policy: its isolation, and the limits that this machine and process cannot enforce."""
    try:
        together = resources_of(hook, policy, policy)
        each = resources_of(hook, policy.each, policy)
    except KernelError as error:
        return _of_no_disk(policy, error)
    as_thread = _as_written(hierarchy.refusals(together, threaded=True))
    as_process = _as_written(hierarchy.refusals(together))
    as_process += _as_written(hierarchy.refusals(each, within=together), "each.")
    identity = privileges.refusals(policy)
    soft = _soft_limit_refusals(policy, server, hierarchy) + _grace_refusals(policy, server)
    as_process += identity + soft + _privilege_refusals(policy) + _memory_refusals(policy)
    if not server.tasks:
        tries = [  # for any isolation
            Refusal(key, "only Celery tasks are retried", "leave it out") for key in policy.retry_keys
        ]
        as_process += tries
        as_thread += tries
    if policy.isolation == "thread":
        as_thread += identity + soft
    if policy.isolation in ("inline", "thread") and server.greenlets:
        as_thread.append(
            Refusal(
                "isolation",
                "greenlets share one thread, so no single greenlet can be confined in it",
                'use isolation = "auto" or "process"',
            )
        )
    need = _needs_process(policy, server, as_thread)
    if policy.isolation == "auto":
        if need:
            return Verdict(policy, "process", need, tuple(as_process), caveat(policy, server))
        return Verdict(policy, "inline", "the cheapest isolation that enforces all its limits", (), _SHARED)
    why = f'the policy says isolation = "{policy.isolation}"'
    if policy.isolation == "process":
        return Verdict(policy, "process", why, tuple(as_process), caveat(policy, server))
    return Verdict(policy, policy.isolation, why, tuple(as_thread), _SHARED)


def judge_command(policy: Policy, hierarchy: Hierarchy, hook: pluggy.HookRelay) -> Verdict:
    """Return the verdict on a policy for one command, which always runs in a process."""
    try:
        together = resources_of(hook, policy, policy)
        each = resources_of(hook, policy.each, policy)
    except KernelError as error:
        return _of_no_disk(policy, error)
    refusals = _as_written(hierarchy.refusals(together))
    refusals += _as_written(hierarchy.refusals(each, within=together), "each.")
    refusals += _soft_limits_of_others(policy)
    return Verdict(policy, "process", "it is a command", (*refusals, *privileges.refusals(policy)))


def _of_no_disk(policy: Policy, error: KernelError) -> Verdict:
    """Return the verdict for an IO limit whose disk is not found. Re-raise any other error."""
    if not policy.io and not policy.each.io:
        raise error
    limits, table = (policy.each, "each.") if error.path in policy.each.io else (policy, "")
    key = f"{table}io.{error.path}" if error.path in limits.io else "io"
    refusal = Refusal(key, error.problem, error.hint or "name a path on a disk")
    isolation: Isolation = "process" if policy.isolation == "auto" else policy.isolation
    return Verdict(policy, isolation, "the disk of its IO limit is not found", (refusal,))


def _as_written(refusals: list[Refusal], table: str = "") -> list[Refusal]:
    """Return the refusals with the names of `Resources` fields replaced by the keys of a policy."""
    return [one._replace(limit=table + KEY_OF_FIELD.get(one.limit, one.limit)) for one in refusals]


def process_refusals(verdict: Verdict) -> list[Refusal]:
    """Return the refusals for privileges that the policy needs and the calling process lacks."""
    if verdict.isolation == "inline":
        return []
    policy = verdict.policy
    found = privileges.refusals(policy)
    if verdict.isolation == "thread":
        return found
    return found + _privilege_refusals(policy) + _memory_refusals(policy)


def _privilege_refusals(policy: Policy) -> list[Refusal]:
    """Return a refusal if executor processes of the policy could write the cgroup files, or leave their cgroups."""
    if policy.no_new_privs or CAP_SYS_ADMIN in read_state().permitted:
        return []
    if not landlock.abi() and not seccomp.is_available():
        return []
    return [
        Refusal(
            "no_new_privs",
            "with no_new_privs = false, protecting the cgroups needs CAP_SYS_ADMIN (landlock(7), seccomp(2))",
            "leave no_new_privs out, or run the server as root",
        )
    ]


def _memory_refusals(policy: Policy) -> list[Refusal]:
    """Return a refusal if a policy requires private memory, and executor processes cannot have it."""
    reason = namespaces.why_not() if policy.shared_memory == "private" else None
    if reason is None:
        return []
    return [
        Refusal(
            "shared_memory",
            f"executor processes cannot have memory of their own: {reason}",
            "run the server as root, or leave shared_memory out and set memory",
        )
    ]


def shares_memory(policy: Policy, uid: int | None = None) -> bool:
    """Return whether executor processes of a policy share ``/dev/shm`` and IPC with the server.

    ``uid`` is the server's user, if it differs from that of the calling process. Raises `KernelError`.
    """
    gives = _gives_namespaces(
        uid
    )  # asked of each policy: what this trial finds counts for the forks of this process
    return policy.shared_memory == "server" or not gives


def _gives_namespaces(uid: int | None) -> bool:
    """Return whether the server gives executor processes namespaces. It cannot after a change of its user."""
    return uid in (None, os.geteuid()) and namespaces.why_not() is None


def _soft_limit_refusals(policy: Policy, server: Server, hierarchy: Hierarchy) -> list[Refusal]:
    """Return a refusal for each soft limit of a policy whose work cannot receive the signal."""
    if server.tasks:
        if policy.each.memory_soft is None or "memory" in hierarchy.controllers:
            return []
        needed = hierarchy.refusals(Resources(memory_max=policy.each.memory_soft))
        return [refusal._replace(limit="each.memory_soft") for refusal in needed]
    return _soft_limits_of_others(policy)


def _soft_limits_of_others(policy: Policy) -> list[Refusal]:
    """Return a refusal for each soft limit of a policy whose work is no task."""
    return [
        Refusal(
            f"each.{limit}",
            "only Celery tasks can receive a soft limit",
            f"leave it out; each.{limit.partition('_')[0]} is enforced",
        )
        for limit in SOFT_LIMITS
        if getattr(policy.each, limit) is not None
    ]


def _grace_refusals(policy: Policy, server: Server) -> list[Refusal]:
    """Return a refusal for a grace of requests: their clients get the response at the time limit, not after it."""
    if server.tasks or policy.each.grace is None:
        return []
    reason = "a request is answered and killed at its time limit; only tasks and commands have a grace"
    return [Refusal("each.grace", reason, "leave it out; each.timeout is enforced")]


#: The caveat for work that runs in threads of the server.
_SHARED = "shares memory with the server: guards against accidents only, and does not contain untrusted code"


def caveat(policy: Policy, server: Server, uid: int | None = None) -> str | None:
    """Return why a policy whose work runs in processes does not contain untrusted code; None if it does.

    ``uid`` is the server's user; None is that of the calling process.
    """
    uid = os.geteuid() if uid is None else uid
    if _work_uid(policy, uid) != uid:
        return None
    work = "tasks" if server.tasks else "requests"
    leave = "" if seccomp.is_available() else f" They can leave their cgroups: {seccomp.NONE_HERE}."
    modes = "" if _gives_namespaces(uid) else "the permissions of the cgroup files"
    if uid == 0:
        can = f"change {modes} and overwrite" if modes else "overwrite"
        return (
            f"{work} run as root and can {can} root's files.{leave} Set `user =` to contain untrusted code."
        )
    can = f"change {modes} and" if modes else "change"
    if not landlock.abi():
        can = "write the cgroup files and change"
    return (
        f"{work} run as the server's user (uid {uid}), and can {can} the rlimits of other {work}.{leave} "
        "Set `user =` to contain untrusted code."
    )


def _work_uid(policy: Policy, server: int) -> int | None:
    """Return the uid that work of the policy runs as; None if it depends on the request or task."""
    if policy.user is None:
        return server
    if policy.user.path is not None:
        return None
    try:
        identity = resolve(policy, {})
    except RconError:
        return None  # the check of the identity refuses it
    return None if identity is None else identity.uid


def _needs_process(policy: Policy, server: Server, as_thread: list[Refusal]) -> str | None:
    """Return why only a process can enforce the policy; None if a thread can."""
    if policy.each.limits_set():
        return "`each` limits need a process for each unit of work"
    if policy.identity_keys:
        return f"{' and '.join(policy.identity_keys)}: only a process can change its identity irreversibly"
    if policy.shared_memory == "private":
        return "only a process can have memory of its own"
    if server.tasks:
        return "only a process can end the child processes of a task together with the task"
    if server.greenlets:
        return "greenlets share one thread, so no single greenlet can be confined in it"
    if policy.cpu is not None and server.threads:
        return "a CPU quota would stop a thread that holds the GIL, and all other threads would wait"
    if as_thread:
        return f"{as_thread[0].limit}: {as_thread[0].reason}"
    return None
