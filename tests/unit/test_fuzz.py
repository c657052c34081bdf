"""A small part of ``make fuzz``, with inputs that Hypothesis chooses."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rcon_plugins.errors import SettingsError
from rcon_plugins.kernel.capability.sets import BITS, NAMES
from rcon_plugins.settings.file import load
from rcon_plugins.settings.policy import Policy
from rcon_plugins.settings.rights import CAPABILITY_NAMES
from tests.fuzz.__main__ import TARGETS


@pytest.mark.parametrize("target", TARGETS)
@given(st.randoms(use_true_random=False))
@settings(max_examples=300, deadline=None)
def test_chosen_inputs(target: str, random: Random) -> None:
    TARGETS[target](random)


@pytest.mark.parametrize("target", TARGETS)
def test_random_inputs(target: str) -> None:
    accepted = sum(TARGETS[target](Random(seed)) for seed in range(2000))
    assert 20 < accepted < 1980


@pytest.mark.parametrize(
    "text",
    [
        "a = " + "9" * 5000,
        "a = 0x" + "f" * 5000,
        "a = " + "[" * 3000 + "]" * 3000,
        "a = 2026-02-31",
        "a = nan",
        "[policy.x]\nmemory = 0x" + "f" * 5000,
        "[policy.x]\n" + "y" * 5000 + " = 1",
        '[policy.x]\n"a\\nb" = 1',
        '[policy."a\\nb"]',
        "[policy.x]\npids = 1\n[policy.x]",
        "[policy.x]\npids = 1\npids = 2",
        "[policy.x]\nisolation = {a = 1}",
        '[policy.x]\ncapabilities = ["net_bind_servce"]',
        '[policy.x]\ncapabilities = ["64"]',
    ],
    ids=range(14),
)
def test_a_wrong_file_is_refused_on_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "rcon.toml").write_text(text)
    with pytest.raises(SettingsError) as caught:
        load(tmp_path / "rcon.toml")
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'rcon.toml'}: ")
    assert message.isprintable()
    assert len(message) < 700
    assert caught.value.hint


def test_capabilities_are_those_of_the_kernel_layer() -> None:
    assert tuple(f"cap_{name}" for name in CAPABILITY_NAMES) == NAMES
    Policy.make("x", capabilities=[str(BITS - 1), "CAP_CHOWN", "net_raw"])
    with pytest.raises(SettingsError, match="did you mean 'net_bind_service'"):
        Policy.make("x", capabilities=["net_bind_servce"])
