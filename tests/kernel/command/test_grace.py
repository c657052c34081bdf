"""rcon run --grace and rcon kill --grace: SIGTERM to all of the group, and SIGKILL to what is left after the grace."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.kernel.command.harness import rcon, until
from tests.processes import alive

pytestmark = pytest.mark.each_layout

#: A shell that ends by itself after SIGTERM, and says when.
TIDY = "trap 'echo tidy >> {0}; exit 0' TERM; echo $$ >> {1}; while :; do sleep 0.1; done"
DEAF = "trap '' TERM; echo $$ >> {1}; while :; do sleep 0.1; done"


@pytest.mark.smoke
def test_a_command_that_ends_in_its_grace(tmp_path: Path) -> None:
    script = TIDY.format(tmp_path / "said", tmp_path / "pid")
    began = time.monotonic()
    done = rcon("run", "--timeout", "3s", "--grace", "60s", "--", "sh", "-c", script)
    assert time.monotonic() - began < 60
    assert (tmp_path / "said").read_text() == "tidy\n"
    assert done.status == 137
    assert done.err.splitlines()[-1] == "rcon: wall time limit 3 s reached; ended within the grace of 60 s"
    report = done.report
    assert (report["outcome"], report["limit"], report["status"]) == ("timeout", "timeout", 137)
    assert (report["needed_kill"], report["signal"]) == (False, None)


def test_a_command_that_does_not_end_in_its_grace(tmp_path: Path) -> None:
    began = time.monotonic()
    done = rcon(
        *("run", "--timeout", "3s", "--grace", "1s"), "--", "sh", "-c", DEAF.format("", tmp_path / "pid")
    )
    assert time.monotonic() - began >= 4
    assert done.status == 137
    assert done.err.splitlines()[-1] == "rcon: wall time limit 3 s reached; killed after the grace of 1 s"
    assert (done.report["outcome"], done.report["needed_kill"], done.report["signal"]) == ("timeout", True, 9)


def test_what_the_command_started_has_the_grace_too(tmp_path: Path) -> None:
    """The shell ends at SIGTERM, its children in other sessions take some time; one of them is stopped."""
    said, pids = tmp_path / "said", tmp_path / "pids"
    child = f"setsid sh -c '{TIDY.format(said, pids).replace(chr(39), chr(34))}' &"
    script = (
        f"{child} {child} until [ $(wc -l < {pids} || echo 0) = 2 ]; do sleep 0.1; done 2>/dev/null;"
        f" kill -STOP $(head -1 {pids}); echo ready >> {pids}; sleep 1000"
    )
    done = rcon("run", "--timeout", "8s", "--grace", "60s", "--", "sh", "-c", script)
    *numbers, ready = pids.read_text().split()
    assert ready == "ready"
    assert said.read_text() == "tidy\ntidy\n"
    assert not any(alive(int(number)) for number in numbers)
    assert (done.report["outcome"], done.report["needed_kill"]) == ("timeout", False)
    assert done.report["signal"] == signal.SIGTERM


@pytest.mark.once
def test_a_stopped_command_handles_the_signal(tmp_path: Path) -> None:
    said = tmp_path / "said"
    script = f"trap 'echo tidy > {said}; exit 0' TERM; kill -STOP $$; sleep 1000"
    done = rcon("run", "--timeout", "3s", "--grace", "60s", "--", "sh", "-c", script)
    assert said.read_text() == "tidy\n"
    assert (done.status, done.report["needed_kill"]) == (137, False)


def test_forks_do_not_extend_the_grace() -> None:
    bomb = "trap '' TERM; b() { b | b & }; while :; do sleep 0.01 & sleep 0.01; done"
    began = time.monotonic()
    done = rcon("run", "--pids", "30", "--timeout", "2s", "--grace", "1s", "--", "sh", "-c", bomb)
    assert time.monotonic() - began < 30
    assert (done.status, done.report["outcome"], done.report["needed_kill"]) == (137, "timeout", True)


@pytest.mark.once
def test_a_command_that_ends_before_its_timeout_has_no_grace() -> None:
    done = rcon("run", "--timeout", "60s", "--grace", "5s", "--", "sh", "-c", "exit 3")
    assert (done.status, done.err, done.report["needed_kill"]) == (3, "", None)


@pytest.mark.once
@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            ("--grace", "5s"),
            "rcon: --grace needs a timeout to begin at (add --timeout 20s, or leave it out; ",
        ),
        (("--timeout", "5s", "--grace", "5"), "rcon: --grace: '5' is not a length of time"),
    ],
)
def test_a_grace_that_is_refused(options: tuple[str, ...], said: str) -> None:
    done = rcon("run", *options, "--", "true")
    assert done.status == 2
    assert done.err.startswith(said)
    assert done.err.count("\n") == 1


@pytest.mark.once
def test_the_grace_of_a_policy(tmp_path: Path) -> None:
    settings = tmp_path / "rcon.toml"
    settings.write_text('[policy.batch]\neach = { timeout = "3s", grace = "60s" }\n')
    done = rcon(
        *("run", "--policy", "batch", "--settings", settings, "--"),
        *("sh", "-c", TIDY.format(tmp_path / "said", tmp_path / "pid")),
    )
    assert (done.status, done.report["outcome"], done.report["needed_kill"]) == (137, "timeout", False)
    assert done.report["detail"] == "wall time limit 3 s reached; ended within the grace of 60 s"
    # The option comes first.
    words = ("run", "--policy", "batch", "--settings", settings, "--grace", "500ms", "--")
    done = rcon(*words, "sh", "-c", DEAF.format("", tmp_path / "pid"))
    assert (done.status, done.report["needed_kill"]) == (137, True)


def test_rcon_kill_with_a_grace(tmp_path: Path) -> None:
    """One process ends by itself, in the next group one has to be killed; a frozen one handles SIGTERM."""
    said, pids = tmp_path / "said", tmp_path / "pids"
    for script, frozen, needed in ((TIDY, False, False), (TIDY, True, False), (DEAF, False, True)):
        pids.unlink(missing_ok=True)
        group = f"grace-{os.getpid()}"
        command = os.fork()
        if command == 0:
            rcon("run", "--group", group, "--", "sh", "-c", script.format(said, pids))
            os._exit(0)
        until(lambda: pids.exists() and pids.read_text(), "the shell runs")
        if frozen:
            assert rcon("freeze", group).status == 0
        grace = "1s" if needed else "60s"
        done = rcon("kill", "--grace", grace, "--json", group)
        assert done.status == 0, done.err
        answer = json.loads(done.out)
        assert answer["needed_kill"] is needed
        assert int(pids.read_text()) in [one["pid"] for one in answer["killed"]]
        assert not alive(int(pids.read_text()))
        os.waitpid(command, 0)
    assert said.read_text() == "tidy\n" * 2


@pytest.mark.once
def test_rcon_kill_says_how_they_ended() -> None:
    group = f"grace-{os.getpid()}"
    with subprocess.Popen(["sleep", "1000"]) as sleeper:
        assert rcon("attach", "--group", group, "--pids", "5", str(sleeper.pid)).status == 0
        done = rcon("kill", "--grace", "60s", group)
        assert sleeper.wait() == -signal.SIGTERM
    assert done.out == f"{group}: 1 process ended within 60s\n  {sleeper.pid}  sleep 1000\n"
    assert rcon("kill", "--grace", "junk", group).err.startswith("rcon: ")
