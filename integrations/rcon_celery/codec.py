"""How arguments, results and exceptions cross: by the serializers of the application itself."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Sequence
from typing import Any, TypeGuard

import celery.exceptions
from billiard.einfo import RemoteTraceback
from celery.app.task import get_actual_ignore_result
from celery.backends.base import DisabledBackend
from celery.exceptions import Ignore, Reject, Retry
from celery.result import ResultBase, result_from_tuple
from celery.utils.serialization import UnpickleableExceptionWrapper, create_exception_cls
from kombu import serialization as _serialization
from kombu.utils.encoding import safe_repr as _safe_repr

from rcon_celery.task_annotations import STAGE
from rcon_celery.wire import Body
from rcon_plugins.executors.channel import ProtocolViolation

serialization: Any = _serialization  # its functions have no types
safe_repr: Any = _safe_repr

#: Attributes of a task's request that are sent otherwise, or belong to one process.
_NOT_SENT = frozenset({"args", "kwargs", "called_directly", STAGE})


def accepted(app: Any) -> set[str]:
    """The content types that the application reads, from its broker or its result backend.

    To be asked once in a process: it takes longer than to encode what is usual.
    """
    names = {*app.conf.accept_content, *(app.conf.result_accept_content or ())}
    return set(serialization.prepare_accept_content(names))


def encode(value: object, serializers: Iterable[str | None]) -> tuple[Body, bytes]:
    """The value by the first of these serializers that can. Raises the last one's exception."""
    error: Exception | None = None
    for name in dict.fromkeys(serializers):
        try:
            content_type, encoding, data = serialization.dumps(value, serializer=name)
            payload = data if not isinstance(data, str) else data.encode(_charset(encoding))
        except Exception as failed:  # noqa: BLE001 - serializers are the application's own, and raise what they like
            error = failed
            continue
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


def encode_task(task: Any, request: Any, args: Any, kwargs: Any, accept: set[str]) -> tuple[Body, bytes]:
    """A task's arguments and its request, without what only has a meaning in the host. ``accept``: `accepted`."""
    context = {
        name: value for name, value in vars(request).items() if name[0] != "_" and name not in _NOT_SENT
    }
    serializers = _of_arguments(task, accept)
    try:
        return encode({"args": args, "kwargs": kwargs, "request": context}, serializers)
    except Exception:  # noqa: BLE001 - as in encode
        plain = {name: value for name, value in context.items() if _is_data(value, serializers)}
        return encode({"args": args, "kwargs": kwargs, "request": plain}, serializers)


def encode_result(task: Any, result: object, children: Iterable[Any], serializer: str) -> tuple[Body, bytes]:
    """A task's result, and what it sent off. Runs in the executor. Raises what serializers raise.

    ``serializer``, here and below, is that of its result backend.
    """
    payload: dict[str, Any] = {"children": [child.as_tuple() for child in children]}
    if isinstance(result, ResultBase):
        payload["tuple"] = result.as_tuple()
    else:
        payload["value"] = result
    return encode(payload, _of_results(task, serializer))


def encode_exception(error: BaseException, children: Iterable[Any], serializer: str) -> tuple[Body, bytes]:
    """An exception, as far as the serializer of the result backend carries it. Runs in the executor."""
    payload = {"error": _told(error, serializer), "children": [child.as_tuple() for child in children]}
    return encode(payload, (serializer,))


def encode_predicate(
    task: Any, error: Exception, children: Iterable[Any], serializer: str
) -> tuple[Body, bytes]:
    """A `Retry`, `Ignore` or `Reject`. Runs in the executor."""
    payload: dict[str, Any] = {"children": [child.as_tuple() for child in children]}
    serializers = _of_results(task, serializer)
    if isinstance(error, Retry):
        payload |= {
            "message": _data(error.message, serializers),
            "error": _told(error.exc, serializer) if error.exc is not None else None,
            "text": error.excs,
            "when": _data(error.when, serializers),
            "sig": error.sig if _is_data(error.sig, serializers) else None,
        }
    elif isinstance(error, Reject):
        payload |= {"reason": _data(error.reason, serializers), "requeue": bool(error.requeue)}
    else:
        payload["args"] = [_data(value, serializers) for value in error.args]
    return encode(payload, serializers)


def is_ignored(task: Any, request: Any) -> bool:
    """Whether nobody is to get the result, so that it need not be data, nor short."""
    return bool(get_actual_ignore_result(task, request)) or isinstance(task.backend, DisabledBackend)


def encode_nothing(task: Any, serializer: str) -> tuple[Body, bytes]:
    """In the place of an answer that is too long. Runs in the executor."""
    return encode({"children": []}, _of_results(task, serializer))


def value_of(app: Any, payload: dict[str, Any]) -> Any:
    """A result, as `encode_result` made it."""
    if "tuple" in payload:
        return result_from_tuple(payload["tuple"], app=app)
    return payload["value"]


def exception_of(told: dict[str, Any], text: str) -> Exception:
    """An exception, as `encode_exception` made it: of its own class where this process has that loaded.

    The same rule as that of Celery for what a result backend holds: nothing is imported because an executor process
    named it, and a class that is not found is made. Raises `ProtocolViolation`.
    """
    error = _made_again(told)
    if text:
        error.__cause__ = RemoteTraceback(f"\n{text}")
    return error


