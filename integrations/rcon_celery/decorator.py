"""``@confined(...)``: what a task's own code says of its confinement."""

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

from rcon_celery.retry.attempt import Learning
from rcon_plugins.errors import SettingsError
from rcon_plugins.settings.limit_table import SHARED_KEYS
from rcon_plugins.settings.policy import Policy

_F = TypeVar("_F", bound=Callable[..., Any])
LOGGER = logging.getLogger("rcon")
_MARK = "__rcon__"
#: Keywords that say something of the policy, and not of each task.
_OF_THE_POLICY = frozenset({*Policy.__struct_fields__} - {"name", "each", "isolation"})


class Mark(NamedTuple):
    """What `confined` was given: the name of a policy, or what one says."""

    policy: str | None
    content: Mapping[str, Any]
    #: What becomes of it when it dies, before what its policy says.
    learning: Learning | None = None

    def named(self, task: str, taken: Container[str]) -> Policy:
        """The policy of a task of this name, under a name that is not taken."""
        name = policy_name(task)
        if name in taken:
            name = f"{name[:54]}-{hashlib.blake2b(task.encode(), digest_size=4).hexdigest()}"
        return Policy.make(name, **self.content)


def confined(policy: str | None = None, /, **limits: Any) -> Callable[[_F], _F]:
    """Confine a task: under ``@app.task``, or on a task class.

    Either the name of a policy in the settings that `install` was given, or limits, spelled as a policy file spells
    them: they hold for each task by itself. ``together`` is a mapping of limits for all of the task's runs on a node at
    once; what else a policy may say (``per``, ``concurrency``, ``max_uses``, ``user``, ``capabilities``, …) is said as
    in a policy::

        @app.task
        @confined(memory="512M", timeout="60s", together={"cpu": "150%"}, concurrency=4)
        def render(name): ...

    ``on_memory``, ``max_deaths`` and ``dead_letter`` say what becomes of a task that dies: see
    `rcon_celery.retry.attempt`. They may stand beside a policy's name too, and go before what that says.

    Raises `SettingsError` for what a policy file could not say either. A worker whose app was not given to `install`
    does not start.
    """
    tries = {name: value for name, value in limits.items() if name in Learning.__struct_fields__}
    if policy is not None and limits.keys() - tries:
        raise SettingsError("a policy's name and limits at once", key="@confined", hint="give one of them")
    if policy is None and not limits.keys() - tries:  # what becomes of deaths is no limit
        raise SettingsError(
            "says nothing", key="@confined", hint='for example memory="512M", or a policy\'s name'
        )
    if policy is None:
        mark = Mark(None, _content(limits))
        _check(mark)
    else:
        mark = Mark(policy, {}, Learning.make(tries))

    def decorate(function: _F) -> _F:
        if isinstance(function, (Task, Proxy)):
            raise SettingsError(
                "stands above @app.task, where it comes too late",
                key="@confined",
                hint="put it under @app.task",
            )
        # Not a wrapper: Celery looks at what arguments the function takes.
        setattr(function, _MARK, mark)
        signals.worker_init.connect(_refuse_without_install, weak=False, dispatch_uid="rcon_celery.confined")
        return function

    return decorate


def _refuse_without_install(sender: Any, **_: object) -> None:
    """A worker starts: not with tasks that are to be confined and would not be."""
    if getattr(sender.app, "rcon", None) is not None:
        return
    for name, task in sorted(sender.app.tasks.items()):
        if mark_of(type(task)) is not None:
            LOGGER.error(
                "rcon: %s is to be confined, and its application was not given to rcon_celery.install; "
                "the worker does not start",
                name,
            )
            raise WorkerTerminate(1)  # what is no Exception is all that a signal's sender lets through


def _check(mark: Mark) -> None:
    """Raise `SettingsError` for what no policy can say, here, where it is written; the key is as it is written."""
    try:
        Policy.make("confined", **mark.content)
    except SettingsError as error:
        key = (error.key or "").removeprefix("policy.confined.").removeprefix("policy.confined")
        first = re.split(r"[.\[]", key)[0]
        error.key = f"@confined: {f'together.{key}' if first in SHARED_KEYS else key.removeprefix('each.')}"
        raise


def mark_of(cls: type) -> Mark | None:
    """The mark of a task class, whether on it or on the function that it runs."""
    for holder in (cls, getattr(cls, "run", None)):
        mark = getattr(holder, _MARK, None)
        if isinstance(mark, Mark):
            return mark
    return None


def policy_name(task: str) -> str:
    """A name of a policy for a task: ``reports.render`` has ``reports-render``."""
    name = re.sub(r"[^a-z0-9_]+", "-", task.lower()).strip("-")
    if not re.match("[a-z]", name):
        name = f"task-{name}"
    return name[:63]


def _content(keywords: Mapping[str, Any]) -> dict[str, Any]:
    """A policy's table from the keywords of the decorator."""
    together = dict(keywords.get("together") or {})
    content: dict[str, Any] = {}
    each: dict[str, Any] = {}
    for key, value in keywords.items():
        if key == "together":
            continue
        if key in _OF_THE_POLICY and key not in SHARED_KEYS:
            content[key] = value
        else:
            each[key] = value
    return {**content, **together, "each": each}
