from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rcon_plugins.errors import SettingsError
from rcon_plugins.kernel.cgroup import Hierarchy
from rcon_plugins.settings.file import json_schema
from rcon_plugins.settings.policy import Policy
from rcon_plugins.settings.units import (
    UNITS,
    cpu_numbers,
    format_cpus,
    format_duration,
    format_size,
    format_value,
    parse_cpu_list,
    parse_cpus,
    parse_duration,
    parse_memory,
    parse_size,
    show,
)

MEANT = [
    # The unit, what a settings file holds, what it means, and its spelling.
    ("share", "30%", 0.3, "30%"),
    ("share", "150%", 1.5, "150%"),
    ("share", "1%", 0.01, "1%"),
    ("share", "12.50%", 0.125, "12.5%"),
    ("share", "6400%", 64.0, "6400%"),
    ("size", "256M", 256 * 1024**2, "256M"),
    ("size", "1024K", 1024**2, "1M"),
    ("size", "4097", 4097, "4097"),
    ("size", 4096, 4096, "4K"),
    ("size", "2T", 2 * 1024**4, "2T"),
    ("size", "512m", 512 * 1024**2, "512M"),
    ("size", "0.5G", 512 * 1024**2, "512M"),
    ("size", "1.5g", 1536 * 1024**2, "1536M"),
    ("size", "0.1G", 107374182, "107374182"),
    ("size", "100 KiB", 100 * 1024, "100K"),
    ("size", "256MiB", 256 * 1024**2, "256M"),
    ("size", 0, 0, "0"),
    ("memory", "256M", 256 * 1024**2, "256M"),
    ("memory", "0.5g", 512 * 1024**2, "512M"),
    ("memory", 4096, 4096, "4K"),
    ("size", "0M", 0, "0"),
    ("duration", "20s", 20.0, "20s"),
    ("duration", "500ms", 0.5, "500ms"),
    ("duration", "0.5s", 0.5, "500ms"),
    ("duration", "1.5h", 5400.0, "90m"),
    ("duration", "120m", 7200.0, "2h"),
    ("duration", "0.25ms", 0.00025, "0.25ms"),
    ("cpu_time", "30ms", 0.03, "30ms"),
    ("cpu_time", "0ms", 0.0, "0ms"),
    ("factor", "2x", 2.0, "2x"),
    ("factor", "1.50x", 1.5, "1.5x"),
    ("umask", "027", 0o27, "027"),
    ("umask", "0777", 0o777, "777"),
    ("cpus", "0-1", "0-1", "0-1"),
    ("cpus", "3,0,1", "0-1,3", "0-1,3"),
    ("cpus", "0-3,2-5", "0-5", "0-5"),
]


@pytest.mark.parametrize(("unit", "written", "value", "spelled"), MEANT)
def test_values_are_plain_and_have_one_spelling(
    unit: str, written: object, value: object, spelled: str
) -> None:
    parsed = UNITS[unit].parse(written)
    assert (type(parsed), parsed) == (type(value), value)
    assert format_value(unit, parsed) == spelled
    assert UNITS[unit].parse(spelled) == parsed


REFUSED = [
    ("share", 30, '"30%"'),
    ("share", 0.3, '"30%"'),
    ("share", "30", '"30%"'),
    ("share", "0%", '"1%"'),
    ("share", "0.9%", '"1%"'),
    ("share", "-5%", '"30%"'),
    ("share", "max", '"30%"'),
    ("share", "nan%", '"30%"'),
    ("share", "1e3%", '"30%"'),
    ("share", "٣٠%", '"30%"'),
    ("share", "30%\n", '"30%"'),
    ("size", "256MB", 'write "256M"'),
    ("size", "256mb", 'write "256M"'),
    ("size", "256 M", 'write "256M"'),
    ("size", "256mib", 'write "256M"'),
    ("size", "0.5", 'write "256M"'),
    ("size", ".5G", 'write "256M"'),
    ("size", "0.5GG", 'write "256M"'),
    ("size", "50%", 'write "256M"'),
    ("memory", "0%", '"50%"'),
    ("memory", "0.0%", '"50%"'),
    ("memory", "100.1%", '"50%"'),
    ("memory", "-5%", '"50%"'),
    ("memory", "50 %", '"50%"'),
    ("memory", "max%", '"50%"'),
    ("memory", "\u0665%", '"50%"'),
    ("memory", "256MB", 'write "256M"'),
    ("memory", 0.5, 'write "256M"'),
    ("size", "512B", 'write "512"'),
    ("size", "-1", 'write "256M"'),
    ("size", -1, 'write "256M"'),
    ("size", True, 'write "256M"'),
    ("size", 1e6, 'write "256M"'),
    ("size", "9999999999T", 'write "256M"'),
    ("size", "", 'write "256M"'),
    ("duration", 20, '"20s"'),
    ("duration", "20", '"20s"'),
    ("duration", "0s", "more than"),
    ("duration", "-1s", '"20s"'),
    ("duration", "1m30s", '"20s"'),
    ("duration", "25d", '"20s"'),
    ("duration", "577h", '"576h"'),
    ("cpu_time", 0, '"20s"'),
    ("cpu_time", "-1ms", '"20s"'),
    ("factor", 2, '"2x"'),
    ("factor", 2.0, '"2x"'),
    ("factor", "2", '"2x"'),
    ("factor", "1x", '"2x"'),
    ("factor", "101x", '"2x"'),
    ("umask", 27, '"027"'),
    ("umask", "888", '"027"'),
    ("umask", True, '"027"'),
    ("cpus", 2, '"0-1,3"'),
    ("cpus", "", '"0-1,3"'),
    ("cpus", "all", '"0-1,3"'),
    ("cpus", "0,,1", '"0-1,3"'),
    ("cpus", "0-", '"0-1,3"'),
    ("cpus", "3-1", '"1-3"'),
    ("cpus", "0-7:2/4", '"0-1,3"'),
    ("cpus", "0-99999", "65535"),
]


