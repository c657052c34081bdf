from __future__ import annotations

import contextlib
import copy
import pickle
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rcon_plugins.errors import SettingsError
from rcon_plugins.settings.units import CpuList, Cpus, Duration, Size, Written, show

MEANT = [
    (Cpus, "30%", 0.3, "30%"),
    (Cpus, "150%", 1.5, "150%"),
    (Cpus, "1%", 0.01, "1%"),
    (Cpus, "12.50%", 0.125, "12.5%"),
    (Cpus, "6400%", 64.0, "6400%"),
    (Size, "256M", 256 * 1024**2, "256M"),
    (Size, "1024K", 1024**2, "1M"),
    (Size, "4097", 4097, "4097"),
    (Size, 4096, 4096, "4K"),
    (Size, "2T", 2 * 1024**4, "2T"),
    (Size, 0, 0, "0"),
    (Size, "0M", 0, "0"),
    (Duration, "20s", 20.0, "20s"),
    (Duration, "500ms", 0.5, "500ms"),
    (Duration, "0.5s", 0.5, "500ms"),
    (Duration, "1.5h", 5400.0, "90m"),
    (Duration, "120m", 7200.0, "2h"),
    (Duration, "0.25ms", 0.00025, "0.25ms"),
    (CpuList, "0-1", "0-1", "0-1"),
    (CpuList, "3,0,1", "0-1,3", "0-1,3"),
    (CpuList, "0-3,2-5", "0-5", "0-5"),
]


@pytest.mark.parametrize(("kind", "written", "value", "spelled"), MEANT)
def test_values_and_their_spelling(kind: type[Written], written: object, value: object, spelled: str) -> None:
    parsed = kind.parse(written)
    assert (type(parsed), parsed, str(parsed), f"{parsed}") == (kind, value, spelled, spelled)
    assert kind.parse(spelled) == parsed
    assert kind.parse(parsed) == parsed


@pytest.mark.parametrize(("kind", "written", "value", "spelled"), MEANT)
def test_a_value_keeps_its_type_when_pickled_and_copied(
    kind: type[Written], written: object, value: object, spelled: str
) -> None:
    parsed = kind.parse(written)
    for twin in (pickle.loads(pickle.dumps(parsed)), copy.deepcopy(parsed)):
        assert (type(twin), twin, str(twin)) == (kind, value, spelled)


REFUSED = [
    (Cpus, 30, '"30%"'),
    (Cpus, 0.3, '"30%"'),
    (Cpus, "30", '"30%"'),
    (Cpus, "0%", '"1%"'),
    (Cpus, "0.9%", '"1%"'),
    (Cpus, "-5%", '"30%"'),
    (Cpus, "max", '"30%"'),
    (Cpus, "nan%", '"30%"'),
    (Cpus, "1e3%", '"30%"'),
    (Cpus, "٣٠%", '"30%"'),
    (Cpus, "30%\n", '"30%"'),
    (Size, "256MB", 'write "256M"'),
    (Size, "256MiB", 'write "256M"'),
    (Size, "256m", 'write "256M"'),
    (Size, "256 M", 'write "256M"'),
    (Size, "0.5G", 'write "512M"'),
    (Size, "1.3K", 'write "256M"'),
    (Size, "512B", 'write "512"'),
    (Size, "-1", 'write "256M"'),
    (Size, -1, 'write "256M"'),
    (Size, True, 'write "256M"'),
    (Size, 1e6, 'write "256M"'),
    (Size, "9999999999T", 'write "256M"'),
    (Size, "", 'write "256M"'),
    (Duration, 20, '"20s"'),
    (Duration, "20", '"20s"'),
    (Duration, "0s", "more than"),
    (Duration, "-1s", '"20s"'),
    (Duration, "1m30s", '"20s"'),
    (Duration, "25d", '"20s"'),
    (Duration, "577h", '"576h"'),
    (CpuList, 2, '"0-1,3"'),
    (CpuList, "", '"0-1,3"'),
    (CpuList, "all", '"0-1,3"'),
    (CpuList, "0,,1", '"0-1,3"'),
    (CpuList, "0-", '"0-1,3"'),
    (CpuList, "3-1", '"1-3"'),
    (CpuList, "0-7:2/4", '"0-1,3"'),
    (CpuList, "0-99999", "65535"),
]


@pytest.mark.parametrize(("kind", "written", "remedy"), REFUSED)
def test_invalid_values_are_refused_with_value_and_remedy(
    kind: type[Written], written: object, remedy: str
) -> None:
    with pytest.raises(SettingsError) as refused:
        kind.parse(written)
    assert repr(written) in str(refused.value)
    assert remedy in (refused.value.hint or "")
    assert refused.value.value == written


@given(st.integers(0, 2**63 - 1))
def test_every_size_reads_its_own_spelling(number: int) -> None:
    assert Size(str(Size(number))) == number


@given(st.integers(1000, 10**9))
def test_every_share_of_cpu_time_reads_its_own_spelling(thousandths: int) -> None:
    cpus = Cpus(f"{thousandths // 1000}.{thousandths % 1000:03}%")
    assert Cpus(str(cpus)) == cpus


@given(st.integers(1, 24 * 24 * 3600 * 1000))
def test_every_duration_reads_its_own_spelling(milliseconds: int) -> None:
    duration = Duration(f"{milliseconds}ms")
    assert Duration(str(duration)) == duration


@given(st.sets(st.integers(0, 300), min_size=1))
def test_every_list_of_cpus_keeps_its_numbers(numbers: set[int]) -> None:
    assert CpuList(",".join(map(str, numbers))).numbers == numbers


@given(st.sampled_from([Cpus, Size, Duration, CpuList]), st.text(max_size=300))
def test_any_text_is_a_value_or_a_settings_error(kind: type[Written], text: str) -> None:
    with contextlib.suppress(SettingsError):
        kind.parse(text)


def texts_of(schema: dict[str, Any]) -> str:
    return str(schema["pattern"] if "pattern" in schema else schema["anyOf"][0]["pattern"])


@pytest.mark.parametrize(("kind", "written"), [(kind, text) for kind, text, *_ in MEANT if type(text) is str])
def test_the_schema_accepts_what_the_parser_accepts(kind: type[Written], written: str) -> None:
    assert re.fullmatch(texts_of(kind.schema), written)


def test_a_long_value_is_shown_short() -> None:
    assert show("x" * 1000).endswith("...")
    assert len(show("x" * 1000)) < 80
