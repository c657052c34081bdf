"""What the workers of an application confine, asked for from anywhere: what ``rcon top --celery`` shows."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from celery import Celery
from celery.app.utils import find_app
from kombu.exceptions import OperationalError

from rcon_plugins.errors import RconError, SettingsError
from rcon_plugins.groups.find import Sample
from rcon_plugins.groups.sample import of_data

#: How long answers are waited for when all workers are asked, and when those are that answered before, in seconds.
_FIRST_WAIT, _WAIT = 2.0, 1.0
#: How often all are asked, so that new workers are found, in seconds.
_SEARCH = 10.0


class NoAnswer(RconError):
    """Raised when the workers of an application cannot be asked, or none of them confines tasks."""


def load(name: str) -> Celery:
    """The application that ``celery -A NAME`` takes. Raises `SettingsError` where there is none."""
    try:
        app = find_app(name)
    except Exception as error:
        raise SettingsError(
            f"{name!r} cannot be loaded as a Celery application: {type(error).__name__}: {error}",
            hint=f"as for celery -A {name} report",
        ) from error
    if not isinstance(app, Celery):
        raise SettingsError(f"{name!r} is no Celery application", hint=f"as for celery -A {name} report")
    return app


class Nodes:
    """All workers of an application. ``say`` is told, once each, which of them do not tell what they confine."""

    def __init__(self, app: Celery, say: Callable[[str], object]) -> None:
        self._app = app
        self._say = say
        self._connection = app.connection_for_write()
        self._known: list[str] = []
        self._searched: float | None = None

    def samples(self) -> list[Sample]:
        """A sample of each confinement on each worker.

        Raises `NoAnswer` where the broker cannot be reached; the first time also where nobody answers.
        """
        first = self._searched is None
        answers = self._ask()
        samples: list[Sample] = []
        silent: dict[str, str] = {}
        for node, answer in sorted(answers.items()):
            try:
                samples += _samples(node, answer)
            except RconError as error:
                silent[node] = str(error)
        if first and not answers:
            raise NoAnswer(
                "no worker answers: is one running, with remote control, on this broker "
                f"({self._connection.as_uri()})?"
            )
        if first and len(silent) == len(answers):
            node, why = next(iter(silent.items()))
            raise NoAnswer(f"{node}: {why}")
        if first:
            for node, why in silent.items():
                self._say(f"{node}: {why}")
        return samples

    def _ask(self) -> dict[str, Any]:
        """What each worker answers. All are asked now and then; else those that answered, which takes no longer."""
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
    """Of one worker. Raises `RconError` where it tells of none."""
    if not isinstance(answer, Mapping) or not isinstance(answer.get("confinements"), Mapping):
        why = answer.get("error") if isinstance(answer, Mapping) else None
        raise NoAnswer(str(why or "it does not tell what it confines: is rcon_celery of this version there?"))
    cgroup = answer.get("cgroup")
    return [
        of_data(
            told,
            id=f"{node} {cgroup}/{name}",
            name=f"{node}/{name}",
            owner=f"celery worker {node}",
            node=node,
        )
        for name, told in sorted(answer["confinements"].items())
    ]
