"""rcon run --policy: the plugins of the settings get its events, and rcon applies the limits they return."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.kernel.command.harness import ALLOCATE, rcon
from tests.kernel.command.test_events import FORKS, events, until_limit
from tests.listener import environ, install

pytestmark = pytest.mark.each_layout


def until_set(limit: int) -> str:
    """Allocate more than 32M, and wait until the plugin has set a limit: on v1 nothing slows the allocation down."""
    return f"{ALLOCATE.format(40)}; {until_limit(limit, 'memory.max', 'memory.limit_in_bytes')}"


@pytest.fixture
def listener(tmp_path: Path) -> Callable[..., Callable[[], None]]:
    """Install the plugin, which returns more memory for events of a kind."""
    installed = install(tmp_path)

    def make(kind: str = "", memory: str = "") -> Callable[[], None]:
        def before() -> None:
            sys.path.insert(0, str(installed))
            os.environ.update(environ(tmp_path, kind, memory))

        return before

    return make


def write(folder: Path, policy: str) -> Path:
    settings = folder / "rcon.toml"
    settings.write_text(f'plugins = ["listener"]\n[policy.job]\n{policy}\n')
    return settings


def heard(folder: Path, kind: str) -> list[dict[str, Any]]:
    return [event for event in events(folder / "heard") if event["kind"] == kind]


@pytest.mark.smoke
def test_a_plugin_raises_the_limit_before_the_kill(
    tmp_path: Path, listener: Callable[..., Callable[[], None]]
) -> None:
    """--on-event, which gets the same events, raises the limit, too."""
    memory = '{ limit = "32M", expand = "2x", up_to = "64M" }'
    settings = write(tmp_path, f"memory = {memory}\nswap = 0")
    told = tmp_path / "told"
    script = f"{until_set(1 << 30)}; {ALLOCATE.format(100)} && echo done"
    done = rcon(
        *("run", "--policy", "job", "--settings", settings, "--group", "heard"),
        *("--on-event", f"cat >> {told}", "--", "sh", "-c", script),
        before=listener("memory_limit", "1G"),
    )
    assert (done.status, done.err, done.out) == (0, "", "done\n")
    event = heard(tmp_path, "memory_limit")[0]
    assert (event["policy"], event["group"], event["limit"]) == ("job", "heard", "memory")
    assert (event["bound"], event["next_bound"]) == (32 << 20, 64 << 20)
    assert [one["bound"] for one in events(told) if one["kind"] == "memory_limit"][:1] == [32 << 20]
    assert done.report["usage"]["memory_peak"] > 100 << 20  # its limit is 1G


def test_the_limit_set_by_a_plugin_is_reported(
    tmp_path: Path, listener: Callable[..., Callable[[], None]]
) -> None:
    settings = write(tmp_path, 'memory = { limit = "32M", expand = "2x", up_to = "1G" }\nswap = 0')
    script = f"{until_set(96 << 20)}; exec {ALLOCATE.format(200)}"
    done = rcon(
        *("run", "--policy", "job", "--settings", settings, "--", "sh", "-c", script),
        before=listener("memory_limit", "96M"),
    )
    assert done.status == 137
    assert done.err == "rcon: memory limit 96 MiB reached (peak 96.0 MiB, expanded from 32M)\n"
    assert done.report["outcome"] == "memory"


def test_each_limit_events_reach_plugins(tmp_path: Path, listener: Callable[..., Callable[[], None]]) -> None:
    settings = write(tmp_path, "each = { pids = 4 }")
    done = rcon(
        *("run", "--policy", "job", "--settings", settings, "--group", "forks", "--", "sh", "-c", FORKS),
        before=listener(),
    )
    assert done.status == 0
    event = heard(tmp_path, "pids_limit")[0]
    assert (event["limit"], event["bound"], event["group"]) == ("each.pids", 4, "forks")
    # Pressure that was not reported is not reported at the end either.
    assert all(pressure["usage"] for pressure in heard(tmp_path, "pressure"))


def test_each_memory_expands_without_a_plugin(tmp_path: Path) -> None:
    settings = tmp_path / "rcon.toml"
    settings.write_text(
        '[policy.job]\neach = { memory = { limit = "32M", expand = "2x", up_to = "1G" }, swap = 0 }\n'
    )
    told = tmp_path / "told"
    done = rcon(
        *("run", "--policy", "job", "--settings", settings, "--on-event", f"cat >> {told}"),
        *("--", "sh", "-c", f"{ALLOCATE.format(40)} && sleep 2 && echo done"),
    )
    assert (done.status, done.err, done.out) == (0, "", "done\n")
    grown = [event for event in events(told) if event["next_bound"]]
    assert grown
    assert grown[0]["limit"] == "each.memory"
