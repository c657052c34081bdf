"""Convert the contents of a settings file to the types of this project, with errors that name the key.

Text becomes numbers first: a field such as `Size` is a plain ``int``, and its annotation has the parser and the JSON
schema of the text. Then msgspec converts and checks. But it reports the location as ``$.io[...]``, without the key of a
table, and checks a table before its parts. So on an error `explain` checks again, part by part in the order of the
file, to find the first fault and its key.
"""

from __future__ import annotations

import difflib
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Self, TypeVar, get_args, get_origin

import msgspec
from msgspec import Meta

from rcon_plugins.errors import SettingsError
from rcon_plugins.settings.units import UNITS, as_toml, listed, quoted, show

T = TypeVar("T")

#: The key of the schema of the text, in the schema that msgspec makes of a number.
_TEXT = "x-text"
#: The longest part of a key in a message, characters. The name of a policy has at most 63.
_LONGEST_KEY = 80
#: The most words that a hint lists. A policy has fewer keys.
_MOST_WORDS = 50
_TOML_WORDS = {"int": "integer", "str": "string", "bool": "boolean", "object": "table"}


class Written:
    """A type that is written as text in settings. A subclass also derives from str, tuple or `msgspec.Struct`."""

    __slots__ = ()

    #: The JSON schema of its spellings in a settings file.
    schema: ClassVar[dict[str, Any]] = {"type": "string"}

    @classmethod
    def parse(cls, value: object) -> Self:
        """Return the value that ``value`` means in a settings file. Raises `SettingsError`, without a key."""
        raise NotImplementedError


def _in_unit(name: str) -> Meta:
    """Return the annotation of a value that a settings file writes as text in this unit."""
    unit = UNITS[name]
    return Meta(extra={"parse": unit.parse}, extra_json_schema={_TEXT: unit.schema})


#: The types of fields. Past `convert` they are plain: CPUs, seconds of CPU time, bytes, seconds, times, bits, text.
Cpus = Annotated[float, _in_unit("share")]
CpuTime = Annotated[float, _in_unit("cpu_time")]
Size = Annotated[int, _in_unit("size")]
MemorySize = Annotated[int, _in_unit("memory")]
Duration = Annotated[float, _in_unit("duration")]
Factor = Annotated[float, _in_unit("factor")]
Umask = Annotated[int, _in_unit("umask")]
CpuList = Annotated[str, _in_unit("cpus")]


class _Kind(NamedTuple):
    """A type without ``Annotated`` and ``| None``, and what these say."""

    whole: Any
    plain: Any
    optional: bool = False
    #: The annotation with an example.
    meta: Meta | None = None
    #: What parses the value before msgspec gets it.
    parse: Callable[[Any], Any] | None = None

    @classmethod
    def of(cls, whole: Any) -> _Kind:
        """Return the kind of a type."""
        kind = cls(whole, whole)
        while True:
            if get_origin(kind.plain) is Annotated:
                for meta in kind.plain.__metadata__:
                    parse = (meta.extra or {}).get("parse", kind.parse)
                    kind = kind._replace(meta=meta if meta.examples else kind.meta, parse=parse)
                kind = kind._replace(plain=kind.plain.__origin__)
            elif get_origin(kind.plain) in (typing.Union, types.UnionType):
                inner = next(part for part in get_args(kind.plain) if part is not type(None))
                kind = kind._replace(plain=inner, optional=True)
            else:
                break
        is_text = _is_struct(kind.plain) and issubclass(kind.plain, Written)
        return kind._replace(parse=kind.plain.parse) if is_text else kind

    def fields(self) -> Mapping[str, _Kind] | None:
        """Return the kinds of the keys of a table with known keys; None for any other type."""
        return _fields(self.plain) if _is_struct(self.plain) and self.parse is None else None

    def part(self, name: str) -> _Kind | None:
        """Return the kind of one key of a table; None for an unknown key, or if it is no table."""
        fields = self.fields()
        if fields is not None:
            return fields.get(name)
        origin = get_origin(self.plain)
        is_mapping = isinstance(origin, type) and issubclass(origin, Mapping)
        return _Kind.of(get_args(self.plain)[1]) if is_mapping else None


def _is_struct(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, msgspec.Struct)


@lru_cache(maxsize=64)
def _fields(struct: type[msgspec.Struct]) -> Mapping[str, _Kind]:
    hints = typing.get_type_hints(struct, include_extras=True)
    return {field.encode_name: _Kind.of(hints[field.name]) for field in msgspec.structs.fields(struct)}


def convert(value: object, kind: type[T], key: str = "") -> T:
    """Return ``value``, in the form of a settings file, converted to ``kind``.

    ``key`` is the dotted key of ``value``. Raises `SettingsError` for the first fault.
    """
    try:
        converted: T = _convert(value, _Kind.of(kind))
        return converted
    except (msgspec.ValidationError, SettingsError) as error:
        raise explain(value, kind, key) or error from None


def _convert(value: object, kind: _Kind) -> Any:
    return msgspec.convert(_parsed(value, kind), kind.whole, dec_hook=dec_hook)


def _parsed(value: object, kind: _Kind) -> object:
    """Return ``value`` with plain values in place of the texts in units. Raises `SettingsError`, without a key."""
    if value is None and kind.optional:
        return None
    if kind.parse is not None:
        return kind.parse(value)
    if not isinstance(value, Mapping):
        return value
    return {
        name: part if (its := kind.part(name)) is None else _parsed(part, its) for name, part in value.items()
    }


