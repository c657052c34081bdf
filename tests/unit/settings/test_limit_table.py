"""The table of limits agrees with the settings it describes and with the kernel's fields."""

from __future__ import annotations

import subprocess
import sys
from typing import get_args

import pytest

from rcon_plugins.errors import SettingsError
from rcon_plugins.kernel.cgroup import IoMax, Resources
from rcon_plugins.settings.limit_table import (
    BY_KEY,
    IO_LIMITS,
    KEY_OF_FIELD,
    LIMITS,
    SHARED_KEYS,
    Limit,
    Unit,
)
from rcon_plugins.settings.limits import Each, IoLimits, Limits
from rcon_plugins.settings.policy import Policy
from rcon_plugins.settings.units import UNITS


def test_every_limit_of_a_policy_is_a_row() -> None:
    assert set(Limits.__struct_fields__) == SHARED_KEYS
    assert set(IoLimits.__struct_fields__) == {limit.key for limit in IO_LIMITS}
    only_each = {limit.key for limit in LIMITS if limit.table == "each"}
    assert set(Each.__struct_fields__) - set(Limits.__struct_fields__) == only_each


def test_every_field_of_the_kernel_is_a_row() -> None:
    assert set(KEY_OF_FIELD) == set(Resources._fields) - {"io", "oom_group", "files"}
    assert tuple(limit.field for limit in IO_LIMITS) == IoMax._fields


def test_every_unit_of_a_row_can_be_read_and_written() -> None:
    assert {*get_args(Unit), "umask"} == set(UNITS)


def test_keys_are_unique() -> None:
    assert len(BY_KEY) == len(LIMITS)


@pytest.mark.parametrize("limit", LIMITS, ids=lambda limit: limit.key)
def test_help_fits_a_line_and_the_example_is_valid(limit: Limit) -> None:
    assert len(limit.help) <= 68
    assert limit.help.endswith(".")
    assert limit.description.endswith(".")
    limit.parse(str(limit.example))


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("cpu", "150%", 1.5),
        ("cpu_burst", "30ms", 0.03),
        ("cpus", "0,1", "0-1"),
        ("memory", "64M", 64 << 20),
        ("swap", "0", 0),
        ("pids", "8", 8),
        ("timeout", "1.5m", 90.0),
        ("device", "/srv", "/srv"),
    ],
)
def test_an_option_is_parsed_to_a_plain_value(key: str, text: str, value: object) -> None:
    parsed = BY_KEY[key].parse(text)
    assert (parsed, type(parsed)) == (value, type(value))


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("pids", "0"),
        ("pids", "4194305"),
        ("pids", "²"),
        ("cpu_weight", "10001"),
        ("memory", "4095"),
        ("read", "0"),
        ("cpu", "30"),
    ],
)
def test_a_value_out_of_range_is_refused_with_a_remedy(key: str, text: str) -> None:
    with pytest.raises(SettingsError) as caught:
        BY_KEY[key].parse(text)
    assert caught.value.hint
    with pytest.raises(SettingsError):
        Policy.make("p", **({"io": {"/srv": {key: int(text)}}} if key == "read" else {key: text}))


def test_the_table_imports_little() -> None:
    code = "import sys, rcon_plugins.settings.limit_table; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert {"msgspec", "click", "decimal", "pathlib", "rcon_plugins.kernel"} & set(
        done.stdout.split()
    ) == set()
