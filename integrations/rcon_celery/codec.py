"""Encode arguments, results and exceptions for an executor process and back, with the application's serializers."""

from __future__ import annotations

import contextlib
import re
import sys
import types
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, TypeGuard

import celery.exceptions
from billiard.einfo import RemoteTraceback
from celery.app.task import get_actual_ignore_result
from celery.canvas import Signature
from celery.exceptions import Ignore, Reject, Retry
from celery.result import ResultBase, result_from_tuple
from celery.utils.serialization import UnpickleableExceptionWrapper, create_exception_cls
from kombu import serialization as _serialization
from kombu.utils.encoding import safe_repr as _safe_repr

from rcon_celery import decoding_cost
from rcon_celery.handlers import PROGRESS
from rcon_celery.task_annotations import STAGE
from rcon_celery.wire import MAX_ERROR, MAX_ERROR_LINES, How, Payload
from rcon_plugins.executors.channel import ProtocolViolation
from rcon_plugins.executors.output import escape_unprintable

serialization: Any = _serialization  # its functions have no types
safe_repr: Any = _safe_repr

#: The most of a decoder's complaint that is shown, characters: it may quote what it could not decode.
_MAX_REASON: Final = 500
#: The most results of other tasks in an answer. Making one takes some 15 microseconds.
MAX_CHILDREN: Final = 5000
#: The most exceptions in an answer: those of a group count twice. Making one takes up to 30 microseconds.
MAX_EXCEPTIONS: Final = 2000
#: The most characters that a SyntaxError in an answer may underline beyond its text. A traceback shows each of them.
_MAX_UNDERLINED: Final = 10_000
#: The characters that end a line.
_LINE_ENDS: Final = "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"
#: The longest names of an exception's module and class, characters.
_MAX_NAME: Final = 1000

#: A field of a format, printf-style or of str.format, that is wide, or as wide as another argument says. Some classes
#: of exceptions use an argument as a format, as dateutil's ParserError does.
_WIDE_FIELD: Final = re.compile(
    r"%(?:\([^()]*\))?[-+ #0]*(?:\*|[0-9]{5,}|[0-9]*\.(?:\*|[0-9]{5,}))[.0-9*]*[hlL]?[diouxXeEfFgGcrsa]"
    r"|\{[\w.]*(?:\[[^\[\]{}]*\][\w.]*)*(?:![rsa])?:[^{}]{0,4}(?:\{|[0-9]{5,}|[0-9]*\.[0-9]{5,})"
)
#: A part of each of them, which is found faster.
_WIDE: Final = re.compile(r"[0-9]{5}|\*|:[^{}]{0,4}\{")

#: Attributes of a task's request that are sent in another way, or that belong to one process.
_NOT_SENT = frozenset({"args", "kwargs", "called_directly", STAGE, PROGRESS})


def accepted_encodings(app: Any) -> dict[str, str]:
    """Return the content types that the application reads from its broker or its result backend, with their encodings.

    The encoding of a content type is the one that its serializer writes. Call this once in a process, because it takes
    longer than encoding a typical task.
    """
    names = {*app.conf.accept_content, *(app.conf.result_accept_content or ())}
    accepted = set(serialization.prepare_accept_content(names))
    encoders = serialization.registry._encoders.values()  # noqa: SLF001 - no public function returns the encodings
    return {each.content_type: each.content_encoding for each in encoders if each.content_type in accepted}


def why_unbounded(accepted: Iterable[str]) -> list[str]:
    """Return a sentence for each of the content types whose decoder may cost this process any amount."""
    found = []
    for content_type in sorted(accepted):
        decoder = serialization.registry._decoders.get(content_type)  # noqa: SLF001 - as above
        name = serialization.registry.type_to_name.get(content_type, content_type)
        if content_type == decoding_cost.PICKLE:
            found.append(
                f"{name} in accept_content lets the tasks of every policy run code outside of their limits"
            )
        elif not decoding_cost.is_known(content_type) or not str(decoder.__module__).startswith("kombu."):
            found.append(f"what it costs to decode a result of {name} has no other bound than max_result")
    return found


def encode(value: object, serializers: Iterable[str | None]) -> tuple[Payload, bytes]:
    """Encode the value with the first of these serializers that can. Raises the exception of the last one."""
    error: Exception | None = None
    for name in dict.fromkeys(serializers):
        try:
            content_type, encoding, data = serialization.dumps(value, serializer=name)
            if isinstance(data, str):
                data = data.encode(encoding if encoding != "binary" else "utf-8")
        except Exception as failed:  # noqa: BLE001 - an application's serializer may raise anything
            error = failed
            continue
        return Payload(content_type, encoding, len(data)), data
    raise error or TypeError("no serializer")


