"""The confinements of all workers of an application, through Celery's remote control.

Workers answer the commands ``celery -A proj inspect rcon`` and ``celery -A proj control rcon_set``; `Workers` sends the
first for ``rcon top --celery proj``.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Final

from celery import Celery
from celery.app.utils import find_app
from celery.worker.control import control_command, inspect_command
from kombu.exceptions import OperationalError

from rcon_celery.worker import ConfinedWorker
from rcon_plugins.errors import KernelError, RconError, SettingsError
from rcon_plugins.groups.find import Group, find_groups
from rcon_plugins.groups.sample import Sample, Samples, ServerSample, from_data, to_data
from rcon_plugins.settings.limit_text import as_written
from rcon_plugins.tally.reader import Counts, TallyOfServer

_NOT_CONFINED: Final = {
    "error": "tasks are not confined: rcon_celery.install was not called for the application"
}
#: How long to wait for answers of all workers: the first time, and later. In seconds.
_FIRST_WAIT, _WAIT = 2.0, 1.0
#: The interval between requests to all workers, which find new workers; seconds.
_SEARCH: Final = 10.0

_log = logging.getLogger("rcon")


def register() -> None:
    """Register the commands for workers, and for ``celery inspect``, which loads the application too."""
    inspect_command(name="rcon", default_timeout=5.0)(rcon)
    control_command(
        name="rcon_set",
        args=[("policy", str), ("limit", str), ("value", str)],
        signature="POLICY LIMIT VALUE",
        default_timeout=5.0,
    )(rcon_set)


def rcon(state: Any) -> dict[str, Any]:
    """Show policies, running confinements, what they use, and how tasks ended."""
    worker = _worker_of(state)
    if worker is None:
        return _NOT_CONFINED
    return {
        "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "when": time.monotonic(),
        "cgroup": worker.deployment.instance.path,
        "policies": {
            name: _limits_of(policy) for name, policy in sorted(worker.deployment.policies.all().items())
        },
        "confinements": _confinements(worker),
        **_sums(worker.tally()),
    }


def rcon_set(state: Any, policy: str = "", limit: str = "", value: str = "") -> dict[str, Any]:
    """Change a limit of a policy, for running tasks and later ones."""
    worker = _worker_of(state)
    if worker is None:
        return _NOT_CONFINED
    if not (policy and limit and value):
        return {"error": "give POLICY, LIMIT and VALUE: rcon_set reports each.memory 512M"}
    try:
        made = worker.deployment.change(policy, limit, str(value))
    except RconError as error:
        return {"error": " ".join(str(error).split())}
    before, after = ("no limit" if each is None else each for each in (made.old, made.new))
    _log.warning("rcon: policy %s: %s changed from %s to %s", policy, limit, before, after)
    return {
        "ok": {
            "policy": policy,
            "limit": limit,
            "before": made.old,
            "after": made.new,
            "cgroups": made.cgroups,
            "kept": made.kept,
            "notes": list(made.notes),
        }
    }


def _worker_of(state: Any) -> ConfinedWorker | None:
    """Return the confined worker that a command reached; None if `install` was not called for its application."""
    installation = getattr(state.app, "rcon", None)
    worker: ConfinedWorker | None = None if installation is None else installation.worker
    return worker


def _limits_of(policy: Any) -> dict[str, Any]:
    """Return the limits of a policy that are set, spelled as in a settings file."""
    limits = {
        name: as_written(name, getattr(policy, name)) for name in policy.limits_set() if "." not in name
    }
    each = {name: as_written(name, getattr(policy.each, name)) for name in policy.each.limits_set()}
    if policy.concurrency is not None:
        limits["concurrency"] = policy.concurrency
    limits |= {name: as_written(name, getattr(policy, name)) for name in policy.retry_keys}
    return {**limits, "each": each} if each else limits


def _confinements(worker: ConfinedWorker) -> dict[str, dict[str, Any]]:
    """Return the usage of each running confinement of a worker, by name. It covers all its tasks together."""
    instance = worker.deployment.instance.path.rpartition("/")[2]
    found = {}
    for group in find_groups().groups:
        if group.instance == instance and group.kind == "work":
            try:
                found[group.name] = _usage_of(group)
            except KernelError:
                continue  # it has ended meanwhile
    return found


def _sums(tally: TallyOfServer | None) -> dict[str, dict[str, int] | None]:
    """Return how all tasks of a worker ended, and why others did not begin. None: unknown."""
    if tally is None:
        return {"endings": None, "refusals": None}
    whole = sum(tally.counts.values(), start=Counts())
    return {
        "endings": {name: number for name, number in whole.endings.items() if number},
        "refusals": {name: number for name, number in whole.refusals.items() if number},
    }


def _usage_of(group: Group) -> dict[str, Any]:
    return {"processes": len(group.pids()), **to_data(group.sample())}


class NoAnswer(RconError):
    """Raised when the workers of an application cannot be reached, or when none of them confines tasks."""


def load(name: str) -> Celery:
    """Return the application that ``celery -A NAME`` loads. Raises `SettingsError` if that fails."""
    hint = f"celery -A {name} report must work"
    try:
        app = find_app(name)
    except Exception as error:
        raise SettingsError(
            f"{name!r} cannot be loaded as a Celery application: {type(error).__name__}: {error}", hint=hint
        ) from error
    if not isinstance(app, Celery):
        raise SettingsError(f"{name!r} is not a Celery application", hint=hint)
    return app


class Workers:
    """All workers of an application. ``say`` is called once, with a message, for each that does not confine tasks."""

    def __init__(self, app: Celery, say: Callable[[str], object]) -> None:
        self._app = app
        self._say = say
        self._connection = app.connection_for_write()
        self._known: list[str] = []
        self._searched: float | None = None

    def samples(self) -> Samples:
        """Return a sample of each confinement on each worker, and of each worker.

        Raises `NoAnswer` if the broker cannot be reached; the first time also if no worker answers.
        """
        first = self._searched is None
        answers = self._ask()
        groups: list[Sample] = []
        servers: list[ServerSample] = []
        errors: dict[str, str] = {}
        for node, answer in sorted(answers.items()):
            try:
                groups += _samples(node, answer)
                servers.append(_server(node, answer))
            except RconError as error:
                errors[node] = str(error)
        if first and not answers:
            raise NoAnswer(
                f"no worker answers on the broker {self._connection.as_uri()}: "
                "start one, with remote control, on this broker"
            )
        if first and len(errors) == len(answers):
            node, error_text = next(iter(errors.items()))
            raise NoAnswer(f"{node}: {error_text}")
        if first:
            for node, error_text in errors.items():
                self._say(f"{node}: {error_text}")
        return Samples(groups, servers)

    def _ask(self) -> dict[str, Any]:
        """Return each worker's answer. Ask all workers from time to time, else those that answered, which is faster."""
        searching = self._searched is None or not self._known or time.monotonic() >= self._searched + _SEARCH
        among: Mapping[str, Any] = (
            {} if searching else {"destination": self._known, "limit": len(self._known)}
        )
        try:
            if not self._connection.connected:
                self._connection.ensure_connection(max_retries=1, interval_start=0)
            replies: Sequence[Mapping[str, Any]] | None = self._app.control.broadcast(
                "rcon",
                reply=True,
                timeout=_FIRST_WAIT if self._searched is None else _WAIT,
                connection=self._connection,
                **among,
            )
        except (
            OperationalError,
            *self._connection.connection_errors,
            *self._connection.channel_errors,
        ) as error:
            self._connection.close()
            self._connection = self._app.connection_for_write()
            raise NoAnswer(f"the broker {self._connection.as_uri()} cannot be reached: {error}") from error
        if searching:
            self._searched = time.monotonic()
        answers = {node: answer for reply in replies or () for node, answer in reply.items()}
        self._known = sorted(answers)
        return answers


def _samples(node: str, answer: Any) -> list[Sample]:
    """Return the samples in one worker's answer. Raises `RconError` if it has none."""
    if not isinstance(answer, Mapping) or not isinstance(answer.get("confinements"), Mapping):
        error = answer.get("error") if isinstance(answer, Mapping) else None
        raise NoAnswer(
            str(error or "it does not answer `inspect rcon`: install this version of rcon-plugins on it")
        )
    cgroup = answer.get("cgroup")
    return [
        from_data(
            data,
            id=f"{node} {cgroup}/{name}",
            name=f"{node}/{name}",
            owner=f"celery worker {node}",
            node=node,
        )
        for name, data in sorted(answer["confinements"].items())
    ]


def _server(node: str, answer: Mapping[str, Any]) -> ServerSample:
    """Return how many tasks of a worker no route names, by its answer."""
    refusals = answer.get("refusals")  # None: unknown. It has only reasons that are not 0.
    unroutable = refusals.get("unroutable", 0) if isinstance(refusals, Mapping) else None
    return ServerSample(
        instance=str(answer.get("cgroup")).rpartition("/")[2],
        owner=f"celery worker {node}",
        unroutable=unroutable if isinstance(unroutable, int) else None,
        node=node,
    )
