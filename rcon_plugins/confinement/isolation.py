"""Which way in: the choice of the isolation of a policy, on this machine and server.

``auto`` takes the cheapest of ``inline`` and ``process`` that enforces *all* the policy asks for; ``thread`` is only
ever taken where the policy names it. See docs/explanation/isolation.md.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Literal, NamedTuple

from rcon_plugins.errors import KernelError, RconError, SettingsError
from rcon_plugins.identity import privileges
from rcon_plugins.identity.resolution import resolve
from rcon_plugins.kernel import landlock
from rcon_plugins.kernel.capability import CAP_SYS_ADMIN, read_state
from rcon_plugins.kernel.cgroup import Hierarchy, Refusal, Resources
from rcon_plugins.settings.limit_table import KEY_OF_FIELD
from rcon_plugins.settings.limits import Limits
from rcon_plugins.settings.policy import Policy

if TYPE_CHECKING:
    import pluggy

#: Limits of each work at which it is told to come to its end.
SOFT_LIMITS = ("timeout_soft", "memory_soft")

Isolation = Literal["inline", "thread", "process"]


class Server(NamedTuple):
    """What of the host decides how work can be confined.

    ``threads``: other threads of this process serve other work, and share the GIL with it. ``greenlets``: several
    works share one thread, so that no work can own the thread it runs in. ``tasks``: its work is tasks, whose
    service in executor processes expects to be told of `SOFT_LIMITS`, and with which all ends that they have started.
    """

    threads: bool = True
    greenlets: bool = False
    tasks: bool = False


class Verdict(NamedTuple):
    """What becomes of one policy here: the isolation chosen, why, and what cannot be enforced.

    ``caveat``: in one sentence, why this policy bounds accidents and not code that means harm; None where it does.
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
    """Merge what the plugins return for `rcon_resources`. Raises what they raise."""
    return Resources.merged(hook.rcon_resources(limits=limits, policy=policy))


def judge(policy: Policy, server: Server, hierarchy: Hierarchy, hook: pluggy.HookRelay) -> Verdict:
    """Choose the isolation of a policy and find what of it this machine cannot enforce."""
    try:
        together = resources_of(hook, policy, policy)
        each = resources_of(hook, policy.each, policy)
    except KernelError as error:
        return _of_no_disk(policy, error)
    as_thread = _as_written(hierarchy.refusals(together, threaded=True))
    as_process = _as_written(hierarchy.refusals(together))
    as_process += _as_written(hierarchy.refusals(each, within=together), "each.")
    identity = privileges.refusals(policy) + _without_warning(policy, server, hierarchy)
    as_process += identity + _without_walls(policy)
    if not server.tasks:
        # Whatever way in: nobody else tries work again.
        tries = [
            Refusal(key, "only a task of Celery is tried again, and counted", "leave it out")
            for key in policy.wants_tries
        ]
        as_process += tries
        as_thread += tries
    if policy.isolation == "thread":
        as_thread += identity
    if policy.isolation in ("inline", "thread") and server.greenlets:
        as_thread.append(
            Refusal(
                "isolation",
                "greenlets share one thread, so that a work cannot own the thread it runs in",
                'use isolation = "auto" or "process"',
            )
        )
    need = _needs_process(policy, server, as_thread)
    if policy.isolation == "auto":
        if need:
            return Verdict(policy, "process", need, tuple(as_process), caveat(policy))
        return Verdict(policy, "inline", "the cheapest that enforces all this policy asks for", (), _SHARED)
    why = f'the policy says isolation = "{policy.isolation}"'
    if policy.isolation == "process":
        return Verdict(policy, "process", why, tuple(as_process), caveat(policy))
    return Verdict(policy, policy.isolation, why, tuple(as_thread), _SHARED)


def _of_no_disk(policy: Policy, error: KernelError) -> Verdict:
    """The verdict where the disk of an IO limit cannot be found; other errors are raised again."""
    if not policy.io and not policy.each.io:
        raise error
    limits, table = (policy.each, "each.") if error.path in policy.each.io else (policy, "")
    key = f"{table}io.{error.path}" if error.path in limits.io else "io"
    refusal = Refusal(key, error.problem, error.hint or "name a path on a disk")
    isolation: Isolation = "process" if policy.isolation == "auto" else policy.isolation
    return Verdict(policy, isolation, "the disk of its IO limits is not found", (refusal,))


def _as_written(refusals: list[Refusal], table: str = "") -> list[Refusal]:
    """The same, by the keys of a policy."""
    return [one._replace(limit=table + KEY_OF_FIELD.get(one.limit, one.limit)) for one in refusals]


def _without_walls(policy: Policy) -> list[Refusal]:
    """What keeps an executor process from being walled in."""
    if policy.no_new_privs or not landlock.abi() or CAP_SYS_ADMIN in read_state().permitted:
        return []
    return [
        Refusal(
            "no_new_privs",
            "without it, only a server with CAP_SYS_ADMIN may keep work away from the cgroup files (landlock(7))",
            "leave no_new_privs out, or run the server as root",
        )
    ]


def _without_warning(policy: Policy, server: Server, hierarchy: Hierarchy) -> list[Refusal]:
    """The limits that only tell work something, where nobody could tell it."""
    if server.tasks:
        if policy.each.memory_soft is None or "memory" in hierarchy.controllers:
            return []
        return [Refusal("each.memory_soft", "the memory controller is not available", "leave it out")]
    return [
        Refusal(
            f"each.{limit}",
            "only a task of Celery can be told to come to its end",
            f"leave it out, each.{limit.partition('_')[0]} is enforced",
        )
        for limit in SOFT_LIMITS
        if getattr(policy.each, limit) is not None
    ]


_SHARED = "its work shares memory with the server: this bounds accidents, and is no boundary"


def caveat(policy: Policy, uid: int | None = None) -> str | None:
    """Why work of a policy in processes is bounded against accidents only; None where its boundary is whole.

    ``uid`` is the server's user; None is that of the calling process.
    """
    server = os.geteuid() if uid is None else uid
    if _work_uid(policy, server) != server:
        return None
    if server == 0:
        return (
            "its work is root, if without capabilities: root's files and the settings of the kernel are its own to "
            "write; a boundary takes a user of its own"
        )
    walls = (
        "may change the permissions of the cgroup files" if landlock.abi() else "may write the cgroup files"
    )
    return (
        f"its work has the server's own user, and {walls} and the rlimits of its neighbours; a boundary takes a user "
        "of its own"
    )


def _work_uid(policy: Policy, server: int) -> int | None:
    """The user that work of the policy has; None where that depends on the work."""
    if policy.user is None:
        return server
    if policy.user.path is not None:
        return None
    try:
        identity = resolve(policy, {})
    except RconError:
        return None  # which is a fault of its own, and told as one
    return None if identity is None else identity.uid


def _needs_process(policy: Policy, server: Server, as_thread: list[Refusal]) -> str | None:
    """Why only a process will do; None where a thread can carry the policy."""
    if policy.each.asks():
        return "limits of each work need a process for each"
    if policy.wants_identity:
        return f"{' and '.join(policy.wants_identity)}: only a process can take an identity for good, and be a boundary"
    if server.tasks:
        return "what a task has started ends with it, which takes a process"
    if server.greenlets:
        return "greenlets share one thread, which therefore cannot be confined for one of them"
    if policy.cpu is not None and server.threads:
        return "a CPU quota would stop the thread while it holds the GIL, and with it every other thread"
    if as_thread:
        return f"{as_thread[0].limit}: {as_thread[0].reason}"
    return None