def decode(payload: Payload, data: bytearray, accepted: Mapping[str, str]) -> Any:
    """Decode what an executor process sent, and clear the data. ``accepted``: the `accepted_encodings`.

    Raises `ProtocolViolation` if the application does not accept it, if it is malformed, or if decoding it would cost
    too much.
    """
    content_type, encoding = payload.content_type, payload.content_encoding
    if accepted.get(content_type) != encoding or content_type not in accepted:
        raise ProtocolViolation(
            f"a payload of type {content_type[:80]!r} and encoding {encoding[:80]!r}, which the application does not "
            "accept"
        )
    try:
        decoding_cost.check(content_type, data)
        # The decoder of JSON reads text. Do not keep the same data twice while it runs.
        content = data.decode() if content_type == decoding_cost.JSON else bytes(data)
        data.clear()
        value = decode_trusted(payload, content)
        decoding_cost.check_decoded(content_type, value)
    except Exception as error:  # noqa: BLE001 - a serializer may raise anything on malformed data
        text = f"{type(error).__name__}: {error}"[:_MAX_REASON]
        raise ProtocolViolation(f"a payload cannot be decoded: {text}") from None
    return value


def decode_trusted(payload: Payload, data: bytes | str) -> Any:
    """Decode what the pool's process sent. Runs in the executor. Raises what serializers raise."""
    types = {payload.content_type}
    return serialization.loads(data, payload.content_type, payload.content_encoding, accept=types, force=True)


def why_refused(how: How, payload: Payload, data: bytes, max_result: int) -> tuple[How, str] | None:
    """Return how to answer instead, and why, if the pool's process will not decode this; None if it will.

    Runs in the executor.
    """
    if len(data) > max_result:
        return "too long", str(len(data))
    if how != "ok" and len(data) > MAX_ERROR:
        return "too costly", f"its exception has {len(data)} bytes, and the most is {MAX_ERROR}"
    try:
        decoding_cost.check(payload.content_type, data)
    except decoding_cost.TooCostly as error:
        return "too costly", str(error)
    return None


def encode_task(
    task: Any,
    request: Any,
    args: Any,
    kwargs: Any,
    accepted: Mapping[str, str],
    contexts: Mapping[str, Mapping[str, Any]],
) -> tuple[Payload, bytes]:
    """Encode a task's arguments and its request, without the attributes that have a meaning only in this process.

    ``accepted``: the `accepted_encodings`. ``contexts``: those of `rcon_celery.contexts`.
    """
    context = {}
    for name, value in vars(request).items():
        if name[0] != "_" and name not in _NOT_SENT:
            context[name] = value
    own = task.serializer or task.app.conf.task_serializer
    # A message may use another serializer than the task's own, and hold a value that only that one can encode. Pickle
    # can encode all such values. It pickles here only values that this process has decoded.
    serializers = (own,) if len(accepted) == 1 else ("pickle", own)
    try:
        content = {"args": args, "kwargs": kwargs, "request": context, "contexts": contexts}
        return encode(content, serializers)
    except Exception:  # noqa: BLE001 - as in encode
        plain = {name: value for name, value in context.items() if _can_encode(value, serializers)}
        return encode({**content, "request": plain}, serializers)


def encode_result(
    task: Any, result: object, children: Iterable[Any], serializer: str
) -> tuple[Payload, bytes]:
    """Encode a task's result and the tasks that it sent. Runs in the executor. Raises what serializers raise.

    Here and below, ``serializer`` is that of the result backend.
    """
    content: dict[str, Any] = {"children": [child.as_tuple() for child in children]}
    if isinstance(result, ResultBase):
        content["tuple"] = result.as_tuple()
    else:
        content["value"] = result
    _check_results(content)
    return encode(content, _result_serializers(task, serializer))


def encode_exception(error: BaseException, children: Iterable[Any], serializer: str) -> tuple[Payload, bytes]:
    """Encode an exception as far as the serializer of the result backend can. Runs in the executor."""
    content = {"error": _described(error, serializer), "children": [child.as_tuple() for child in children]}
    _check_results(content)
    _check_exceptions(content["error"])
    return encode(content, (serializer,))


