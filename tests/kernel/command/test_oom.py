"""rcon run: processes that the OOM killer ends are counted and named, whatever the command answers."""

from __future__ import annotations

import pytest

from tests.kernel.command.harness import rcon

#: A child that needs more than it may have. The shell survives it, as oom = "process" says.
CHILD = "sh -c 'x=$(head -c 200M /dev/zero | tr \"\\0\" x)'"
LIMITED = ("run", "--memory", "50M", "--swap", "0")

pytestmark = pytest.mark.each_layout


@pytest.mark.smoke
def test_a_command_that_survives_an_oom_kill_does_not_end_silently() -> None:
    done = rcon(*LIMITED, "--", "sh", "-c", f"{CHILD}; exit 0")
    assert (done.status, done.report["outcome"], done.report["limit"]) == (0, "ok", None)
    kills = done.report["usage"]["oom_kills"]
    assert kills >= 1
    killed = "1 process was" if kills == 1 else f"{kills} processes were"
    assert done.report["detail"] == f"{killed} killed at the memory limit"
    assert done.err.splitlines()[-1] == f"rcon: sh: {killed} killed at the memory limit"


def test_a_timeout_after_an_oom_kill_names_it() -> None:
    done = rcon(*LIMITED, "--timeout", "5s", "--", "sh", "-c", f"{CHILD}; sleep 60")
    assert done.report["outcome"] == "timeout"
    assert done.report["detail"].startswith("wall time limit 5 s reached; ")
    assert done.report["detail"].endswith(" killed at the memory limit")
    assert done.err.splitlines()[-1] == f"rcon: {done.report['detail']}"


def test_a_signal_after_an_oom_kill_names_it() -> None:
    done = rcon(*LIMITED, "--", "sh", "-c", f"{CHILD}; kill -INT $$")
    assert done.report["outcome"] == "killed"
    assert done.err.splitlines()[-1].endswith(" killed at the memory limit")


def test_without_an_oom_kill_the_count_is_zero() -> None:
    done = rcon(*LIMITED, "--", "true")
    assert (done.report["usage"]["oom_kills"], done.report["detail"], done.err) == (0, "", "")
