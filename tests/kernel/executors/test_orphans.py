"""Orphans of work are reaped at once, also where process 1 reaps nothing. Each test is such a machine."""

from __future__ import annotations

import ctypes
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest

from rcon_plugins.command.job_control import Caller
from rcon_plugins.command.run import Order, run
from rcon_plugins.kernel.cgroup import Cgroup, Hierarchy, Resources
from tests.children import in_child
from tests.kernel.executors.service import ask, begin, end, managing, soon

pytestmark = pytest.mark.each_layout

T = TypeVar("T")
NEWNS, NEWPID = 0x00020000, 0x20000000
REC, PRIVATE = 16384, 1 << 18
#: 300 orphans that end. It waits for a place for the next one while there is none, but not for ever.
MAKE_ORPHANS = """
import os, time
end, made = time.monotonic() + 30, 0
while made < 300 and time.monotonic() < end:
    try:
        between = os.fork()
        if between == 0:
            try:
                os.fork()
            finally:
                os._exit(0)
        os.waitpid(between, 0)
        made += 1
    except BlockingIOError:
        time.sleep(0.01)
print("done" if made == 300 else made)
"""
RCON = Path(sys.executable).parent / "rcon"


def under_a_lazy_init(function: Callable[[], T], timeout: float = 100.0) -> T:
    """Call ``function`` in a PID namespace whose process 1 waits for that process alone, as in many containers.

    Work there below a cgroup of its own: servers outside cannot be seen from there, and would be taken for dead ones.
    """

    def outside() -> T:
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.unshare(NEWNS | NEWPID) == 0
        assert libc.mount(None, b"/", None, REC | PRIVATE, None) == 0
        reading, writing = os.pipe()
        init = os.fork()
        if init == 0:
            try:
                assert libc.mount(b"proc", b"/proc", b"proc", 0, None) == 0
                server = os.fork()
                if server == 0:
                    os.close(reading)
                    try:
                        found: Any = function()
                    except BaseException as error:
                        found = AssertionError(f"{type(error).__name__}: {error}")
                    with os.fdopen(writing, "wb") as pipe:
                        pickle.dump(found, pipe)
                    os._exit(0)
                os.waitpid(server, 0)
            finally:
                os._exit(0)
        os.close(writing)
        with os.fdopen(reading, "rb") as pipe:
            found = pickle.load(pipe)
        os.waitpid(init, 0)
        if isinstance(found, BaseException):
            raise found
        return found  # type: ignore[no-any-return]

    return in_child(outside, timeout=timeout)


def zombies() -> int:
    found = 0
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                found += (entry / "stat").read_text().rpartition(")")[2].split()[0] == "Z"
            except OSError:
                continue
    return found


def processes() -> int:
    return sum(entry.name.isdigit() for entry in Path("/proc").iterdir())


@pytest.mark.smoke
def test_orphans_of_a_request_take_no_pids_after_their_end(base: Cgroup) -> None:
    count = 100 if "RCON_TEST_EMULATED" in os.environ else 300  # more than four times its pids

    def program() -> tuple[object, str, bool]:
        with managing(
            {"pids": 24, "isolation": "process", "each": {"timeout": "60s"}}, settings={"cgroup": base.path}
        ) as manager:
            made, outcome = ask(manager, "orphans", count, 40.0)
            return made, outcome.ending, soon(lambda: zombies() == 0, 5)

    assert under_a_lazy_init(program) == (count, "ok", True)


@pytest.mark.once
def test_a_bomb_takes_its_tenant_no_pids_after_its_end(base: Cgroup) -> None:
    def program() -> list[str]:
        with managing(
            {"pids": 40, "isolation": "process", "each": {"timeout": "2s"}}, settings={"cgroup": base.path}
        ) as manager:
            ask(manager, "fork_bomb", 1.0)
            assert soon(lambda: not manager._pool.processes._ending, 20)
            assert soon(lambda: zombies() == 0, 5)
            return [ask(manager, "orphans", 5)[1].ending for _ in range(10)]

    assert under_a_lazy_init(program) == ["ok"] * 10


@pytest.mark.once
def test_a_killed_server_leaves_no_zombie_but_its_fork_server(base: Cgroup) -> None:
    """The fork server kills what is left. It reaps that, too, because process 1 does not."""

    def program() -> tuple[int, bool]:
        made, told = os.pipe()
        server = os.fork()
        if server == 0:
            policy = {"isolation": "process", "pids": 100, "each": {"timeout": "60s"}}
            with managing(policy, settings={"cgroup": base.path}) as manager:
                for _ in range(2):
                    begin(manager, "fork_bomb", 60.0)
                time.sleep(0.5)
                os.write(told, b"x")
                os.kill(os.getpid(), signal.SIGKILL)
        os.read(made, 1)
        os.waitpid(server, 0)
        soon(lambda: processes() == 2 + zombies(), 20)
        return zombies(), processes() == 2 + zombies()

    left, over = under_a_lazy_init(program)
    assert over
    assert left <= 1


@pytest.mark.once
def test_an_executor_adopts_no_orphans(base: Cgroup) -> None:
    """Otherwise os.wait() of the application would return processes that it did not make."""

    def program() -> tuple[object, int]:
        with managing({"isolation": "process"}, settings={"cgroup": base.path}) as manager:
            found = ask(manager, "adopts_orphans")[0]
            flag = ctypes.c_int(-1)
            ctypes.CDLL(None).prctl(37, ctypes.byref(flag), 0, 0, 0)
            return found, flag.value

    assert under_a_lazy_init(program) == ([0, "none"], 0)