def encode_predicate(
    task: Any, error: Exception, children: Iterable[Any], serializer: str
) -> tuple[Payload, bytes]:
    """Encode a `Retry`, `Ignore` or `Reject`. Runs in the executor."""
    content: dict[str, Any] = {"children": [child.as_tuple() for child in children]}
    serializers = _result_serializers(task, serializer)
    if isinstance(error, Retry):
        content |= {
            "message": error.message if isinstance(error.message, str | None) else safe_repr(error.message),
            "error": _described(error.exc, serializer) if error.exc is not None else None,
            "text": error.excs,
            "when": _data_or_repr(error.when, serializers),
            "sig": error.sig if _can_encode(error.sig, serializers) else None,
        }
    elif isinstance(error, Reject):
        content |= {"reason": _data_or_repr(error.reason, serializers), "requeue": bool(error.requeue)}
    else:
        content["args"] = [_data_or_repr(value, serializers) for value in error.args]
    _check_results(content)
    if content.get("error") is not None:
        _check_exceptions(content["error"])
    payload, data = encode(content, serializers)
    if len(data) > MAX_ERROR and content.get("sig") is not None:
        # The message is sent already. Only handlers of the signal ``task_retry`` could look at its signature.
        payload, data = encode({**content, "sig": None}, serializers)
    return payload, data


def encode_no_result(task: Any, serializer: str) -> tuple[Payload, bytes]:
    """Encode an answer without a result, for one that is too large or costs too much. Runs in the executor."""
    return encode({"children": []}, _result_serializers(task, serializer))


def is_ignored(task: Any, request: Any, *, is_disabled: bool) -> bool:
    """Return whether the result is dropped. Then it may be too large, and no serializer need be able to encode it.

    ``is_disabled``: the task's result backend drops all results.
    """
    return bool(get_actual_ignore_result(task, request)) or is_disabled


def decode_children(app: Any, content: dict[str, Any]) -> list[Any]:
    """Return the results of the tasks that a task sent. Raises `TooCostly` for too many, here and in the result."""
    _check_results(content)
    return [result_from_tuple(child, app=app) for child in content["children"]]


def decode_value(app: Any, content: dict[str, Any]) -> Any:
    """Return the result that `encode_result` encoded. Call `decode_children` first."""
    if "tuple" in content:
        return result_from_tuple(content["tuple"], app=app)
    return content["value"]


def decode_exception(described: dict[str, Any], traceback_text: str) -> Exception:
    """Return the exception that `encode_exception` encoded, with its own class if this process has loaded that.

    Celery has the same rule for exceptions in a result backend. An executor process cannot make this process import a
    module: an exception whose class is not loaded gets a stand-in class. Raises `ProtocolViolation`, `TooCostly`.
    """
    _check_exceptions(described)
    error = _rebuilt(described)
    if traceback_text:
        error.__cause__ = RemoteTraceback(f"\n{traceback_text}")
    return error


def decode_predicate(task: Any, how: str, content: dict[str, Any]) -> Exception:
    """Return the `Retry`, `Ignore` or `Reject` that `encode_predicate` encoded."""
    error: Exception
    if how == "retry":
        cause, message, text = content["error"], content["message"], content["text"]
        # Celery makes text of all three, and stores the exception.
        if not (isinstance(message, str | None) and isinstance(text, str | None)):
            raise ProtocolViolation("a retry whose message or exception is not text")
        error = Retry(
            message,
            exc=decode_exception(cause, "") if cause is not None else text,
            when=content["when"],
            # A plain one. To make one of a chain or a chord, Celery copies all of it for each of its tasks.
            sig=Signature(dict(content["sig"]), app=task.app) if content["sig"] is not None else None,
        )
    elif how == "reject":
        error = Reject(content["reason"], requeue=content["requeue"])
    else:
        error = Ignore(*content["args"])
    return error


def sentence(error: BaseException) -> str:
    """Return the class and message of an exception, even if its ``__str__`` fails."""
    try:
        return f"{type(error).__name__}: {error}"
    except Exception:  # noqa: BLE001 - its own ``__str__``
        return f"{type(error).__name__}: {safe_repr(error.args)}"


def _result_serializers(task: Any, serializer: str) -> tuple[str, str]:
    return serializer, task.serializer or task.app.conf.task_serializer


