"""The quick way of rcon run comes to the same as the whole one, or leaves it alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rcon_plugins.cli.run import fast_path
from rcon_plugins.cli.run import run as options_run
from rcon_plugins.cli.run.commands import run
from rcon_plugins.command.run import Order

DISK = "/var/tmp"
PLAIN = [
    [],
    ["--cpu", "30%"],
    ["--cpu=150%", "--cpu-weight", "50", "--cpus", "0"],
    ["--memory", "64M", "--swap", "0", "--pids", "8"],
    ["--memory", "64M", "--memory", "128M"],
    ["--timeout", "1.5m", "--memory", "4096"],
    ["--write", "5M", "--read", "1M", "--read-iops", "7", "--write-iops", "9", "--device", DISK],
    ["--group", "nobody-has-this-name", "--memory", "64M"],
]
NOT_PLAIN = [
    ["--help"],
    ["-h"],
    ["--memory", "x"],
    ["--memory", "1"],
    ["--memory"],
    ["--pids", "0"],
    ["--pids", "٣"],
    ["--cpu-weight", "10001"],
    ["--cpus", "60000"],
    ["--device", DISK],
    ["--write", "1M", "--device", ""],
    ["--write", "1M", "--device", "/no/such/file"],
    ["--memory", "64M", "--memory-high", "32M"],
    ["--user", "nobody"],
    ["--group", "-x"],
    ["--group", "a/b"],
    ["--group="],
    ["--group", "rcon-1-2"],
    ["--no-such"],
    ["--timeout", "20"],
    ["--json", "/no/such/folder/x"],
]


class Caught(Exception):
    def __init__(self, order: Order) -> None:
        self.order = order


@pytest.fixture(autouse=True)
def caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def catch(order: Order, *_: Any, **__: Any) -> int:
        raise Caught(order)

    monkeypatch.setattr(fast_path, "execute", catch)
    monkeypatch.setattr(options_run, "execute", catch)


@pytest.mark.parametrize("options", PLAIN, ids=" ".join)
@pytest.mark.parametrize("command", [["true"], ["--", "sh", "-c", "exit 3", "--memory"]], ids=" ".join)
def test_a_plain_line_comes_to_the_same(options: list[str], command: list[str]) -> None:
    with pytest.raises(Caught) as quickly:
        fast_path.run([*options, *command])
    with pytest.raises(Caught) as wholly:
        run.main([*options, *command], standalone_mode=False)
    one, other = quickly.value.order, wholly.value.order
    assert one.resources == other.resources
    for name in (
        "program",
        "arguments",
        "variables",
        "group",
        "each",
        "delegate_to",
        "timeout",
        "keep",
        "attend",
    ):
        assert getattr(one, name) == getattr(other, name), name


@pytest.mark.parametrize("options", NOT_PLAIN, ids=" ".join)
def test_what_is_not_plain_is_left_to_the_whole(options: list[str]) -> None:
    assert fast_path.run([*options, "--", "true"]) is None


@pytest.mark.parametrize(
    "words", [[], ["--"], ["--", ""], ["no-such-program"], ["/etc/passwd"]], ids=" ".join
)
def test_no_command_is_left_to_the_whole(words: list[str]) -> None:
    assert fast_path.run(words) is None


def test_the_quick_way_loads_little() -> None:
    code = "import sys, rcon_plugins.cli.run.fast_path; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy = {
        "click",
        "msgspec",
        "pluggy",
        "dataclasses",
        "inspect",
        "json",
        "pathlib",
        "threading",
        "random",
        "ctypes",
    }
    assert heavy & set(done.stdout.split()) == set()


def test_the_script_is_the_start() -> None:
    text = (Path(__file__).resolve().parents[3] / "pyproject.toml").read_text()
    assert 'rcon = "rcon_plugins.cli.start:main"' in text
