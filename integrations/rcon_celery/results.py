"""What a task used, where its result is: in the metadata that the result backend keeps, and in an event.

The metadata gets a key ``rcon``, by a subclass of the application's own result backend. `outcome_of` reads it.
Events of the type ``rcon-task`` are sent where the worker sends events (``celery worker -E``).
"""

from __future__ import annotations

import logging
from typing import Any, Final

import msgspec
from celery.app.backends import by_name, by_url

from rcon_plugins.outcome import Outcome
from rcon_plugins.usage import Usage

_log = logging.getLogger("rcon")

#: The key in a result's metadata, and the attribute of a request that it is made from.
KEY: Final = "rcon"
ATTRIBUTE: Final = "rcon_outcome"
EVENT: Final = "rcon-task"
_FACTS: Final = tuple(name for name in Outcome.__struct_fields__ if name not in ("detail", "usage"))


def outcome_of(result: Any) -> Outcome | None:
    """How a task ended and what it used, by its `AsyncResult`; None where it was not confined, or is not over.

    ``outcome_of(result).usage.memory_peak`` are bytes. Of a task that was tried again it is the last try's. The
    metadata leaves out the sentence for people, ``detail``, which is the exception's.
    """
    # What the backend `rpc` has received once is in the result, and nowhere else.
    facts = result._get_task_meta().get(KEY)  # noqa: SLF001 - nothing public gives all of the metadata
    return msgspec.convert(facts, Outcome) if facts is not None else None


def facts(outcome: Outcome) -> dict[str, Any]:
    """An outcome as plain data, without what is not known."""
    known: dict[str, Any] = {
        name: value for name in _FACTS if (value := getattr(outcome, name)) not in (None, "")
    }
    known["usage"] = {
        name: value for name in Usage.__struct_fields__ if (value := getattr(outcome.usage, name)) is not None
    }
    return known


def note(task: Any, outcome: Outcome, *, events: bool) -> None:
    """Have the outcome of a task stored with its result, and told by an event."""
    setattr(task.request, ATTRIBUTE, outcome)
    if not events:
        return
    known = facts(outcome)
    try:
        task.send_event(EVENT, name=task.name, **known.pop("usage"), **known)
    except Exception as error:  # noqa: BLE001 - of any transport; the task ended as it did, whoever hears of it
        _log.warning("rcon: %s[%s]: its event cannot be sent: %s", task.name, task.request.id, error)


def add_to_backend(app: Any) -> None:
    """Have the application's result backend keep what tasks used. Its configuration is read already.

    A backend is named by a URL or an alias, before which Celery takes the class that is to serve it.
    """
    written = app.backend_cls or app.conf.result_backend
    if not isinstance(written, str) or written.startswith((f"{__name__}:", "disabled")):
        return
    name, separator, url = _name_and_url(written)
    app.backend_cls = f"{__name__}:{name.replace(':', '/')}{separator}{url}"


def _name_and_url(written: str) -> tuple[str, str, str]:
    # As celery.app.backends.by_url does it.
    scheme, has_url, _ = written.partition("://")
    if not has_url:
        return written, "", ""
    if "+" in scheme:
        name, _, url = written.partition("+")
        return name, "+", url
    return scheme, "+", written


def serializer_of(app: Any) -> str | None:
    """The serializer of the application's result backend; None where there can be no backend.

    Of one that is made and thrown away: forks of this process are to make their own.
    """
    try:
        cls, url = by_url(app.backend_cls or app.conf.result_backend, app.loader)
        return str(cls(app=app, url=url).serializer)
    except Exception:  # noqa: BLE001 - a backend may raise anything; who needs one will be told
        return None


class _Keeping:
    """What is added to a class of result backends."""

    def _get_result_meta(self, result: Any, state: str, traceback: Any, request: Any, **options: Any) -> Any:
        meta: dict[str, Any] = super()._get_result_meta(  # type: ignore[misc]
            result=result, state=state, traceback=traceback, request=request, **options
        )
        outcome = getattr(request, ATTRIBUTE, None)
        if isinstance(outcome, Outcome):  # a message can put anything under any name there
            meta[KEY] = facts(outcome)
        return meta


def __getattr__(name: str) -> type:
    """The subclass for a backend of this name, as Celery knows it."""
    if name.startswith("__"):
        raise AttributeError(name)
    made = type(name, (_Keeping, by_name(name.replace("/", ":"))), {"__module__": __name__})
    globals()[name] = made
    return made