@pytest.mark.parametrize(("unit", "written", "remedy"), REFUSED)
def test_invalid_values_are_refused_with_value_and_remedy(unit: str, written: object, remedy: str) -> None:
    with pytest.raises(SettingsError) as refused:
        UNITS[unit].parse(written)
    assert show(written) in str(refused.value)
    assert remedy in (refused.value.hint or "")
    assert refused.value.value == written


@pytest.mark.parametrize(
    ("written", "share"), [("100%", 1.0), ("50%", 0.5), ("12.5%", 0.125), ("0.01%", 0.0001)]
)
def test_a_share_of_the_memory_is_whole_pages(written: str, share: float) -> None:
    usable = Hierarchy.discover().usable_memory()
    assert parse_memory(written) % 4096 == 0
    assert 0 <= usable * share - parse_memory(written) < os.sysconf("SC_PAGE_SIZE")
    assert parse_memory(format_size(parse_memory(written))) == parse_memory(written)


def test_the_schema_has_shares_of_the_memory_only_where_they_are_read() -> None:
    assert re.fullmatch(texts_of(UNITS["memory"].schema), "12.5%")
    assert not re.fullmatch(texts_of(UNITS["size"].schema), "12.5%")
    shares = str(json_schema()).count(repr(texts_of(UNITS["memory"].schema)))
    # memory, memory_high, of policies and of each; memory_soft; limit and up_to of each memory; on_memory.up_to
    assert shares == 2 * 2 + 1 + 2 * 2 + 1
    assert Policy.make("x", memory="100%", memory_high="50%", each={"memory": "50%", "memory_soft": "25%"})
    with pytest.raises(SettingsError, match="is not a size"):
        Policy.make("x", memory="256M", swap="50%")


@given(st.integers(0, 2**63 - 1))
def test_every_size_reads_its_own_spelling(number: int) -> None:
    assert parse_size(format_size(number)) == number


@given(st.integers(1000, 10**9))
def test_every_share_of_cpu_time_reads_its_own_spelling(thousandths: int) -> None:
    cpus = parse_cpus(f"{thousandths // 1000}.{thousandths % 1000:03}%")
    assert parse_cpus(format_cpus(cpus)) == cpus


@given(st.integers(1, 24 * 24 * 3600 * 1000))
def test_every_duration_reads_its_own_spelling(milliseconds: int) -> None:
    duration = parse_duration(f"{milliseconds}ms")
    assert parse_duration(format_duration(duration)) == duration


@given(st.sets(st.integers(0, 300), min_size=1))
def test_every_list_of_cpus_keeps_its_numbers(numbers: set[int]) -> None:
    assert cpu_numbers(parse_cpu_list(",".join(map(str, numbers)))) == numbers


@given(st.sampled_from(sorted(UNITS)), st.text(max_size=300))
def test_any_text_is_a_value_or_a_settings_error(unit: str, text: str) -> None:
    with contextlib.suppress(SettingsError):
        UNITS[unit].parse(text)


def test_a_whole_number_of_seconds_needs_no_float() -> None:
    """A limit that a caller gives as an int has the same spelling."""
    assert (format_duration(20), format_cpus(2)) == ("20s", "200%")


def texts_of(schema: Mapping[str, Any]) -> str:
    return str(schema["pattern"] if "pattern" in schema else schema["anyOf"][0]["pattern"])


@pytest.mark.parametrize(("unit", "written"), [(unit, text) for unit, text, *_ in MEANT if type(text) is str])
def test_the_schema_accepts_what_the_parser_accepts(unit: str, written: str) -> None:
    assert re.fullmatch(texts_of(UNITS[unit].schema), written)


def test_a_long_value_is_shown_short_with_its_beginning_and_its_end() -> None:
    shown = show("/srv/" + "x" * 1000 + "/anna")
    assert len(shown) < 80
    assert shown.startswith("'/srv/x")
    assert shown.endswith("x/anna'")
