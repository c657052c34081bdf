"""What tests/conftest.py promises of every run, tried on a small project of its own."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.children import ChildDied, in_child

TESTS = Path(__file__).resolve().parents[1]

Run = Callable[..., tuple[int, str]]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Runs pytest over one unit test with the project's own conftest; gives exit status and output."""
    (tmp_path / "tests" / "unit").mkdir(parents=True)
    for name in ("conftest.py", "children.py", "leftovers.py"):
        shutil.copy(TESTS / name, tmp_path / "tests" / name)
    shutil.copy(TESTS.parent / "pyproject.toml", tmp_path)

    def run(body: str, *arguments: str, ci: bool = False) -> tuple[int, str]:
        (tmp_path / "tests" / "unit" / "test_it.py").write_text(
            f"import os, pytest, subprocess, time\n{body}"
        )
        environment = {name: value for name, value in os.environ.items() if name != "CI"}
        done = subprocess.run(
            [sys.executable, "-m", "pytest", *(arguments or ("tests/unit",))],
            cwd=tmp_path,
            env={**environment, "CI": "true"} if ci else environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            timeout=60,
        )
        return done.returncode, done.stdout

    return run


def test_a_clean_run_passes(run: Run) -> None:
    status, output = run("def test_it(): pass")
    assert status == 0
    assert "no process and no cgroup of the tests is left" in output


def test_a_process_left_behind_fails_the_run_and_is_killed(run: Run, tmp_path: Path) -> None:
    command = 'setsid sh -c "echo \\$\\$ > pid; exec sleep 1000" & until [ -s pid ]; do sleep 0.1; done'
    status, output = run(f"def test_it():\n    subprocess.run({command!r}, shell=True)\n")
    assert status == 1
    assert "1 passed, 1 error" in output
    assert "process" in output
    assert "sleep 1000" in output
    assert not Path("/proc", (tmp_path / "pid").read_text().strip()).exists()


ONCE_IN_TWO = """
import pathlib
@pytest.mark.parametrize("number", range({}))
def test_it(number):
    seen = pathlib.Path(f"seen-{{number}}")
    if not seen.exists():
        seen.touch()
        print("said " + "before")
        raise OSError("not yet")
"""


def test_a_test_that_needs_a_second_attempt_is_named(run: Run) -> None:
    status, output = run(ONCE_IN_TWO.format(4), "--reruns", "1", "tests/unit", ci=True)
    assert status == 0
    assert "4 passed, 4 rerun" in output
    assert "tests/unit/test_it.py::test_it[3]\n" in output
    assert 'raise OSError("not yet")' in output
    assert "said before" in output


def test_many_second_attempts_fail_the_run(run: Run) -> None:
    status, output = run(ONCE_IN_TWO.format(5), "--reruns", "1", "tests/unit", ci=True)
    assert status == 1
    assert "5 tests had to be run again, of which 4 may" in output
    assert "5 passed, 1 error, 5 rerun" in output


def test_a_test_that_fails_twice_fails_the_run(run: Run) -> None:
    status, output = run("def test_it(): raise OSError", "--reruns", "1", "tests/unit")
    assert status == 1
    assert "1 failed, 1 rerun" in output


def test_a_second_attempt_that_hangs_is_ended_too(run: Run) -> None:
    body = "def test_it(): time.sleep(30)"
    status, output = run(body, "--reruns", "1", "-o", "timeout=1", "tests/unit")
    assert status == 1
    assert "1 failed, 1 rerun" in output


def test_workers_of_xdist_run_all_but_what_measures(run: Run, tmp_path: Path) -> None:
    body = "@pytest.mark.measures\ndef test_alone(): pass\ndef test_one(): pass\ndef test_two(): pass\n"
    status, output = run(body, "-n", "2", "tests/unit")
    assert status == 1
    assert "it measures CPU time or IO, so it runs alone; with -n, add: -m 'not measures'" in output
    assert "2 passed, 1 error" in output
    assert "no process and no cgroup of the tests is left" in output
    assert run(body, "-n", "2", "-m", "not measures", "tests/unit")[0] == 0


def test_in_ci_a_skip_is_a_failure(run: Run) -> None:
    body = "def test_it(): pytest.skip('no kernel')\n@pytest.mark.xfail\ndef test_known(): raise OSError\n"
    assert run(body)[0] == 0
    status, output = run(body, ci=True)
    assert status == 1
    assert "in CI a skip is a failure" in output
    assert "1 failed, 1 xfailed" in output
    assert run("pytest.importorskip('there_is_no_such')", ci=True)[0] != 0


def test_in_ci_an_empty_tier_is_an_error(run: Run) -> None:
    assert run("def test_it(): pass", "tests")[0] == 0
    status, output = run("def test_it(): pass", "tests", ci=True)
    assert status == pytest.ExitCode.USAGE_ERROR
    assert "no test was found in: contract, integrations, kernel" in output


def test_a_test_of_another_layout_is_deselected(run: Run) -> None:
    status, output = run(
        "@pytest.mark.layout('none')\ndef test_it(): raise OSError\ndef test_other(): pass", ci=True
    )
    assert status == 0
    assert "1 passed, 1 deselected" in output


def test_kernel_tests_are_marked_in_their_tier_only(run: Run) -> None:
    status, output = run("@pytest.mark.kernel\ndef test_it(): pass")
    assert status == pytest.ExitCode.USAGE_ERROR
    assert "not in tests/kernel" in output


def test_a_child_returns() -> None:
    assert in_child(os.getpid) != os.getpid()
    assert len(in_child(bytes, 3_000_000)) == 3_000_000


def test_a_child_raises() -> None:
    class Odd(Exception):
        """Does not pickle."""

    def odd() -> None:
        raise Odd("strange")

    with pytest.raises(ZeroDivisionError):
        in_child(divmod, 1, 0)
    with pytest.raises(RuntimeError, match="strange"):
        in_child(odd)


def test_a_child_dies() -> None:
    with pytest.raises(ChildDied) as left:
        in_child(os._exit, 3)
    assert (left.value.status, left.value.signal) == (3, None)
    with pytest.raises(ChildDied) as killed:
        in_child(lambda: os.kill(os.getpid(), signal.SIGKILL))
    assert (killed.value.status, killed.value.signal) == (None, signal.SIGKILL)


def test_a_child_that_is_late_is_killed() -> None:
    with pytest.raises(TimeoutError):
        in_child(time.sleep, 1000, timeout=0.1)


def test_a_grandchild_does_not_hold_up_the_answer() -> None:
    def leave() -> int:
        reading, writing = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(writing)
            os.read(reading, 1)  # until its parent has ended
            os._exit(0)
        return pid

    assert in_child(leave) > 0
