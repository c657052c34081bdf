"""Memory that expands, as written in settings."""

from __future__ import annotations

import copy
import pickle

import msgspec
import pytest

from rcon_plugins import Limits, Memory, Policy
from rcon_plugins.errors import SettingsError
from rcon_plugins.settings.file import from_mapping, json_schema

MIB = 2**20
GROWING = {"limit": "64M", "expand": "2x", "up_to": "1G"}


def test_its_values_are_plain_numbers() -> None:
    memory = Memory.parse(GROWING)
    assert (memory.limit, memory.expand, memory.up_to) == (64 * MIB, 2.0, 1024 * MIB)
    assert (memory.most, memory.expands) == (1024 * MIB, True)
    assert (type(memory.limit), type(memory.expand), type(memory.up_to)) == (int, float, int)


def test_it_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        Memory.parse(GROWING).limit = 1  # type: ignore[misc]


def test_memory_that_does_not_expand() -> None:
    for written in ("64M", 64 * MIB):
        memory = Memory.parse(written)
        assert memory == Memory(64 * MIB)
        assert (memory.limit, memory.most, memory.expands, memory.expand) == (64 * MIB, 64 * MIB, False, None)
        assert memory.after(64 * MIB) == 64 * MIB


def test_equal_memory_expands_in_the_same_way() -> None:
    twin = Memory.parse({**GROWING, "limit": 64 * MIB})
    assert Memory.parse(GROWING) == twin
    assert hash(Memory.parse(GROWING)) == hash(twin)
    assert Memory.parse(GROWING) != Memory.parse("64M")
    assert Memory.parse(GROWING) != Memory.parse({**GROWING, "expand": "3x"})
    assert Policy.make("p", memory=GROWING) != Policy.make("p", memory="64M")


@pytest.mark.parametrize("written", [GROWING, "64M"])
def test_pickling_and_copying_keep_the_expansion(written: object) -> None:
    memory = Memory.parse(written)
    for twin in (
        pickle.loads(pickle.dumps(memory)),
        copy.deepcopy(memory),
        Memory.parse(memory),
    ):
        assert (type(twin), twin, repr(twin)) == (Memory, memory, repr(memory))


@pytest.mark.parametrize(
    ("written", "limits"),
    [
        (GROWING, [128, 256, 512, 1024]),
        ({**GROWING, "expand": "1.5x", "up_to": "200M"}, [96, 144, 200]),
        ({**GROWING, "expand": "100x"}, [1024]),
        ({"limit": 8192, "expand": "1.1x", "up_to": "16K"}, [12 / 1024, 16 / 1024]),
    ],
)
def test_steps_of_an_expansion(written: dict[str, object], limits: list[float]) -> None:
    memory = Memory.parse(written)
    found, limit = [], memory.limit
    while limit < memory.most:
        limit = memory.after(limit)
        found.append(limit / MIB)
    assert found == limits


def test_text_for_messages() -> None:
    assert Memory.parse(GROWING).describe() == "1G (up_to; expanded 4 times from 64M)"
    assert Memory.parse({**GROWING, "up_to": "65M"}).describe() == "65M (up_to; expanded once from 64M)"
    assert Memory(64 * MIB).describe() == "64M"


@pytest.mark.parametrize(
    ("written", "key", "problem"),
    [
        ({**GROWING, "expand": "2"}, "memory.expand", "does not say how many times"),
        ({**GROWING, "expand": 2}, "memory.expand", "does not say how many times"),
        ({**GROWING, "expand": "1x"}, "memory.expand", "is not between 1.1x and 100x"),
        ({**GROWING, "expand": "101x"}, "memory.expand", "is not between 1.1x and 100x"),
        ({**GROWING, "up_to": "64M"}, "memory.up_to", "is not above limit = 64M"),
        ({**GROWING, "up_to": "1GB"}, "memory.up_to", 'write "1G"'),
        ({**GROWING, "limit": None}, "memory.limit", "is not a size"),
        ({**GROWING, "to": "1G"}, "memory.to", "unknown key"),
        ({"limit": "64M", "expand": "2x"}, "memory", "the key 'up_to' is missing"),
        ({"limit": "1", "expand": "2x", "up_to": "1G"}, "memory", "less than one page"),
        ([], "memory", "is not a size"),
    ],
)
def test_invalid_memory_is_refused(written: object, key: str, problem: str) -> None:
    with pytest.raises(SettingsError) as refused:
        Policy.make("p", memory=written)
    assert refused.value.key == f"policy.p.{key}"
    assert problem in str(refused.value)


@pytest.mark.parametrize(
    ("all_work", "each", "key"),
    [
        ("128M", {**GROWING, "limit": "64M"}, "each.memory.up_to"),
        ("128M", {**GROWING, "limit": "256M"}, "each.memory"),
        ({**GROWING, "up_to": "256M"}, "512M", "each.memory"),
        ({**GROWING, "up_to": "256M"}, {**GROWING, "up_to": "512M"}, "each.memory.up_to"),
        (GROWING, "128M", None),
        (GROWING, {**GROWING, "limit": "128M"}, None),
        (GROWING, GROWING, None),
    ],
)
def test_each_within_the_whole_policy(all_work: object, each: object, key: str | None) -> None:
    """The limit of one request or task may be above that of the whole policy if the latter expands."""
    if key is None:
        assert Policy.make("p", memory=all_work, each={"memory": each}).each.memory
        return
    with pytest.raises(SettingsError, match="is never reached") as refused:
        Policy.make("p", memory=all_work, each={"memory": each})
    assert refused.value.key == f"policy.p.{key}"


def test_memory_high_is_refused_beside_memory_that_expands() -> None:
    with pytest.raises(SettingsError, match="already slows processes down"):
        Policy.make("p", memory=GROWING, memory_high="32M")


def test_in_a_file_and_in_the_schema() -> None:
    settings = from_mapping({"policy": {"p": {"memory": GROWING, "each": {"memory": GROWING}}}})
    policy = settings.policies["p"]
    assert policy.memory is not None
    assert (policy.memory.up_to, policy.memory) == (1024 * MIB, policy.each.memory)
    kinds = json_schema()["$defs"]["Policy"]["properties"]["memory"]["anyOf"][0]["anyOf"]
    assert [set(kind["properties"]) for kind in kinds if kind["type"] == "object"] == [
        {"limit", "expand", "up_to"}
    ]


def test_a_plain_number_becomes_memory() -> None:
    limits = Limits(memory=64 * MIB)  # type: ignore[arg-type]
    assert type(limits.memory) is Memory
    assert type(msgspec.structs.replace(limits, pids=4).memory) is Memory
