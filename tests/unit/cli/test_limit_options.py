"""Options that set limits: the policy they make, and the messages for wrong values."""

from __future__ import annotations

import pytest

from rcon_plugins.cli.exit import BadUsage
from rcon_plugins.cli.limit_options import limits_of
from rcon_plugins.cli.options import RUN_OPTIONS, parse
from rcon_plugins.settings.limit_table import OPTIONS
from rcon_plugins.settings.limits import Limits
from rcon_plugins.settings.policy import Policy


def parsed(*arguments: str) -> Policy:
    return limits_of(parse([*arguments, "--", "true"], RUN_OPTIONS).options)


def test_each_limit_of_a_policy_has_an_option() -> None:
    keys = {option.key for option in OPTIONS}
    assert set(Limits.__struct_fields__) - {"io"} <= keys
    assert {"read", "write", "read_iops", "write_iops", "device"} <= keys


def test_options_are_the_policy_file() -> None:
    made = parsed(
        *(
            "--cpu",
            "30%",
            "--cpu-burst",
            "20ms",
            "--cpu-weight",
            "50",
            "--cpus",
            "0",
            "--memory",
            "64M",
            "--memory-high",
            "48M",
        ),
        *("--swap", "0", "--pids", "8", "--read", "10M", "--write-iops", "7", "--device", "254:0"),
    )
    assert made == Policy.make(
        made.name,
        cpu="30%",
        cpu_burst="20ms",
        cpu_weight=50,
        cpus="0",
        memory="64M",
        memory_high="48M",
        swap="0",
        pids=8,
        io={"254:0": {"read": "10M", "write_iops": 7}},
    )


def test_no_option_sets_no_limit() -> None:
    assert parsed().limits_set() == ()


def test_the_device_is_that_of_the_working_directory(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path_factory.mktemp("here")
    monkeypatch.chdir(folder)
    assert list(parsed("--write", "5M").io) == [str(folder)]
    assert list(parsed("--write", "5M", "--device", "sub").io) == [f"{folder}/sub"]


JUNK = {
    "--cpu": ["", "x", "30", "0%", "-5%"],
    "--cpu-burst": ["", "x", "30", "30%", "-1ms", "10ms"],
    "--cpu-weight": ["", "x", "0", "10001", "-1", "1.5", "9" * 40],
    "--cpus": ["", "x", "3-1", "0-99999", "-1"],
    "--memory": ["", "x", "64MB", "-1", "1", "9" * 19 + "T"],
    "--memory-high": ["", "x", "64M"],
    "--expand": ["", "x", "2x"],
    "--up-to": ["", "x", "1G"],
    "--swap": ["", "x", "-1"],
    "--read": ["", "x", "-1"],
    "--write": ["", "x", "5 MB/s"],
    "--read-iops": ["", "x", "0", "-1"],
    "--write-iops": ["", "x", "0", "9" * 40],
    "--pids": ["", "x", "0", "-1", "9" * 40],
    "--device": ["/"],
}


@pytest.mark.parametrize(("flag", "value"), [(flag, value) for flag in JUNK for value in JUNK[flag]])
def test_junk_is_refused_by_the_name_of_its_option(flag: str, value: str) -> None:
    with pytest.raises(BadUsage) as caught:
        parsed(flag, value)
    message = str(caught.value)
    assert message.startswith(f"{flag}")
    assert "\n" not in message
    assert "(" in message or flag == "--device"


def test_junk_is_tried_on_every_option() -> None:
    assert set(JUNK) == {option.flag for option in OPTIONS}


@pytest.mark.parametrize("device", ["", "1:x", "nul\0", ":"])
def test_an_invalid_device_is_refused(device: str) -> None:
    with pytest.raises(BadUsage, match=r"^--device: "):
        parsed("--read", "1M", "--device", device)