def _made_again(told: dict[str, Any]) -> Exception:
    cls = _class(told["module"], told["type"])
    args = tuple(_argument_of(each) for each in told["args"])
    made_of = tuple(_argument_of(each) for each in told["made_of"])
    if issubclass(cls, UnpickleableExceptionWrapper):
        # Stands for an exception of a module that it names.
        args = made_of = (
            *(name if name in sys.modules else celery.exceptions.__name__ for name in args[:1]),
            *args[1:],
        )
    error = _constructed(cls, made_of, args)
    if error is None:
        named = f"{cls.__name__}({', '.join(map(safe_repr, args))})"
        stands_for_it: Exception = UnpickleableExceptionWrapper(cls.__module__, cls.__name__, args, named)
        return stands_for_it
    error.args = args
    vars(error).update(
        {name: value for name, value in told["state"].items() if not callable(getattr(cls, name, None))}
    )
    return error


def _constructed(cls: type[Exception], made_of: tuple[Any, ...], args: tuple[Any, ...]) -> Exception | None:
    """An exception of this class; None where it takes more than is known of it to make one."""
    with contextlib.suppress(Exception):
        return cls(*made_of)
    with contextlib.suppress(Exception):
        return cls.__new__(cls, *args)
    return None


def _argument_of(told: list[Any]) -> Any:
    is_exception, value = told
    if is_exception and isinstance(value, list):
        return [_made_again(each) for each in value]
    return _made_again(value) if is_exception else value


def _class(module: str | None, name: str) -> type[Exception]:
    found: Any = sys.modules.get(module) if module is not None else None
    for part in name.split("."):
        found = getattr(found, part, None)
    if found is None:
        return _stand_in(name)
    if not isinstance(found, type) or not issubclass(found, BaseException):
        raise ProtocolViolation(f"{module}.{name} is not an exception")
    if not issubclass(found, Exception):
        return _stand_in(name)
    return found


def _stand_in(name: str) -> type[Exception]:
    # Of a module that is loaded: to pickle it, as Celery tries, would import any other.
    return create_exception_cls(name, celery.exceptions.__name__)  # type: ignore[no-any-return]


def predicate_of(task: Any, how: str, payload: dict[str, Any]) -> Exception:
    """A `Retry`, `Ignore` or `Reject`, as `encode_predicate` made it."""
    error: Exception
    if how == "retry":
        cause = payload["error"]
        error = Retry(
            payload["message"],
            exc=exception_of(cause, "") if cause is not None else payload["text"],
            when=payload["when"],
            sig=task.app.signature(payload["sig"]) if payload["sig"] is not None else None,
        )
    elif how == "reject":
        error = Reject(payload["reason"], requeue=payload["requeue"])
    else:
        error = Ignore(*payload["args"])
    return error


def sentence(error: BaseException) -> str:
    """An exception in words, whatever it makes of that itself: its class may be anybody's."""
    try:
        return f"{type(error).__name__}: {error}"
    except Exception:  # noqa: BLE001 - its own ``__str__``
        return f"{type(error).__name__}: {safe_repr(error.args)}"


def _of_arguments(task: Any, accept: set[str]) -> list[str]:
    own = task.serializer or task.app.conf.task_serializer
    if len(accept) == 1:
        return [own]
    # A message may have come by another than the task's own, and hold what only that carries. Pickle carries all; it is
    # the host that pickles here, what it has decoded already.
    return ["pickle", own]


def _of_results(task: Any, serializer: str) -> list[str]:
    return [serializer, task.serializer or task.app.conf.task_serializer]


def _told(error: BaseException, serializer: str) -> dict[str, Any]:
    cls, serializers = type(error), (serializer,)
    try:
        reduced = error.__reduce__()
    except Exception:  # noqa: BLE001 - one of its own
        reduced = ""
    # An OSError is made of more than its args.
    made_of = reduced[1] if isinstance(reduced, tuple) and reduced[0] is cls else error.args
    state = {name: value for name, value in vars(error).items() if name[:2] != "__" and name != "args"}
    return {
        "module": cls.__module__,
        "type": cls.__qualname__,
        "args": [_argument(value, serializer) for value in error.args],
        "made_of": [_argument(value, serializer) for value in made_of],
        "state": {name: value for name, value in state.items() if _is_data(value, serializers)},
    }


def _argument(value: object, serializer: str) -> list[Any]:
    serializers = (serializer,)
    if isinstance(value, Exception) and not _is_data(value, serializers):
        return [True, _told(value, serializer)]
    if _are_exceptions(value) and not _is_data(value, serializers):  # of an ExceptionGroup
        return [True, [_told(each, serializer) for each in value]]
    return [False, _data(value, serializers)]


def _are_exceptions(value: object) -> TypeGuard[Sequence[BaseException]]:
    return (
        isinstance(value, list | tuple)
        and bool(value)
        and all(isinstance(each, BaseException) for each in value)
    )


def _is_data(value: object, serializers: Iterable[str]) -> bool:
    try:
        encode(value, serializers)
    except Exception:  # noqa: BLE001 - as in encode
        return False
    return True


def _charset(encoding: str) -> str:
    return encoding if encoding != "binary" else "utf-8"


def _data(value: object, serializers: Iterable[str]) -> Any:
    return value if _is_data(value, serializers) else safe_repr(value)
