"""rcon run --expand and --on-event: memory expands while the command runs, and each event runs a command."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from rcon_plugins.kernel.cgroup import Cgroup
from tests.commands import become_rcon
from tests.kernel.command.harness import ALLOCATE, rcon, until

pytestmark = pytest.mark.each_layout

FORKS = "(for i in 1 2 3 4 5 6; do sleep 5 & done) 2>/dev/null; exit 0"
GROWS = ("--memory", "32M", "--expand", "2x", "--up-to")


def events(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.smoke
def test_a_command_above_the_first_limit_finishes() -> None:
    done = rcon("run", *GROWS, "1G", "--swap", "0", "--", "sh", "-c", ALLOCATE.format(100) + " && echo done")
    assert (done.status, done.err, done.out) == (0, "", "done\n")
    assert done.report["outcome"] == "ok"
    assert done.report["usage"]["memory_peak"] > 100 << 20


def test_a_command_above_the_last_limit_is_killed() -> None:
    done = rcon("run", *GROWS, "64M", "--swap", "0", "--", *ALLOCATE.format(200).split())
    assert done.status == 137
    assert done.err == "rcon: memory limit 64 MiB reached (peak 64.0 MiB, expanded from 32M)\n"
    assert (done.report["outcome"], done.report["limit"]) == ("memory", "memory")


def test_expansion_from_64_mib_to_1_gib() -> None:
    """The limit starts at 64 MiB and doubles up to 1 GiB: 200 MiB finishes, 1.2 GiB is killed."""
    grows = ("--memory", "64M", "--expand", "2x", "--up-to", "1G", "--swap", "0")
    done = rcon("run", *grows, "--", *ALLOCATE.format(200).split())
    assert (done.status, done.err, done.out) == (0, "", "")
    assert (done.report["outcome"], done.report["usage"]["memory_peak"] > 200 << 20) == ("ok", True)
    done = rcon("run", *grows, "--", *ALLOCATE.format(1200).split())
    assert (done.status, done.out) == (137, "")
    assert done.err == "rcon: memory limit 1 GiB reached (peak 1.0 GiB, expanded from 64M)\n"
    assert (done.report["outcome"], done.report["limit"]) == ("memory", "memory")


def test_on_event_gets_each_event_and_its_limits_are_applied(tmp_path: Path) -> None:
    told = tmp_path / "told"
    answer = '{"memory": "1G", "pids": 77}'
    done = rcon(
        *(
            "run",
            "--timeout",
            "60s",
            *GROWS,
            "64M",
            "--swap",
            "0",
            "--group",
            "told",
            "--on-event",
            f"cat >> {told}; echo '{answer}'",
        ),
        *(
            "--",
            "sh",
            "-c",
            f"{ALLOCATE.format(40)}; {until_limit(77, 'pids.max')}",
        ),
    )
    assert done.status == 0, done
    first = events(told)[0]
    assert (first["kind"], first["group"], first["bound"]) == ("memory_limit", "told", 32 << 20)


def until_limit(value: int, *files: str) -> str:
    """Return shell code that waits until the group of the command has this limit, in one of these files.

    It ends the command with status 9 if that takes a minute, so that nothing waits for ever when the test has failed.
    """
    return f"""show() {{
    for line in $(cat /proc/self/cgroup); do
        names=${{line#*:}}; names=${{names%%:*}}; path=${{line#*:*:}}
        for file in {" ".join(files)}; do cat /sys/fs/cgroup/$names${{path%/main}}/$file 2>/dev/null; done
    done
}}
left=600
until show | grep -qx {value}; do left=$((left - 1)); [ $left -gt 0 ] || exit 9; sleep 0.1; done"""


def test_on_event_runs_outside_the_group_and_delays_nothing(tmp_path: Path) -> None:
    where = tmp_path / "where"
    began = time.monotonic()
    done = rcon(
        *("run", "--pids", "4", "--on-event", f"cat /proc/self/cgroup > {where}; exec sleep 1000"),
        *("--", "sh", "-c", FORKS),
    )
    assert time.monotonic() - began < 60
    assert done.status == 0
    assert "/work/" not in where.read_text()


@pytest.mark.once
def test_invalid_output_of_on_event_is_reported() -> None:
    done = rcon(
        *("run", "--pids", "4", "--on-event", "echo junk", "--"),
        *("sh", "-c", FORKS),
    )
    assert "rcon: --on-event: echo junk: " in done.err


def test_a_kill_during_expansion_leaves_no_process(tmp_path: Path, base: Cgroup) -> None:
    out = tmp_path / "out"
    pid = os.fork()
    if pid == 0:
        script = "echo ready; while :; do sleep 0.1; done"
        words = ["run", "--cgroup", base.path, *GROWS, "64M", "--", "sh", "-c", script]
        become_rcon(words, [out, tmp_path / "err"])
    until(lambda: out.exists() and "ready" in out.read_text(), "the command runs")
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert rcon("run", "--cgroup", base.path, "--", "true").status == 0
    assert base.children() == []
