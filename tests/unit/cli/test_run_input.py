"""Bad usage of rcon run and rcon attach: one line with the option and a remedy, status 2, and nothing is made."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from rcon_plugins.cli.rcon import run_main
from rcon_plugins.cli.run import execution
from rcon_plugins.cli.run.commands import attach, run
from rcon_plugins.settings.limit_table import OPTIONS

LIMITS = {
    "--cpu": ["", "x", "30", "0%"],
    "--cpu-burst": ["", "x", "30", "30ms"],
    "--cpu-weight": ["", "x", "0", "10001"],
    "--cpus": ["", "x", "3-1", "60000"],
    "--memory": ["", "x", "64MB", "-1", "1"],
    "--memory-high": ["", "x", "64M"],
    "--expand": ["", "x", "2x"],
    "--up-to": ["", "x", "1G"],
    "--swap": ["", "x", "-1"],
    "--read": ["", "x"],
    "--write": ["", "5 MB/s"],
    "--read-iops": ["", "x", "0"],
    "--write-iops": ["", "x", "-1"],
    "--pids": ["", "x", "0"],
    "--device": ["", "/"],
}
NAMES = ["", ".", "..", "a/b", "/", "nul\0", "-x", "rcon-1-2", "cpu.max", "tasks", "x" * 300, "line\nfeed"]
BASES = ["", "rcon", "/", "/a/../b", "/a//b", "/sys/fs/cgroup/rcon", "/nul\0", "/line\nfeed"]
RUN = {
    **LIMITS,
    "--cgroup": BASES,
    "--user": ["", "no-such-user", "4294967295", "70000"],
    "--cap": ["no_such_capability", "64", "net_raw,x"],
    "--group": NAMES,
    "--in": NAMES,
    "--policy": ["", "job"],
    "--settings": ["", "/no/such/file"],
    "--timeout": ["", "x", "20", "0s", "-1s"],
    "--grace": ["", "x", "5", "5s", "0s"],
    "--oom": ["", "x", "Group"],
    "--on-event": ["", " "],
    "--json": ["", "/no/such/folder/file", "/"],
}
ATTACH = {**LIMITS, "--cgroup": BASES, "--group": NAMES}


def one_line(capfd: pytest.CaptureFixture[str]) -> str:
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith("rcon: ")
    assert err.endswith("\n")
    assert err.count("\n") == 1
    return err


@pytest.mark.parametrize(("flag", "value"), [(flag, value) for flag in RUN for value in RUN[flag]])
def test_junk_for_each_option_of_run(
    flag: str, value: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    made = tmp_path / "made"
    assert run_main(["run", flag, value, "--", "touch", str(made)]) == 2
    message = one_line(capfd)
    assert flag in message or (flag in ("--user", "--cap") and value.rpartition(",")[2] in message), message
    assert "(" in message
    assert not made.exists()


def test_a_fifo_without_a_reader_is_refused_at_once(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    made, fifo = tmp_path / "made", tmp_path / "fifo"
    os.mkfifo(fifo)
    assert run_main(["run", "--json", str(fifo), "--", "touch", str(made)]) == 2
    assert "no process reads this FIFO (start its reader first" in one_line(capfd)
    assert not made.exists()


def test_a_fifo_with_a_reader_is_opened_blocking(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    reader = os.open(tmp_path / "fifo", os.O_RDONLY | os.O_NONBLOCK)
    report = execution.report_of({"json": str(tmp_path / "fifo")})
    assert report is not None
    assert os.get_blocking(report)
    os.write(report, b"x")
    assert os.read(reader, 2) == b"x"
    os.close(report)
    os.close(reader)


@pytest.mark.parametrize(("flag", "value"), [(flag, value) for flag in ATTACH for value in ATTACH[flag]])
def test_junk_for_each_option_of_attach(flag: str, value: str, capfd: pytest.CaptureFixture[str]) -> None:
    with subprocess.Popen(["sleep", "1000"]) as sleeper:
        try:
            before = Path("/proc", str(sleeper.pid), "cgroup").read_text()
            assert run_main(["attach", flag, value, str(sleeper.pid)]) == 2
            assert Path("/proc", str(sleeper.pid), "cgroup").read_text() == before
        finally:
            sleeper.kill()
    assert "(" in one_line(capfd)


def test_junk_in_the_environment(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = tmp_path / "made"
    monkeypatch.setenv("RCON_CGROUP", "rcon")
    assert run_main(["run", "--", "touch", str(made)]) == 2
    assert one_line(capfd).startswith("rcon: RCON_CGROUP: 'rcon' is not the path of a cgroup (")
    assert not made.exists()


def test_every_option_is_tried() -> None:
    flags = {option.flag for option in OPTIONS}
    assert flags <= set(LIMITS)
    for command, tried in ((run, RUN), (attach, ATTACH)):
        named = {one for parameter in command.params for one in parameter.opts if one.startswith("--")}
        assert named - {"--children", "--release", "--export-cpus"} == set(tried)


@pytest.mark.parametrize(
    "words", [["run"], ["run", "--"], ["run", "--", ""], ["run", "--no-such", "--", "true"]]
)
def test_a_missing_command_is_refused(words: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    assert run_main(words) == 2
    one_line(capfd)


@pytest.mark.parametrize(
    ("program", "status"), [("no-such-program", 127), ("./no/such", 127), ("/etc/passwd", 126), ("/", 126)]
)
def test_a_program_that_cannot_be_executed(
    program: str, status: int, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run_main(["run", "--", program]) == status
    one_line(capfd)


def ended() -> str:
    process = subprocess.Popen(["true"])
    process.wait()
    return str(process.pid)


@pytest.mark.parametrize(
    "words",
    [[], ["0"], ["-1"], ["x"], ["1"], ["4194305"], ["9" * 30], ["1.5"], ["itself"], ["ended"]],
    ids=str,
)
def test_processes_that_cannot_be_attached(words: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    pids = {"itself": lambda: str(os.getpid()), "ended": ended}
    words = [pids[word]() if word in pids else word for word in words]
    assert run_main(["attach", "--cpu", "50%", *words]) == 2
    one_line(capfd)


@pytest.mark.parametrize(
    "words", [["no-such-group"], ["a/b"], ["ended"], ["--cpu", "5%", "x"], ["--children", "x"]]
)
def test_release_refuses_other_names(words: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    words = [ended() if word == "ended" else word for word in words]
    assert run_main(["attach", "--release", *words]) == 2
    one_line(capfd)
