"""Limits as text, for input that has no other types."""

from __future__ import annotations

import pytest

from rcon_plugins.errors import SettingsError
from rcon_plugins.settings.limit_text import as_written, device_and_key, removes, value_of
from rcon_plugins.settings.policy import Policy


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("memory", "512M", "512M"),
        ("memory", "4096", "4096"),
        ("pids", "64", 64),
        ("cpus", "1", "1"),
        ("timeout", "20s", "20s"),
        ("memory", '{ limit = "1M", expand = "2x" }', {"limit": "1M", "expand": "2x"}),
    ],
)
def test_text_becomes_what_a_settings_file_holds(key: str, text: str, value: object) -> None:
    assert value_of(key, text) == value


@pytest.mark.parametrize(
    ("key", "text", "said"),
    [
        ("pids", "many", "'many' is not a whole number (for example 100)"),
        ("pids", "²", "is not a whole number"),
        ("pids", "9" * 20, "is not a whole number"),
        ("cpu_weight", "max", "'max' is not a whole number"),
        ("memory", "{ limit = 1", "is no table (as in a settings file: {"),
    ],
)
def test_invalid_text_is_refused(key: str, text: str, said: str) -> None:
    with pytest.raises(SettingsError) as caught:
        value_of(key, text)
    assert said in str(caught.value)


def test_max_removes_a_limit() -> None:
    assert removes("memory", "max")
    assert removes("write_iops", "max")
    assert removes("timeout", "max")
    assert not removes("cpus", "max")
    assert not removes("memory", "512M")


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("/srv.read", ("/srv", "read")),
        ('"/srv/a.b".write_iops', ("/srv/a.b", "write_iops")),
        ("/srv/a.b", ("/srv/a.b", None)),
        ("254:0.write", ("254:0", "write")),
        ("254:0", ("254:0", None)),
    ],
)
def test_devices(name: str, found: tuple[str, str | None]) -> None:
    assert device_and_key(name) == found


@pytest.mark.parametrize("name", ["read", "", '"".read', ".read"])
def test_a_missing_device_is_refused(name: str) -> None:
    with pytest.raises(
        SettingsError, match=r"no device is named \(io\.DEVICE\.KEY, the KEY one of: read, write"
    ):
        device_and_key(name)


def test_values_are_spelled_as_in_settings() -> None:
    policy = Policy.make(
        "p",
        cpu="30%",
        pids=3,
        memory={"limit": "1M", "expand": "2x", "up_to": "1G"},
        io={"/srv": {"read": "1M", "write_iops": 5}},
        each={"timeout": "20s"},
    )
    assert as_written("cpu", policy.cpu) == "30%"
    assert as_written("pids", policy.pids) == 3
    assert as_written("memory", policy.memory) == {"limit": "1M", "expand": "2x", "up_to": "1G"}
    assert as_written("io", policy.io) == {"/srv": {"read": "1M", "write_iops": 5}}
    assert as_written("timeout", policy.each.timeout) == "20s"
    assert as_written("swap", policy.swap) is None


def test_keys_for_retries_are_spelled_as_in_settings() -> None:
    keys = {"on_memory": {"expand": "1.5x", "up_to": "2G"}, "max_deaths": 5, "dead_letter": "dead"}
    policy = Policy.make("p", each={"memory": "256M"}, **keys)
    assert {key: as_written(key, getattr(policy, key)) for key in keys} == keys