def _described(error: BaseException, serializer: str) -> dict[str, Any]:
    """Return an exception as data: its class, arguments and attributes, as far as the serializer can encode them."""
    cls, serializers = type(error), (serializer,)
    try:
        reduced = error.__reduce__()
    except Exception:  # noqa: BLE001 - one of its own
        reduced = ""
    # The constructor of an OSError takes more arguments than its `args` hold.
    constructor_args = reduced[1] if isinstance(reduced, tuple) and reduced[0] is cls else error.args
    state = {name: value for name, value in vars(error).items() if name[:2] != "__" and name != "args"}
    return {
        "module": cls.__module__,
        "type": cls.__qualname__,
        "args": [_described_argument(value, serializer) for value in error.args],
        "constructor_args": [_described_argument(value, serializer) for value in constructor_args],
        "state": {name: value for name, value in state.items() if _can_encode(value, serializers)},
    }


def _described_argument(value: object, serializer: str) -> list[Any]:
    """Return whether the argument of an exception is an exception itself, or a list of them, and the argument."""
    serializers = (serializer,)
    if isinstance(value, Exception) and not _can_encode(value, serializers):
        return [True, _described(value, serializer)]
    if _are_exceptions(value) and not _can_encode(value, serializers):  # of an ExceptionGroup
        return [True, [_described(each, serializer) for each in value]]
    return [False, _data_or_repr(value, serializers)]


def _rebuilt(described: dict[str, Any]) -> Exception:
    cls = _exception_class(described["module"], described["type"])
    args = tuple(_rebuilt_argument(each) for each in described["args"])
    constructor_args = tuple(_rebuilt_argument(each) for each in described["constructor_args"])
    if issubclass(cls, UnpickleableExceptionWrapper):
        # It stands for an exception from the module that its first argument names.
        args = constructor_args = (
            *(name if name in sys.modules else celery.exceptions.__name__ for name in args[:1]),
            *(escape_unprintable(name) if isinstance(name, str) else name for name in args[1:2]),
            *args[2:],
        )
    error = None
    if not (_makes_own_text(cls) and _has_wide_field([*args, *constructor_args])):
        error = _constructed(cls, constructor_args, args)
    if error is None:
        text = f"{cls.__name__}({', '.join(map(safe_repr, args))})"
        wrapper: Exception = UnpickleableExceptionWrapper(cls.__module__, cls.__name__, args, text)
        return wrapper
    error.args = args
    for name, value in described["state"].items():
        # `_described` sends no special attribute. A traceback would take notes apart, line by line.
        if name[:2] != "__" and not callable(getattr(cls, name, None)):
            vars(error)[name] = value
    _check_underlined(error)
    return error


def _makes_own_text(cls: type[Exception]) -> bool:
    """Return whether Python code of the class makes its text, and so may use an argument as a format."""
    made = (cls.__new__, cls.__init__, cls.__str__, cls.__repr__)
    return any(isinstance(method, types.FunctionType) for method in made)


def _has_wide_field(values: Iterable[Any]) -> bool:
    """Return whether one of the texts in data is a format that makes a far longer text."""
    waiting = list(values)
    while waiting:
        value = waiting.pop()
        if isinstance(value, str):
            if _WIDE.search(value) and _WIDE_FIELD.search(value):
                return True
        elif isinstance(value, dict):
            waiting += [*value, *value.values()]
        elif isinstance(value, list | tuple):
            waiting += value
    return False


def _check_underlined(error: BaseException) -> None:
    """Refuse a SyntaxError whose traceback would be far longer than the exception, or cannot be made at all.

    Raises `TooCostly`, `ProtocolViolation`.
    """
    if not isinstance(error, SyntaxError):
        return
    start, end, text = error.offset, error.end_offset, error.text
    if not (isinstance(start, int | None) and isinstance(end, int | None) and isinstance(text, str | None)):
        raise ProtocolViolation("a SyntaxError whose place in the text is none")
    if (end or 0) - (start or 0) > max(_MAX_UNDERLINED, len(text or "")):
        raise decoding_cost.TooCostly(f"a SyntaxError that underlines more than {_MAX_UNDERLINED} characters")


def _constructed(
    cls: type[Exception], constructor_args: tuple[Any, ...], args: tuple[Any, ...]
) -> Exception | None:
    """Return an exception of this class; None if its constructor takes other arguments."""
    with contextlib.suppress(Exception):
        return cls(*constructor_args)
    with contextlib.suppress(Exception):
        return cls.__new__(cls, *args)
    return None


