"""What an answer may cost the pool's process to decode is bounded before it is decoded."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable

import pytest
import yaml  # type: ignore[import-untyped]
from hypothesis import given
from hypothesis import strategies as st
from kombu import serialization

from rcon_celery import decoding_cost
from rcon_celery.decoding_cost import (
    JSON,
    MAX_DEPTH,
    MAX_YAML,
    MSGPACK,
    SMALL,
    YAML,
    TooCostly,
    check,
    check_decoded,
)

MIB = 2**20

TOO_COSTLY = {
    "empty lists": b"[" + b"[]," * MIB + b"1]",
    "lists of one": b"[" + b"[1]," * MIB + b"1]",
    "empty mappings": b"[" + b"{}," * MIB + b"1]",
    "mappings of one": b"[" + b'{"a":1},' * MIB + b"1]",
    "distinct keys": b"{" + b",".join(b'"%x":1' % number for number in range(MIB)) + b"}",
    "distinct keys before blanks": b"{" + b",".join(b'"%x" :1' % number for number in range(MIB)) + b"}",
    "keys behind colons": b"{" + b",".join(b'"a":"",":%x":","' % number for number in range(MIB // 2)) + b"}",
    "short strings": b"[" + b'"ab",' * MIB + b"1]",
    "floats": b"[" + b"0.1," * 4 * MIB + b"1]",
    "inexact floats": b"[" + b"0.12345678901234567," * 500_000 + b"1]",
    "exponents": b"[" + b"1e-400," * 150_000 + b"1]",
    "exponents, in capitals": b"[" + b"1E-400," * 150_000 + b"1]",
    "objects": b"[" + b'{"__type__":"uuid","__value__":{"hex":"%032x"}},' % 5 * 50_000 + b"1]",
    "hidden objects": b"[" + rb'{"__typ\u0065__":"date","__value__":"2020-01-01"},' * 50_000 + b"1]",
    "strings with an escape": b"[" + rb'"\u0041\u0042",' * 280_000 + b"1]",
    "long numbers": b"[" + b",".join([b"%d.0" % (2**1023 + 2**970)] * 40_000) + b"]",
    "digits": b"[" + b"9" * 65_536 + b"]",
    "wide characters": b'"' + b"\xf0\x9f\x98\x80" + b"a" * 4 * MIB + b'"',
    "escapes": b'"' + b"\\\\" * 8 * MIB + b'"',
    "deep": b"[" * 101 + b"]" * 101,
    "deep, among strings": b'["]",' * 101 + b"1" + b"]" * 101,
    "deep, after an escape": b'["\\"",' * 101 + b"1" + b"]" * 101,
    "malformed": b"[[]" * 2 * MIB,
    "quotes": b'"' * 8 * MIB,
}


@pytest.mark.parametrize("data", TOO_COSTLY.values(), ids=TOO_COSTLY)
def test_costly_json_is_refused(data: bytes) -> None:
    with pytest.raises(TooCostly):
        check(JSON, data)


@pytest.mark.parametrize(
    "value",
    [
        [[]] * 10,
        {"a": [{}] * 1000},
        "[{" * MIB,
        '"\\' * MIB,
        "x" * 15 * MIB,
        "é€" * MIB,
        "😀" + "a" * 4 * MIB,
        [3.141592653589793] * 500_000,
        [{"id": number, "name": "John Smith", "email": "john@example.com"} for number in range(50_000)],
        {f"{number:032x}": number for number in range(100_000)},
        [[12.345678, 45.678901]] * 30_000,
        [0.12345678901234567] * 200_000,
        [1.5e-07] * 50_000,
    ],
    ids=lambda value: repr(value)[:20],
)
def test_what_tasks_return_is_accepted(value: object) -> None:
    check(JSON, json.dumps({"value": value, "children": []}).encode())


def deepest(value: object) -> int:
    if isinstance(value, list):
        return 1 + max(map(deepest, value), default=0)
    if isinstance(value, dict):
        return 1 + max(map(deepest, value.values()), default=0)
    return 0


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=50,
)


@given(values, st.booleans(), st.integers(min_value=0, max_value=60))
def test_the_depth_of_json_is_exact(value: object, ascii_only: bool, around: int) -> None:
    for _ in range(around):
        value = [value]
    data = json.dumps(value, ensure_ascii=ascii_only).encode("utf-8", "replace")
    deep = deepest(value)
    for bound in (deep, deep - 1):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(decoding_cost, "MAX_DEPTH", bound)
            if bound == deep:
                check(JSON, data)
            elif deep:
                with pytest.raises(TooCostly, match="deep"):
                    check(JSON, data)


@given(st.binary(), st.sampled_from([JSON, YAML, MSGPACK, "application/other"]))
def test_no_bytes_fail_in_another_way(data: bytes, content_type: str) -> None:
    with contextlib.suppress(TooCostly):
        check(content_type, data)


@given(st.lists(st.sampled_from([*'[]{},:"\\u1e', '"a"', "\\ud83d"]), max_size=300).map("".join))
def test_pieces_do_not_depend_on_where_they_are_cut(text: str) -> None:
    """Malformed or not: quotes, brackets and commas outside of strings are those of the whole."""
    data = text.encode()
    whole = decoding_cost._taken_apart(data, 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoding_cost, "_PIECE", 7)
        cut = decoding_cost._taken_apart(data, 1)
    for mark in b"[]{},:":
        assert cut[0].count(mark) == whole[0].count(mark)
    assert cut[3] == whole[3]
    assert cut[1] <= whole[1]


@pytest.mark.parametrize(
    "data",
    [
        b"\xdd\x00\xff\xff\xff",
        b"\xdd\x00\x10\x00\x00" * 500 + b"\x01" * MIB,
        b"\xdf\xff\xff\xff\xff" + b"\x01" * MIB,
        b"\x91" * 101 + b"\x01",
        b"\xdd\x00\x20\x00\x00" + b"\x90" * 2 * MIB,
        b"\xdd\x01\x00\x00\x00" + b"\x01" * 16 * MIB,
        b"\xdd\x00\x20\x00\x00" + b"\xa2ab" * 2 * MIB,
        b"\xdd\x00\x01\x00\x00" + b"\xc7\x0a\x051234567890" * 2**16,
        b"\xdd\x00\x01\x00\x00" + b"\xd6\xff1234" * 2**16,
    ],
    ids=[
        "announced",
        "announced in each other",
        "map announced",
        "deep",
        "lists",
        "numbers",
        "strings",
        "extensions",
        "times",
    ],
)
def test_costly_msgpack_is_refused(data: bytes) -> None:
    with pytest.raises(TooCostly):
        check(MSGPACK, data)


def test_all_kinds_of_msgpack_are_walked_over() -> None:
    kinds = [
        b"\x05", b"\xe0", b"\xc0", b"\xc2", b"\xc4\x01x", b"\xc5\x00\x01x", b"\xc6\x00\x00\x00\x01x",
        b"\xc7\x01\x05x", b"\xc8\x00\x01\x05x", b"\xc9\x00\x00\x00\x01\x05x", b"\xca1234", b"\xcb12345678",
        b"\xcc1", b"\xcd12", b"\xce1234", b"\xcf12345678", b"\xd01", b"\xd112", b"\xd21234", b"\xd312345678",
        b"\xd4t1", b"\xd5t12", b"\xd6t1234", b"\xd7t12345678", b"\xd8t1234567890123456",
        b"\xa1x", b"\xd9\x01x", b"\xda\x00\x01x", b"\xdb\x00\x00\x00\x01x",
        b"\x91\x01", b"\xdc\x00\x01\x01", b"\xdd\x00\x00\x00\x01\x01",
        b"\x81\x01\x01", b"\xde\x00\x01\x01\x01", b"\xdf\x00\x00\x00\x01\x01\x01",
    ]  # fmt: skip
    deep = b"\x91" * MAX_DEPTH + b"\x01"
    for kind in kinds:
        # A kind whose length is misjudged hides the first bracket of what follows, or adds one.
        check(MSGPACK, b"\x92" + kind + deep[1:])
        with pytest.raises(TooCostly, match="deep"):
            check(MSGPACK, b"\x92" + kind + deep)


def test_yaml_is_short_and_does_not_grow() -> None:
    check(YAML, b"x" * MAX_YAML)
    for data in (b"x" * (MAX_YAML + 1), b"[" * 1001):
        with pytest.raises(TooCostly):
            check(YAML, data)
    merged = "\n".join(
        ["a0: &a0 {x: 1}", *(f"a{n}: &a{n} {{<<: [*a{n - 1}, *a{n - 1}]}}" for n in range(1, 40))]
    )
    with pytest.raises(TooCostly, match="merged keys"):
        check(YAML, merged.encode())
    check(YAML, b"base: &base {x: 1}\nother: {<<: *base, y: 2}\ntext: 1 << 2 * 3")
    lines = ["- &a0 [x, x]", *(f"- &a{number} [*a{number - 1}, *a{number - 1}]" for number in range(1, 40))]
    bomb = yaml.safe_load("\n".join(lines))
    with pytest.raises(TooCostly, match="too many times"):
        check_decoded(YAML, bomb)
    with pytest.raises(TooCostly, match="deep"):
        check_decoded(YAML, yaml.safe_load("&a [*a]"))
    check_decoded(YAML, yaml.safe_load("\n".join(lines[:8])))


@pytest.mark.parametrize(
    "unit", [b"[],", b"{},", b'{"a":1},', b'"ab",', b"0.1,", b"[" * 90 + b"]" * 90 + b","], ids=str
)
def test_small_data_may_take_as_much_memory_as_data_of_a_megabyte(unit: bytes) -> None:
    check(JSON, b"[" + unit * (5000 // len(unit) * 10) + b"1]")
    largest = most_accepted(lambda count: b"[" + unit * count + b"1]")
    assert 8 * SMALL / 100 < largest < SMALL


def most_accepted(make: Callable[[int], bytes]) -> int:
    """Return the length of the largest data that is accepted."""
    low, high = 1, SMALL
    while high - low > 1:
        middle = (low + high) // 2
        try:
            check(JSON, make(middle))
        except TooCostly:
            high = middle
        else:
            low = middle
    return len(make(low))


def test_the_content_types_are_kombus() -> None:
    assert {serialization.registry.name_to_type[name] for name in ("json", "yaml", "msgpack", "pickle")} == {
        JSON,
        YAML,
        MSGPACK,
        decoding_cost.PICKLE,
    }
