"""rcon run: an OOM kill ends the whole command or one process, and is counted and named, whatever the ending."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from rcon_plugins.errors import MORE_PROCESSES
from rcon_plugins.kernel.cgroup import Cgroup, Hierarchy, Resources
from tests.kernel.command.harness import ALLOCATE, rcon, terminal

#: A child that needs more than it may have. It is one process: if others asked for memory while it is being killed, the
#: kernel could kill one of them, too.
CHILD = ALLOCATE.format(64)
LIMITED = ("run", "--memory", "24M", "--swap", "0")
ONE = ("--oom", "process")

pytestmark = pytest.mark.each_layout


@pytest.mark.smoke
def test_an_oom_kill_ends_the_whole_command() -> None:
    began = time.monotonic()
    done = rcon(*LIMITED, "--timeout", "50s", "--", "sh", "-c", f"{CHILD} & sleep 100")
    assert time.monotonic() - began < 40
    assert (done.status, done.report["outcome"], done.report["limit"]) == (137, "memory", "memory")
    assert done.report["usage"]["oom_kills"] >= 1
    assert done.err.splitlines()[-1].startswith("rcon: memory limit 24 MiB reached (peak 24.0 MiB)")


def test_what_a_survivor_answers_is_not_taken() -> None:
    for _ in range(5):
        done = rcon(*LIMITED, "--", "sh", "-c", f"{CHILD}; exit 0")
        assert (done.status, done.report["outcome"], done.report["limit"]) == (137, "memory", "memory")


def test_a_command_that_survives_an_oom_kill_does_not_end_silently() -> None:
    done = rcon(*LIMITED, *ONE, "--", "sh", "-c", f"{CHILD}; exit 0")
    assert (done.status, done.report["outcome"], done.report["limit"]) == (0, "ok", None)
    kills = done.report["usage"]["oom_kills"]
    assert kills >= 1
    killed = "1 process was" if kills == 1 else f"{kills} processes were"
    assert done.report["detail"] == f"{killed} killed at the memory limit"
    assert done.err.splitlines()[-1] == f"rcon: sh: {killed} killed at the memory limit"


@pytest.mark.once
def test_on_a_terminal_a_shell_survives_what_it_runs() -> None:
    with terminal(*LIMITED, "--", "sh", "-c", f"{CHILD}; echo survived; exit 3") as shell:
        assert shell.event() == "ended 3"
        assert "survived" in shell.rest()
    with terminal(*LIMITED, "--oom", "group", "--", "sh", "-c", f"{CHILD}; echo survived; exit 3") as shell:
        assert shell.event() == "ended 137"
        assert "survived" not in shell.rest()


@pytest.mark.once
def test_a_timeout_after_an_oom_kill_names_it() -> None:
    done = rcon(*LIMITED, *ONE, "--timeout", "10s", "--", "sh", "-c", f"{CHILD}; sleep 60")
    assert done.report["outcome"] == "timeout"
    assert done.report["detail"].startswith("wall time limit 10 s reached; ")
    assert done.report["detail"].endswith(" killed at the memory limit")
    assert done.err.splitlines()[-1] == f"rcon: {done.report['detail']}"


@pytest.mark.once
def test_a_signal_after_an_oom_kill_names_it() -> None:
    done = rcon(*LIMITED, *ONE, "--", "sh", "-c", f"{CHILD}; kill -INT $$")
    assert done.report["outcome"] == "killed"
    assert done.err.splitlines()[-1].endswith(" killed at the memory limit")


def test_without_an_oom_kill_the_count_is_zero() -> None:
    done = rcon(*LIMITED, "--", "true")
    assert (done.report["usage"]["oom_kills"], done.report["detail"], done.err) == (0, "", "")


@pytest.mark.once
@pytest.mark.parametrize(
    ("oom", "flags", "ending"),
    [
        ("", (), "memory"),
        ("process", (), "ok"),
        ("process", ("--oom", "group"), "memory"),
        ("group", ONE, "ok"),
    ],
)
def test_of_a_policy(tmp_path: Path, oom: str, flags: tuple[str, ...], ending: str) -> None:
    settings = tmp_path / "rcon.toml"
    key = f'oom = "{oom}"\n' if oom else ""
    settings.write_text(f'[policy.job]\n{key}each = {{ memory = "24M", swap = 0 }}\n')
    policy = ("--policy", "job", "--settings", settings)
    done = rcon("run", *policy, *flags, "--", "sh", "-c", f"{CHILD}; exit 0")
    assert done.report["outcome"] == ending, done
    assert done.report["usage"]["oom_kills"] >= 1


def test_a_kill_in_a_cgroup_that_the_command_made_ends_all() -> None:
    """On v1 the kernel counts it there alone."""
    memory = Hierarchy.discover().mount_of("memory")
    assert memory is not None
    inside = ""
    if memory.version == 1:
        own = f"{memory.path}$(sed -n 's/^[0-9]*:memory://p' /proc/self/cgroup)/x"
        inside = f'own="{own}"; mkdir "$own" && echo $$ >"$own/cgroup.procs" || exit 9; '
    for _ in range(3):
        done = rcon(*LIMITED, "--", "sh", "-c", f"{inside}{CHILD}; exit 0")
        assert (done.status, done.report["outcome"], done.report["limit"]) == (137, "memory", "memory")
        assert done.report["usage"]["oom_kills"] >= 1


@pytest.mark.once
@pytest.mark.layout("v1", "hybrid")
def test_without_room_for_its_thread_nothing_runs(group: Cgroup) -> None:
    """Where rcon ends the command itself after an OOM kill, that takes a thread, which counts as a process."""
    group.configure(Resources(pids_max=2))  # rcon, and its child until that is in its own group
    done = rcon(*LIMITED, "--", "true", before=group.enter_process)
    assert done.status == 125
    assert done.err == (
        f"rcon: the thread oom-guard could not be started: can't start new thread ({MORE_PROCESSES})\n"
    )
