"""``@confined(...)``: the policy of a task, written in the task's own code."""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Callable, Container, Mapping
from typing import Any, NamedTuple, TypeVar

from celery import signals
from celery.app.task import Task
from celery.exceptions import WorkerTerminate
from celery.local import Proxy

from rcon_celery.retry.attempt import RetryPolicy
from rcon_plugins.errors import SettingsError
from rcon_plugins.settings.limit_table import SHARED_KEYS
from rcon_plugins.settings.policy import Policy

_F = TypeVar("_F", bound=Callable[..., Any])
_log = logging.getLogger("rcon")
_ATTRIBUTE = "__rcon__"
#: Keywords that are keys of the policy, not limits of each task.
_POLICY_KEYS = frozenset(Policy.__struct_fields__) - {*SHARED_KEYS, "name", "each", "isolation"}


class TaskPolicy(NamedTuple):
    """The policy that `confined` gives a task: the name of a policy in the settings, or the table of a new one."""

    name: str | None
    table: Mapping[str, Any]
    #: The retry keys given together with a name. They override those of the policy.
    retry: RetryPolicy | None = None

    def make(self, task: str, taken: Container[str]) -> Policy:
        """Return the policy of the task with this name. Choose a policy name that is not taken."""
        name = policy_name(task)
        if name in taken:
            name = f"{name[:54]}-{hashlib.blake2b(task.encode(), digest_size=4).hexdigest()}"
        return Policy.make(name, **self.table)


def confined(policy: str | None = None, /, **limits: Any) -> Callable[[_F], _F]:
    """Confine a task: under ``@app.task``, or on a task class.

    Give either the name of a policy in the settings of `install`, or limits, spelled as in a policy file. A limit holds
    for each single run of the task. ``together`` is a mapping of limits for all runs of the task on a worker together.
    Write the other keys of a policy (``per``, ``concurrency``, ``max_uses``, ``user``, ``capabilities``, …) as in a
    policy::

        @app.task
        @confined(memory="512M", timeout="60s", together={"cpu": "150%"}, concurrency=4)
        def render(name): ...

    ``on_memory``, ``max_deaths`` and ``dead_letter`` define what happens after the task died: see
    `rcon_celery.retry.attempt`. You may give them together with the name of a policy; they override its keys.

    Raises `SettingsError` for anything that a policy file may not contain. A worker does not start if `install` was not
    called for its application.
    """
    retry = {name: value for name, value in limits.items() if name in RetryPolicy.__struct_fields__}
    if policy is not None and limits.keys() - retry:
        raise SettingsError(
            "the name of a policy and limits exclude each other", key="@confined", hint="give one of them"
        )
    if policy is None and not limits.keys() - retry:
        raise SettingsError(
            "no limit is given",
            key="@confined",
            hint='give one, such as memory="512M", or the name of a policy',
        )
    if policy is None:
        task_policy = TaskPolicy(None, _table(limits))
        _check(task_policy)
    else:
        task_policy = TaskPolicy(policy, {}, RetryPolicy.make(retry))

    def decorate(function: _F) -> _F:
        if isinstance(function, (Task, Proxy)):
            raise SettingsError(
                "@confined stands above @app.task, so the task is made already",
                key="@confined",
                hint="put @confined under @app.task",
            )
        # Do not wrap the function: Celery inspects its parameters.
        setattr(function, _ATTRIBUTE, task_policy)
        signals.worker_init.connect(_refuse_without_install, weak=False, dispatch_uid="rcon_celery.confined")
        return function

    return decorate


def policy_of_class(cls: type) -> TaskPolicy | None:
    """Return the policy that `confined` gave a task's class, or the function that it runs."""
    for holder in (cls, getattr(cls, "run", None)):
        task_policy = getattr(holder, _ATTRIBUTE, None)
        if isinstance(task_policy, TaskPolicy):
            return task_policy
    return None


def policy_name(task: str) -> str:
    """Return the name of the policy made for a task: ``reports-render`` for ``reports.render``."""
    name = re.sub(r"[^a-z0-9_]+", "-", task.lower()).strip("-")
    if not re.match("[a-z]", name):
        name = f"task-{name}"
    return name[:63]


def _refuse_without_install(sender: Any, **_: object) -> None:
    """Refuse to start a worker that would run tasks with `confined` unconfined."""
    if getattr(sender.app, "rcon", None) is not None:
        return
    for name, task in sorted(sender.app.tasks.items()):
        if policy_of_class(type(task)) is not None:
            _log.error(
                "rcon: the worker does not start: task %s has @confined, but rcon_celery.install was not called for "
                "its application; call install(app) where the application is made",
                name,
            )
            raise WorkerTerminate(1)  # Celery's signals catch every Exception; this is not one


def _check(task_policy: TaskPolicy) -> None:
    """Raise `SettingsError` for a table that is not a policy, with the key as written in the decorator."""
    try:
        Policy.make("confined", **task_policy.table)
    except SettingsError as error:
        key = (error.key or "").removeprefix("policy.confined.").removeprefix("policy.confined")
        first = re.split(r"[.\[]", key)[0]
        error.key = f"@confined: {f'together.{key}' if first in SHARED_KEYS else key.removeprefix('each.')}"
        raise


def _table(keywords: Mapping[str, Any]) -> dict[str, Any]:
    """Return the table of a policy, from the keywords of the decorator."""
    table: dict[str, Any] = {}
    each: dict[str, Any] = {}
    for key, value in keywords.items():
        if key in _POLICY_KEYS:
            table[key] = value
        elif key != "together":
            each[key] = value
    return {**table, **dict(keywords.get("together") or {}), "each": each}
