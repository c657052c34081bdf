"""How arguments, results and exceptions cross: by the serializers of the application itself."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from billiard.einfo import RemoteTraceback
from celery.exceptions import Ignore, Reject, Retry
from celery.result import ResultBase, result_from_tuple
from kombu import serialization as _serialization
from kombu.utils.encoding import safe_repr as _safe_repr

from rcon_celery.wire import Body
from rcon_plugins.executors.channel import ProtocolViolation

serialization: Any = _serialization  # its functions have no types
safe_repr: Any = _safe_repr

#: Attributes of a task's request that are sent otherwise, or belong to one process.
_NOT_SENT = frozenset({"args", "kwargs", "called_directly", "rcon_hand_over", "rcon_may_run"})


def accepted(app: Any) -> set[str]:
    """The content types that the application reads, from its broker or its result backend."""
    names = {*app.conf.accept_content, *(app.conf.result_accept_content or ())}
    return set(serialization.prepare_accept_content(names))


def encode(value: object, serializers: Iterable[str | None]) -> tuple[Body, bytes]:
    """The value by the first of these serializers that can. Raises the last one's exception."""
    error: Exception | None = None
    for name in dict.fromkeys(serializers):
        try:
            content_type, encoding, data = serialization.dumps(value, serializer=name)
        except Exception as failed:  # noqa: BLE001 - serializers are the application's own, and raise what they like
            error = failed
            continue
        payload = (
            data.encode(encoding if encoding != "binary" else "utf-8") if isinstance(data, str) else data
        )
        return Body(content_type, encoding, len(payload)), payload
    raise error or TypeError("no serializer")


def decode(body: Body, payload: bytes, accept: set[str]) -> Any:
    """What was encoded. Raises `ProtocolViolation` for what the application does not accept."""
    try:
        return serialization.loads(
            payload, body.content_type, body.content_encoding, accept=accept, force=True
        )
    except Exception as error:  # noqa: BLE001 - a serializer may raise anything on what is not its own
        raise ProtocolViolation(f"a body that cannot be read: {type(error).__name__}: {error}") from None


def encode_task(task: Any, request: Any, args: Any, kwargs: Any) -> tuple[Body, bytes]:
    """A task's arguments and its request, without what only has a meaning in the host."""
    context = {
        name: value for name, value in vars(request).items() if name[0] != "_" and name not in _NOT_SENT
    }
    serializers = _of_arguments(task)
    try:
        return encode({"args": args, "kwargs": kwargs, "request": context}, serializers)
    except Exception:  # noqa: BLE001 - as in encode
        plain = {name: value for name, value in context.items() if _is_data(value, serializers)}
        return encode({"args": args, "kwargs": kwargs, "request": plain}, serializers)


def encode_result(task: Any, result: object, children: Iterable[Any]) -> tuple[Body, bytes]:
    """A task's result, and what it sent off. Runs in the executor. Raises what serializers raise."""
    payload: dict[str, Any] = {"children": [child.as_tuple() for child in children]}
    if isinstance(result, ResultBase):
        payload["tuple"] = result.as_tuple()
    else:
        payload["value"] = result
    return encode(payload, _of_results(task))


def encode_exception(task: Any, error: BaseException, children: Iterable[Any]) -> tuple[Body, bytes]:
    """An exception as its task's result backend would store it. Runs in the executor."""
    payload = {"error": _prepared(task, error), "children": [child.as_tuple() for child in children]}
    return encode(payload, (task.backend.serializer,))


def encode_predicate(task: Any, error: Exception, children: Iterable[Any]) -> tuple[Body, bytes]:
    """A `Retry`, `Ignore` or `Reject`. Runs in the executor."""
    payload: dict[str, Any] = {"children": [child.as_tuple() for child in children]}
    serializers = _of_results(task)
    if isinstance(error, Retry):
        payload |= {
            "message": _data(error.message, serializers),
            "error": _prepared(task, error.exc) if error.exc is not None else None,
            "text": error.excs,
            "when": _data(error.when, serializers),
            "sig": error.sig if _is_data(error.sig, serializers) else None,
        }
    elif isinstance(error, Reject):
        payload |= {"reason": _data(error.reason, serializers), "requeue": bool(error.requeue)}
    else:
        payload["args"] = [_data(value, serializers) for value in error.args]
    return encode(payload, serializers)


def value_of(app: Any, payload: dict[str, Any]) -> Any:
    """A result, as `encode_result` made it."""
    if "tuple" in payload:
        return result_from_tuple(payload["tuple"], app=app)
    return payload["value"]


def exception_of(task: Any, payload: dict[str, Any], text: str) -> Exception:
    """An exception, as `encode_exception` made it: of its own class where this process has that loaded."""
    error = task.backend.exception_to_python(payload["error"])
    if not isinstance(error, Exception):
        raise ProtocolViolation(f"an exception of {type(error).__name__}")
    error.__cause__ = RemoteTraceback(f"\n{text}")
    return error


def predicate_of(task: Any, how: str, payload: dict[str, Any]) -> Exception:
    """A `Retry`, `Ignore` or `Reject`, as `encode_predicate` made it."""
    error: Exception
    if how == "retry":
        cause = payload["error"]
        error = Retry(
            payload["message"],
            exc=task.backend.exception_to_python(cause) if cause is not None else payload["text"],
            when=payload["when"],
            sig=task.app.signature(payload["sig"]) if payload["sig"] is not None else None,
        )
    elif how == "reject":
        error = Reject(payload["reason"], requeue=payload["requeue"])
    else:
        error = Ignore(*payload["args"])
    return error


def _of_arguments(task: Any) -> list[str]:
    # What was pickled holds what only pickle can carry; to the executor it goes as it came.
    own = task.serializer or task.app.conf.task_serializer
    return ["pickle"] if "application/x-python-serialize" in accepted(task.app) else [own]


def _of_results(task: Any) -> list[str]:
    own = task.serializer or task.app.conf.task_serializer
    return [task.backend.serializer, own]


def _prepared(task: Any, error: BaseException) -> Any:
    return task.backend.prepare_exception(error)


def _is_data(value: object, serializers: Iterable[str]) -> bool:
    try:
        encode(value, serializers)
    except Exception:  # noqa: BLE001 - as in encode
        return False
    return True


def _data(value: object, serializers: Iterable[str]) -> Any:
    return value if _is_data(value, serializers) else safe_repr(value)