@pytest.mark.once
def test_many_orphans_delay_no_order(base: Cgroup) -> None:
    """One tenant makes orphans as fast as it can; another's executors are spawned and killed meanwhile."""

    def program() -> tuple[list[str], float, bool]:
        policy = {"per": "host", "pids": 16, "isolation": "process", "each": {"timeout": "60s"}}
        with managing(policy, settings={"cgroup": base.path}) as manager:
            storm = begin(manager, "orphans", 10**6, 8.0, host="storm")
            time.sleep(0.5)
            endings: list[str] = []
            longest = 0.0
            for number in range(12):
                began = time.monotonic()
                admission = begin(manager, "sleep", 300, host=f"h{number}")
                endings.append(admission.abort("over").ending)
                longest = max(longest, time.monotonic() - began)
            made = end(storm)[0]
            return endings, longest, made > 2 * 16

    endings, longest, busy = under_a_lazy_init(program)
    assert endings == ["aborted"] * 12
    assert busy
    assert longest < 5


@pytest.mark.once
def test_an_executor_that_makes_the_fork_server_its_tracer_has_not_ended_when_it_stops(base: Cgroup) -> None:
    def program() -> tuple[str, str, bool]:
        with managing(
            {"isolation": "process", "each": {"timeout": "1s"}}, settings={"cgroup": base.path}
        ) as manager:
            admission = begin(manager, "stop_as_traced")
            other = ask(manager, "pid")[1].ending
            ending = end(admission)[1].ending
            return other, ending, soon(lambda: not manager._pool.processes._ending, 10)

    assert under_a_lazy_init(program) == ("ok", "timeout", True)


@pytest.mark.once
def test_a_traced_executor_does_not_stop_the_fork_server(base: Cgroup) -> None:
    """Nobody can reap it before its tracer has: a child that it left."""

    def program() -> tuple[int, list[str]]:
        policy = {"isolation": "process", "per": "host", "leave_children": True, "each": {"timeout": "60s"}}
        with managing(policy, settings={"cgroup": base.path}) as manager:
            error, outcome = ask(manager, "be_traced_by_a_child", host="traced")
            endings: list[str] = [outcome.ending]
            time.sleep(0.5)
            endings += [ask(manager, "pid", host=f"h{number}")[1].ending for number in range(5)]
            return error, endings

    error, endings = under_a_lazy_init(program)
    assert endings == ["ok"] * 6
    assert error == 0


def test_orphans_of_a_command_take_no_pids_after_their_end(base: Cgroup) -> None:

    def program() -> tuple[int, str, int]:
        command = [
            str(RCON),
            "run",
            "--cgroup",
            base.path,
            "--pids",
            "24",
            "--",
            sys.executable,
            "-c",
            MAKE_ORPHANS,
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        return done.returncode, done.stdout + done.stderr, zombies()

    assert under_a_lazy_init(program) == (0, "done\n", 0)


@pytest.mark.once
def test_an_orphan_that_ends_between_two_looks_is_reaped() -> None:
    """When all is killed, rcon reaps what has ended, then asks the kernel whether any is left that may end."""

    def program() -> str:
        caller = Caller()
        caller.adopt_orphans(lambda _: True)
        reap = caller.reap_orphans

        def end_one_afterwards() -> int:
            setattr(caller, "reap_orphans", reap)  # noqa: B010 - in a fork of this process
            reaped = reap()
            pid = os.fork()
            if pid == 0:
                os._exit(0)
            os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
            return reaped

        setattr(caller, "reap_orphans", end_one_afterwards)  # noqa: B010 - as above
        caller.reap_last_orphans()
        try:
            return f"left: {os.waitpid(-1, os.WNOHANG)}"
        except ChildProcessError:
            return "none left"

    assert in_child(program) == "none left"


@pytest.mark.once
def test_a_command_with_events_keeps_what_it_reaps_apart(tmp_path: Path, base: Cgroup) -> None:
    """The command of --on-event is a child of rcon, too, and none of the group."""
    if Hierarchy.discover().unified is None:
        pytest.skip("v1 does not tell the group of a process that has ended")
    told = tmp_path / "told"

    def program() -> tuple[int, str]:
        command = [str(RCON), "run", "--cgroup", base.path, "--pids", "24", "--on-event", f"cat >> {told}"]
        command += ["--", sys.executable, "-c", MAKE_ORPHANS]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        return done.returncode, done.stdout

    assert under_a_lazy_init(program) == (0, "done\n")


@pytest.mark.once
def test_the_caller_of_a_command_adopts_only_while_it_runs() -> None:
    def program() -> list[int]:
        flag = ctypes.c_int(-1)
        found = []
        order = Order("/bin/true", ("true",), dict(os.environb), group="one", resources=Resources())
        run(order, Hierarchy.discover())
        ctypes.CDLL(None).prctl(37, ctypes.byref(flag), 0, 0, 0)
        found.append(flag.value)
        return found

    assert in_child(program) == [0]


@pytest.mark.once
def test_threads_of_the_server_wait_for_their_own_children(base: Cgroup) -> None:
    """The server itself adopts nothing, so its own waiting is as without rcon."""

    def program() -> bool:
        with managing({"isolation": "process"}, settings={"cgroup": base.path}) as manager:
            ask(manager, "orphans", 20)
            found: list[str] = []

            def wait() -> None:
                with subprocess.Popen(["true"]) as process:
                    found.append(str(process.wait(10)))

            threads = [threading.Thread(target=wait) for _ in range(5)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            return found == ["0"] * 5

    assert under_a_lazy_init(program)
