"""Convert the contents of a settings file to the types of this project, with errors that name the key.

msgspec converts and checks. But it reports the location as ``$.io[...]``, without the key of a table, and checks a
table before its parts. So on an error `explain` checks again, part by part in the order of the file, to find the first
fault and its key.
"""

from __future__ import annotations

import difflib
import re
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

import msgspec

from rcon_plugins.errors import SettingsError
from rcon_plugins.settings.units import Written, show

T = TypeVar("T")

_TOML_WORDS = {"int": "integer", "str": "string", "bool": "boolean", "object": "table"}


def convert(value: object, kind: type[T], key: str = "") -> T:
    """Return ``value``, in the form of a settings file, converted to ``kind``.

    ``key`` is the dotted key of ``value``. Raises `SettingsError` for the first fault.
    """
    try:
        return msgspec.convert(value, kind, dec_hook=dec_hook)
    except (msgspec.ValidationError, SettingsError) as error:
        raise explain(value, kind, key) or error from None


def dec_hook(kind: type, value: object) -> object:
    """Decode the types of `rcon_plugins.settings.units`, as msgspec's ``dec_hook``."""
    if issubclass(kind, Written):
        return kind.parse(value)
    raise NotImplementedError(kind)


def schema_hook(kind: type) -> dict[str, Any]:
    """Return the schema of the types of `rcon_plugins.settings.units`, as msgspec's ``schema_hook``."""
    if issubclass(kind, Written):
        return dict(kind.schema)
    raise NotImplementedError(kind)


def dotted(key: str, part: str) -> str:
    """Return the key of ``part`` in the table ``key``, quoted if TOML needs quotes."""
    shown = part if re.fullmatch(r"[A-Za-z0-9_-]+", part) else f'"{part}"'
    return f"{key}.{shown}" if key else shown


def did_you_mean(word: str, known: Iterable[str]) -> str | None:
    """Return a hint with the known word that is most similar to ``word``, or None."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"did you mean {close[0]!r}?" if close else None


def one_of(known: Iterable[str]) -> str:
    """Return a hint that lists the known words."""
    return f"one of: {', '.join(known)}"


def explain(value: object, kind: Any, key: str, meta: msgspec.Meta | None = None) -> SettingsError | None:
    """Return the first error in converting ``value`` to ``kind``, or None."""
    try:
        msgspec.convert(value, kind, dec_hook=dec_hook)
        return None
    except SettingsError as error:
        own = error
    except msgspec.ValidationError as error:
        own = _plainly(value, kind, meta, str(error).partition(" - at `")[0])
    inner, meta = _unwrapped(kind, meta)
    if isinstance(value, Mapping):
        for name, part in value.items():
            fault = _fault_of_part(inner, str(name), part, key)
            if fault is not None:
                return fault
    own.key = ".".join(part for part in (key, own.key) if part)
    if own.hint is None:
        own.hint = _remedy(value, kind, meta)
    return own


def _fault_of_part(kind: Any, name: str, part: object, key: str) -> SettingsError | None:
    here = dotted(key, name)
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        fields = _fields(kind)
        if name not in fields:
            elsewhere = getattr(kind, "belongs", {}).get(name)
            hint = elsewhere or did_you_mean(name, fields) or one_of(fields)
            return SettingsError("unknown key", key=here, value=part, hint=hint)
        return explain(part, fields[name], here)
    if get_origin(kind) is not None and issubclass(get_origin(kind), Mapping):
        return explain(part, get_args(kind)[1], here)
    return None


def _fields(kind: type[msgspec.Struct]) -> dict[str, Any]:
    hints = typing.get_type_hints(kind, include_extras=True)
    return {field.encode_name: hints[field.name] for field in msgspec.structs.fields(kind)}


def _unwrapped(kind: Any, meta: msgspec.Meta | None) -> tuple[Any, msgspec.Meta | None]:
    """Return the type ``kind`` in ``Annotated[kind | None, meta]``, and ``meta``."""
    while True:
        if get_origin(kind) is Annotated:
            meta = next((extra for extra in kind.__metadata__ if extra.examples), meta)
            kind = kind.__origin__
        elif get_origin(kind) in (typing.Union, types.UnionType):
            kind = next(part for part in get_args(kind) if part is not type(None))
        else:
            return kind, meta


def _plainly(value: object, kind: Any, meta: msgspec.Meta | None, message: str) -> SettingsError:
    """Return msgspec's message in terms of TOML, with the value and a remedy."""
    if message.startswith("Object missing required field "):
        name = message.split("`")[1]
        fields = _fields(_unwrapped(kind, None)[0])
        example = (
            _remedy(None, fields[name], None) if name in fields else None
        )  # else of a part, which is explained
        return SettingsError(f"the key {name!r} is missing", hint=example)
    if message.startswith("Invalid enum value"):
        problem = "is not one of the words for it"
    else:
        message = re.sub(
            r"\w+", lambda word: _TOML_WORDS.get(word[0], word[0]), message.replace(" | null", "")
        )
        problem = f"is refused: {message[:1].lower()}{message[1:]}".replace("`", "")
    return SettingsError(f"{show(value)} {problem}", value=value, hint=_remedy(value, kind, meta))


def _remedy(value: object, kind: Any, meta: msgspec.Meta | None) -> str | None:
    kind, meta = _unwrapped(kind, meta)
    if get_origin(kind) is Literal:
        words = get_args(kind)
        return (did_you_mean(value, words) if isinstance(value, str) else None) or one_of(words)
    if meta is not None and meta.examples:
        return f"for example {_toml(meta.examples[0])}"
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        return f"a table of {', '.join(_fields(kind))}"
    return None


def _toml(example: object) -> str:
    if isinstance(example, Mapping):
        return f"{{ {', '.join(f'{key} = {_toml(value)}' for key, value in example.items())} }}"
    if isinstance(example, list):
        return f"[{', '.join(map(_toml, example))}]"
    return f'"{example}"' if isinstance(example, str) else str(example)