def _rebuilt_argument(described: list[Any]) -> Any:
    is_exception, value = described
    if is_exception and isinstance(value, list):
        return [_rebuilt(each) for each in value]
    return _rebuilt(value) if is_exception else value


def _exception_class(module: str | None, name: str) -> type[Exception]:
    """Return the class of this name. Run no code to look it up: some modules import others for an attribute."""
    if len(name) > _MAX_NAME:
        raise ProtocolViolation(f"a class with a name of {len(name)} characters")
    found: Any = sys.modules.get(module) if module is not None else None
    for part in name.split("."):
        found = vars(found).get(part) if isinstance(found, type | types.ModuleType) else None
    if found is None:
        return _stand_in(name)
    if not isinstance(found, type) or not issubclass(found, BaseException):
        raise ProtocolViolation(f"{module}.{name} is not an exception")
    if not issubclass(found, Exception):
        return _stand_in(name)
    return found


def _stand_in(name: str) -> type[Exception]:
    # The worker's log has its name, which the task chose.
    name = escape_unprintable(name)
    # Name a module that is loaded: Celery tries to pickle the exception, which would import any other module.
    return create_exception_cls(name, celery.exceptions.__name__)  # type: ignore[no-any-return]


def _check_results(content: Mapping[str, Any]) -> None:
    """Raise `TooCostly` for too many results of other tasks, `ProtocolViolation` for what is not a result."""
    waiting, count = [*content["children"]], 0
    if "tuple" in content:
        waiting.append(content["tuple"])
    while waiting:
        first, nodes = _pair(waiting.pop())
        count += 1
        parent = None
        if isinstance(first, list | tuple):
            first, parent = _pair(first)
        if not isinstance(first, str) or not first:
            # Celery looks a result up by its id, also when the result is forgotten.
            raise ProtocolViolation("the id of a result of another task is not text")
        if parent is not None:
            waiting.append(parent)
        if nodes is not None:
            if not isinstance(nodes, list | tuple):
                raise ProtocolViolation("the results of a group are not a list")
            waiting += nodes
        if count + len(waiting) > MAX_CHILDREN:
            raise decoding_cost.TooCostly(
                f"more than {MAX_CHILDREN} results of tasks that it sent; the option trail=False of a task drops them"
            )


def _pair(value: Any) -> tuple[Any, Any]:
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise ProtocolViolation("a result of another task is not a pair")
    first, second = value
    return first, second


def _check_exceptions(described: Any) -> None:
    """Raise `TooCostly` for a group of too many exceptions, and for texts of too many lines."""
    waiting, count, lines = [described], 0, 0
    while waiting:
        each = waiting.pop()
        for is_exception, value in (*each["args"], *each["constructor_args"]):
            if is_exception:
                waiting += value if isinstance(value, list) else [value]
        lines += max(
            _line_ends([value for is_exception, value in each[key] if not is_exception])
            for key in ("args", "constructor_args")
        )
        lines += _line_ends(each["state"])
        if lines > MAX_ERROR_LINES:
            raise decoding_cost.TooCostly(
                f"its exception has more than {MAX_ERROR_LINES} lines of text, and that is the most"
            )
        count += 1
        if count + len(waiting) > MAX_EXCEPTIONS:
            raise decoding_cost.TooCostly(f"more than {MAX_EXCEPTIONS // 2} exceptions in a group")


def _line_ends(value: object) -> int:
    """Count where `str.splitlines` ends a line, in all texts of a value."""
    waiting, count = [value], 0
    while waiting:
        each = waiting.pop()
        if isinstance(each, str):
            count += sum(map(each.count, _LINE_ENDS)) if not each.isprintable() else 0
        elif isinstance(each, Mapping):
            waiting += [*each, *each.values()]
        elif isinstance(each, list | tuple):
            waiting += each
    return count


def _are_exceptions(value: object) -> TypeGuard[Sequence[BaseException]]:
    return (
        isinstance(value, list | tuple)
        and bool(value)
        and all(isinstance(each, BaseException) for each in value)
    )


def _can_encode(value: object, serializers: Iterable[str]) -> bool:
    try:
        encode(value, serializers)
    except Exception:  # noqa: BLE001 - as in encode
        return False
    return True


def _data_or_repr(value: object, serializers: Iterable[str]) -> Any:
    return value if _can_encode(value, serializers) else safe_repr(value)