def dec_hook(kind: type, value: object) -> object:
    """Decode the subclasses of `Written` that msgspec does not know, as its ``dec_hook``."""
    if issubclass(kind, Written):
        return kind.parse(value)
    raise NotImplementedError(kind)


def schema_of(kind: type[msgspec.Struct], *written: type[Written]) -> dict[str, Any]:
    """Return the JSON schema of a type as a settings file writes it.

    ``written`` are the parts that msgspec would describe as tables: those that are `Written` and a struct.
    """
    schema = msgspec.json.schema(kind, schema_hook=_schema_hook)
    texts = {f"#/$defs/{one.__name__}": one.schema for one in written}
    for one in written:
        del schema["$defs"][one.__name__]
    found: dict[str, Any] = _with_texts(schema, texts)
    return found


def _with_texts(part: Any, texts: Mapping[str, Any]) -> Any:
    """Return a part of a schema with text in place of numbers in units, and in place of references to ``texts``."""
    if isinstance(part, list):
        return [_with_texts(one, texts) for one in part]
    if not isinstance(part, dict):
        return part
    kept = {key: _with_texts(one, texts) for key, one in part.items()}
    text = kept.pop(_TEXT, None) or texts.get(kept.get("$ref", ""))
    if text is None:
        return kept
    return {**text, **{key: one for key, one in kept.items() if key not in ("type", "$ref")}}


def _schema_hook(kind: type) -> dict[str, Any]:
    """Return the schema of the subclasses of `Written`, as msgspec's ``schema_hook``."""
    if issubclass(kind, Written):
        return dict(kind.schema)
    raise NotImplementedError(kind)


def dotted(key: str, part: str) -> str:
    """Return the key of ``part`` in the table ``key``, quoted if TOML needs quotes, and not too long."""
    part = part if len(part) <= _LONGEST_KEY else f"{part[: _LONGEST_KEY - 3]}..."
    shown = quoted(part)
    return f"{key}.{shown}" if key else shown


def did_you_mean(word: str, known: Iterable[str]) -> str | None:
    """Return a hint with the known word that is most similar to ``word``, or None."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"did you mean {close[0]!r}?" if close else None


def one_of(known: Iterable[str]) -> str:
    """Return a hint that lists the known words, as far as one line has room for them."""
    return f"one of: {listed(list(known), _MOST_WORDS)}"


def explain(value: object, kind: Any, key: str) -> SettingsError | None:
    """Return the first error in converting ``value`` to ``kind``, or None."""
    return _fault(value, _Kind.of(kind), key)


def _fault(value: object, kind: _Kind, key: str) -> SettingsError | None:
    try:
        _convert(value, kind)
        return None
    except SettingsError as error:
        own = error
    except msgspec.ValidationError as error:
        own = _plainly(value, kind, str(error).partition(" - at `")[0])
    if isinstance(value, Mapping):
        for name, part in value.items():
            fault = _fault_of_part(kind, str(name), part, key)
            if fault is not None:
                return fault
    own.key = ".".join(part for part in (key, own.key) if part)
    if own.hint is None:
        own.hint = _remedy(value, kind)
    return own


def _fault_of_part(kind: _Kind, name: str, part: object, key: str) -> SettingsError | None:
    here, fields, its = dotted(key, name), kind.fields(), kind.part(name)
    if its is not None:
        return _fault(part, its, here)
    if fields is None:
        return None
    elsewhere = getattr(kind.plain, "belongs", {}).get(name)
    hint = elsewhere or did_you_mean(name, fields) or one_of(fields)
    return SettingsError("unknown key", key=here, value=part, hint=hint)


def _plainly(value: object, kind: _Kind, message: str) -> SettingsError:
    """Return msgspec's message in terms of TOML, with the value and a remedy."""
    if message.startswith("Object missing required field "):
        name = message.split("`")[1]
        its = kind.part(name)  # None: a key of a part, which is explained
        return SettingsError(f"the key {name!r} is missing", hint=None if its is None else _remedy(None, its))
    if message.startswith("Invalid enum value"):
        problem = "is not one of the words for it"
    else:
        message = re.sub(
            r"\w+", lambda word: _TOML_WORDS.get(word[0], word[0]), message.replace(" | null", "")
        )
        problem = f"is refused: {message[:1].lower()}{message[1:]}".replace("`", "")
    return SettingsError(f"{show(value)} {problem}", value=value, hint=_remedy(value, kind))


def _remedy(value: object, kind: _Kind) -> str | None:
    if get_origin(kind.plain) is Literal:
        words = get_args(kind.plain)
        return (did_you_mean(value, words) if isinstance(value, str) else None) or one_of(words)
    if kind.meta is not None and kind.meta.examples:
        return f"for example {_example(kind.meta.examples[0])}"
    fields = kind.fields()
    return None if fields is None else f"a table of {', '.join(fields)}"


def _example(example: object) -> str:
    """Return an example in the way of TOML, its texts in double quotes."""
    if isinstance(example, Mapping):
        return f"{{ {', '.join(f'{quoted(key)} = {_example(value)}' for key, value in example.items())} }}"
    if isinstance(example, list):
        return f"[{', '.join(map(_example, example))}]"
    return f'"{example}"' if isinstance(example, str) else as_toml(example)
