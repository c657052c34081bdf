"""Fuzz policy files: each is read, or refused with one line that has file, key, value and remedy."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from random import Random
from typing import Any

import msgspec

from rcon_plugins.errors import SettingsError
from rcon_plugins.settings.budget import Budget
from rcon_plugins.settings.file import _File, from_mapping
from rcon_plugins.settings.limits import Each, IoLimits
from rcon_plugins.settings.memory import Memory, OnMemory
from rcon_plugins.settings.policy import Policy
from rcon_plugins.settings.rights import Rlimits
from rcon_plugins.settings.routing import Route

FILE = "/etc/rcon.toml"
#: The longest message, characters.
LONGEST = 2000

_ODD: tuple[Any, ...] = (
    True, False, 0, 1, -1, 2, 100, 2**31, 2**63, 2**64, -(2**63), 16**4300, 0.0, -0.0, 0.5, 1e308, float("nan"),
    float("inf"), float("-inf"), "", " ", "a", "a\nb", "a\x1b[31mb", "é", "\U0001f600", "\u2028", "x" * 5000,
    "nan", "inf", "1", "0", "-1", "30%", "0%", "1e9%", "9999999%", "256M", "16E", "9999999999T", "20s", "0s", "1e3s",
    "577h", "2x", "1x", "101x", "027", "999", "0-3", "3-0", "0-99999999", "all", "auto", "inline", "thread", "process",
    "net_admin", "cap_chown", "nonsense", "99", "owner:/srv/{host}", "owner:", "owner:/{", "root", "0:0", "/", "//",
    "../x", "/srv/../..", "host", "header:", "header:X-Y", "path:0", "path:1", "*", "*.", "*.example", "[", "[a", "a.b",
    "default", "tenant", "max", None, [], [[]], [""], ["a", "a"], ["all", "chown"], {}, {"": ""}, {"a": 1},
    {"limit": "64M"}, {"limit": "64M", "expand": "2x", "up_to": "1G"}, {"limit": 0, "expand": "2x", "up_to": 0},
    datetime.date(2026, 11, 30), datetime.time(1, 2), datetime.datetime(2026, 11, 30, tzinfo=datetime.UTC),
    {"/dev/vda": {"read": "1M"}}, {"a\nb": {"c": [1, {"d": float("nan")}]}},
)  # fmt: skip
_KEYS = tuple(
    dict.fromkeys(
        name
        for kind in (Policy, Each, Rlimits, IoLimits, Memory, OnMemory, Route, Budget, _File)
        for name in kind.__struct_encode_fields__
    )
)
_ODD_KEYS = (
    "",
    "a",
    "name",
    "uid",
    "cpus",
    "Memory",
    "a\nb",
    "x" * 300,
    "é",
    "a.b",
    "timeout",
    "policy",
    "\x00",
)
_NAMES = ("default", "tenant", "a", "A", "", "tasks", "x" * 64, "a\nb", "a.b", "é", "0", "-", "a-b_c")


def _examples() -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {}
    for kind in (Policy, Each, Rlimits, IoLimits, OnMemory, Route, Budget, _File):
        hints = msgspec.inspect.type_info(kind)
        for field in hints.fields:  # type: ignore[attr-defined]
            json = getattr(field.type, "extra_json_schema", None) or {}
            found.setdefault(field.encode_name, []).extend(json.get("examples", []))
    return found


_EXAMPLES = _examples()


def make(random: Random) -> dict[str, Any]:
    """Return the contents of a settings file, mostly wrong."""
    mapping: dict[str, Any] = {}
    for _ in range(random.choice((0, 0, 0, 1, 2))):
        mapping[_key(random)] = _value(random, 0)
    if random.random() < 0.9:
        mapping["policy"] = {
            random.choice(_NAMES if random.random() < 0.3 else ("tenant", "b")): _table(random)
            for _ in range(random.randrange(1, 3))
        }
    if random.random() < 0.2:
        mapping["route"] = [
            _table(random, Route.__struct_encode_fields__) for _ in range(random.randrange(1, 3))
        ]
    if random.random() < 0.8:
        mapping["unmatched"] = "allow"
    return mapping


def _table(random: Random, keys: tuple[str, ...] = Policy.__struct_encode_fields__) -> Any:
    if random.random() < 0.02:
        return random.choice(_ODD)
    table = {}
    for _ in range(random.randrange(1, 4)):
        key = random.choice(keys) if random.random() < 0.97 else _key(random)
        examples = _EXAMPLES.get(key)
        known = bool(examples) and random.random() < 0.7
        table[key] = random.choice(examples) if known and examples else _value(random, 0)
    return table


def _key(random: Random) -> str:
    return random.choice(_KEYS if random.random() < 0.8 else _ODD_KEYS)


def _value(random: Random, depth: int) -> Any:
    chance = random.random()
    if depth < 3 and chance < 0.15:
        return {_key(random): _value(random, depth + 1) for _ in range(random.randrange(4))}
    if depth < 3 and chance < 0.3:
        return [_value(random, depth + 1) for _ in range(random.randrange(4))]
    if chance < 0.35:
        return random.choice(
            (random.randrange(-(2**70), 2**70), random.random() * 10 ** random.randrange(20))
        )
    if chance < 0.45:
        return "".join(random.choice('aA0%.xMs-:/{}*[]?" \n\\') for _ in range(random.randrange(12)))
    return random.choice(_ODD)


def check(mapping: dict[str, Any], read: Callable[..., object] = from_mapping) -> bool:
    """Return whether the contents are accepted. Raise AssertionError for a message that is not as it should be."""
    try:
        read(mapping, file=FILE)
    except SettingsError as error:
        wrong = _wrong(error)
        if wrong is not None:
            raise AssertionError(f"{wrong}: {str(error)!r}") from None
        return False
    return True


def _wrong(error: SettingsError) -> str | None:
    """Return what is wrong with the message of an error, or None."""
    text = str(error)
    if not text.isprintable():
        return "not one line"
    if not text.startswith(f"{FILE}: "):
        return "without the file"
    if not error.key:
        return "without the key"
    if not error.hint:
        return "without the remedy"
    return f"{len(text)} characters" if len(text) > LONGEST else None
