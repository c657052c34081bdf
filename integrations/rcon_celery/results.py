"""The outcome of a task: stored with its result by the result backend, and sent as an event.

A subclass of the application's own result backend adds the key ``rcon`` to the metadata of a result; `outcome_of` reads
it. A worker that sends events (``celery worker -E``) sends one of the type ``rcon-task`` for each confined task.
"""

from __future__ import annotations

import logging
from functools import partial
from typing import Any, Final, NamedTuple

import msgspec
from celery.app.backends import by_name, by_url
from celery.backends.base import DisabledBackend

from rcon_plugins.outcome import Outcome
from rcon_plugins.work import Usage

_log = logging.getLogger("rcon")

#: The key in a result's metadata.
KEY: Final = "rcon"
#: The attribute of a task's request that holds its outcome until the result is stored.
_ATTRIBUTE: Final = "rcon_outcome"
EVENT: Final = "rcon-task"
_FIELDS: Final = tuple(name for name in Outcome.__struct_fields__ if name not in ("detail", "usage"))


def outcome_of(result: Any) -> Outcome | None:
    """Return the outcome of a task from its `AsyncResult`; None if it was not confined or still runs.

    ``outcome_of(result).usage.memory_peak`` is in bytes. For a task that was retried it is the outcome of the last
    attempt. The metadata leaves out ``detail``, the sentence for people: it is the message of the exception.
    """
    # The backend `rpc` receives a result only once; after that only the AsyncResult has it.
    stored = result._get_task_meta().get(KEY)  # noqa: SLF001 - no public method returns all of the metadata
    return msgspec.convert(stored, Outcome) if stored is not None else None


def as_data(outcome: Outcome) -> dict[str, Any]:
    """Return an outcome as plain data, without the fields that are not set."""
    data: dict[str, Any] = {}
    for name in _FIELDS:
        value = getattr(outcome, name)
        if value is not None and value != "":
            data[name] = value
    usage = data["usage"] = {}
    for name in Usage.__struct_fields__:
        value = getattr(outcome.usage, name)
        if value is not None:
            usage[name] = value
    return data


def record(task: Any, outcome: Outcome, *, send_event: bool) -> None:
    """Note the outcome, to be stored with the task's result, and send an event if the worker sends events."""
    setattr(task.request, _ATTRIBUTE, outcome)
    if not send_event:
        return
    data = as_data(outcome)
    try:
        task.send_event(EVENT, name=task.name, **data.pop("usage"), **data)
    except Exception as error:  # noqa: BLE001 - of any transport; the task ended, whether the event is sent or not
        _log.warning(
            "rcon: %s[%s]: its %s event cannot be sent: %s", task.name, task.request.id, EVENT, error
        )


def recorded(task: Any) -> Outcome | None:
    """Return the outcome that `record` noted for the task that is running; None before its end."""
    outcome = getattr(task.request, _ATTRIBUTE, None)
    return outcome if isinstance(outcome, Outcome) else None  # a message can put any other value there


def add_to_backend(app: Any) -> None:
    """Make the application's result backend store outcomes.

    Celery makes the backend at its first use. It is looked up then, so that a setting changed until then counts.
    """
    app._get_backend = partial(_make_backend, app)  # noqa: SLF001 - an application cannot be given a made backend


def _make_backend(app: Any) -> Any:
    cls, url = by_url(_storing(app.backend_cls or app.conf.result_backend), app.loader)
    return cls(app=app, url=url)


def _storing(setting: Any) -> Any:
    """Return the setting for a subclass of its backend that stores outcomes.

    The setting names a backend by a URL or an alias. Celery accepts the implementing class in front of it.
    """
    if not isinstance(setting, str) or setting.startswith("disabled"):
        return setting
    name, separator, url = _name_and_url(setting)
    return f"{__name__}:{name.replace(':', '/')}{separator}{url}"


class BackendTraits(NamedTuple):
    """The traits of a result backend that decide how a result is encoded."""

    serializer: str
    #: Whether it drops all results.
    is_disabled: bool

    @classmethod
    def of(cls, backend: Any) -> BackendTraits:
        """Return the traits of a backend."""
        return cls(str(backend.serializer), isinstance(backend, DisabledBackend))


def traits_of(app: Any) -> BackendTraits | None:
    """Return the traits of the application's result backend; None if the backend cannot be made.

    Make a backend and discard it, so that each fork of this process makes its own.
    """
    try:
        cls, url = by_url(app.backend_cls or app.conf.result_backend, app.loader)
        return BackendTraits.of(cls(app=app, url=url))
    except Exception:  # noqa: BLE001 - a backend may raise anything; a task that needs it raises it again
        return None


def _name_and_url(setting: str) -> tuple[str, str, str]:
    # Do the same as celery.app.backends.by_url.
    scheme, has_url, _ = setting.partition("://")
    if not has_url:
        return setting, "", ""
    if "+" in scheme:
        name, _, url = setting.partition("+")
        return name, "+", url
    return scheme, "+", setting


class _StoresOutcomes:
    """Mixin that makes a result backend store outcomes."""

    def _get_result_meta(self, result: Any, state: str, traceback: Any, request: Any, **options: Any) -> Any:
        meta: dict[str, Any] = super()._get_result_meta(  # type: ignore[misc]
            result=result, state=state, traceback=traceback, request=request, **options
        )
        outcome = getattr(request, _ATTRIBUTE, None)
        if isinstance(outcome, Outcome):  # a message can put any other value there
            meta[KEY] = as_data(outcome)
        return meta


def __getattr__(name: str) -> type:
    """Return the subclass of the backend that has this name in Celery."""
    if name.startswith("__"):
        raise AttributeError(name)
    made = type(name, (_StoresOutcomes, by_name(name.replace("/", ":"))), {"__module__": __name__})
    globals()[name] = made
    return made
