"""Fork hooks of the application (os.register_at_fork), and what it starts in each executor process."""

from __future__ import annotations

import _thread
import concurrent.futures.thread
import ctypes
import gc
import logging
import logging.handlers
import os
import queue
import random
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from rcon_plugins import Manager, Policy, hookimpl
from rcon_plugins.errors import ConfinementError, RconError, SettingsError
from rcon_plugins.executors.channel import FAILED
from rcon_plugins.kernel import fork_hooks, namespaces, seccomp
from rcon_plugins.kernel.capability import set_no_new_privs
from rcon_plugins.kernel.cgroup import Hierarchy
from rcon_plugins.kernel.events import watcher_of_process
from rcon_plugins.kernel.proc import thread_count
from rcon_plugins.settings.file import from_mapping
from tests.children import in_child
from tests.kernel.executors import service
from tests.kernel.executors.service import ask, managing, soon

USER = 61000 + os.getpid() % 1000
POLICY = {"user": USER, "group": USER, "pids": 16, "each": {"timeout": "60s"}}
#: What hooks saw, in the process that looks.
SEEN: list[Any] = []


def seen() -> list[Any]:
    return SEEN


def threads_now() -> int:
    return len(list(Path("/proc/self/task").iterdir()))


def logged_lines() -> list[str]:
    """What rcon logs from now on in this process."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("rcon")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    return lines


def count_for_ever() -> None:
    """A thread that the module threading does not know."""
    while True:
        time.sleep(0.01)


def sleeper() -> threading.Thread:
    return threading.Thread(target=time.sleep, args=(60,), daemon=True)


def act(name: str, function: Callable[..., Any]) -> None:
    """Add to what work may be asked to do."""
    setattr(service.Acts, name, staticmethod(function))


def started() -> None:
    SEEN.append("started")


def fails() -> None:
    raise LookupError("no database")


NOT_CALLABLE = 1


def in_own_process(program: Callable[[], Any]) -> Any:
    """Hooks stay as long as the process does."""

    def prepared() -> Any:
        act("seen", seen)
        return program()

    return in_child(prepared)


@pytest.mark.smoke
@pytest.mark.each_layout
def test_hooks_for_a_child_run_once_in_each_executor_when_it_is_confined() -> None:
    def program() -> tuple[Any, ...]:
        os.register_at_fork(
            before=lambda: SEEN.append(("before", os.getpid())),
            after_in_parent=lambda: SEEN.append(("parent", os.getpid())),
            after_in_child=lambda: SEEN.append(
                ("child", os.getpid(), os.getuid(), threads_now(), Path("/proc/self/cgroup").read_text())
            ),
        )
        with managing(POLICY) as manager:
            in_host = list(SEEN)
            in_executor, _ = ask(manager, "seen")
            pid, _ = ask(manager, "pid")
            after_work, _ = ask(manager, "seen")
            return os.getpid(), in_host, in_executor, pid, after_work == in_executor, list(SEEN) == in_host

    host, in_host, in_executor, pid, unchanged, none_later = in_own_process(program)
    assert in_host == [("before", host), ("parent", host)]
    cgroups = in_executor[1][4]
    assert in_executor == [["before", host], ["child", pid, USER, 1, cgroups]]
    assert "/work/" in cgroups
    assert unchanged
    assert none_later


def test_a_thread_that_a_hook_starts_serves_in_the_executor_and_counts_as_its_own() -> None:
    def program() -> tuple[Any, ...]:
        os.register_at_fork(after_in_child=lambda: sleeper().start())
        with managing({**POLICY, "max_uses": 9}) as manager:
            pids = {ask(manager, "pid")[0] for _ in range(3)}
            server = manager.fork_server_pid
            assert server is not None
            return len(pids), thread_count(pids.pop()), thread_count(server)

    assert in_own_process(program) == (1, 2, 1)


def test_hooks_that_belong_together_stay_so() -> None:
    """A lock that is taken before the fork and released after it, in the parent and in the child."""

    def program() -> tuple[Any, ...]:
        lock = threading.Lock()
        complaints: list[str] = []
        sys.unraisablehook = lambda event: complaints.append(str(event.exc_value))
        os.register_at_fork(before=lock.acquire, after_in_parent=lock.release, after_in_child=lock.release)
        act("is_locked", lambda: (lock.locked(), complaints))
        with managing(POLICY) as manager:
            return lock.locked(), complaints, ask(manager, "is_locked")[0]

    assert in_own_process(program) == (False, [], [False, []])


def test_what_a_hook_raises_is_reported_as_python_does_and_the_next_one_runs() -> None:
    def program() -> Any:
        sys.unraisablehook = lambda event: SEEN.append(
            (type(event.exc_value).__name__, getattr(event.exc_value, "__notes__", []))
        )
        os.register_at_fork(after_in_child=fails)
        os.register_at_fork(after_in_child=lambda: SEEN.append("next"))
        with managing(POLICY) as manager:
            return ask(manager, "seen")[0]

    (kind, (note,)), following = in_own_process(program)
    assert kind == "LookupError"
    assert note.startswith("raised by the fork hook <function fails")
    assert following == "next"


def test_a_fork_of_confined_code_runs_all_hooks() -> None:
    def fork_again() -> list[Any]:
        reading, writing = os.pipe()
        if os.fork() == 0:
            os.write(writing, str(SEEN[-1][1] == os.getpid()).encode())
            os._exit(0)
        os.wait()
        return [[one[0] for one in SEEN], os.read(reading, 10).decode()]

    def program() -> Any:
        os.register_at_fork(
            before=lambda: SEEN.append(("before", os.getpid())),
            after_in_parent=lambda: SEEN.append(("parent", os.getpid())),
            after_in_child=lambda: SEEN.append(("child", os.getpid())),
        )
        act("fork_again", fork_again)
        with managing(POLICY) as manager:
            return ask(manager, "fork_again")[0]

    assert in_own_process(program) == [["before", "child", "before", "parent"], "True"]


def test_the_hooks_of_the_standard_library_run_where_python_runs_them() -> None:
    def state() -> list[Any]:
        logging.getLogger("locks").debug("usable")
        return [random.getrandbits(64), threading.main_thread() is threading.current_thread()]

    def program() -> Any:
        random.seed(1)
        act("state", state)
        with managing({**POLICY, "max_uses": 1}) as manager:
            return [ask(manager, "state")[0] for _ in range(3)]

    found = in_own_process(program)
    assert len({number for number, _ in found}) == 3
    assert all(is_main for _, is_main in found)


def test_the_collector_runs_no_code_of_the_application_before_the_process_is_confined() -> None:
    class Cycle:
        def __init__(self) -> None:
            self.me = self

        def __del__(self) -> None:
            SEEN.append([os.getpid(), os.getuid()])

    def collect() -> list[Any]:
        enabled = gc.isenabled()
        Cycle()
        gc.collect()
        return [enabled, SEEN]

    def program() -> Any:
        Cycle()
        os.register_at_fork(after_in_child=lambda: SEEN.append("confined"))
        gc.callbacks.append(lambda *_: SEEN.append([os.getpid(), os.getuid()]))
        with managing(POLICY) as manager:
            return os.getpid(), ask(manager, "collect")[0]

    act("collect", collect)
    host, (enabled, in_executor) = in_own_process(program)
    assert enabled
    assert in_executor[0] == [host, 0]
    first, *others = [one for one in in_executor if one[0] != host]
    assert first == "confined"
    assert len(others) >= 3
    assert {uid for _, uid in others} == {USER}


def test_the_trial_of_namespaces_runs_no_hook() -> None:
    def program() -> list[Any]:
        for when in ("before", "after_in_parent", "after_in_child"):
            os.register_at_fork(**{when: lambda when=when: SEEN.append(when)})
        found = namespaces.why_not()
        assert found is None or "cap_sys_admin" in found
        during = list(SEEN)
        pid = os.fork()
        if pid == 0:
            os._exit(SEEN[-1] != "after_in_child")
        return [during, SEEN, os.waitpid(pid, 0)[1]]

    assert in_own_process(program) == [[], ["before", "after_in_parent"], 0]


def test_threads_of_the_fork_server_refuse_the_start() -> None:
    """A library in C starts one in its own handler of forks: pthread_atfork(3)."""

    def program() -> str:
        library = ctypes.CDLL(None)
        made = ctypes.c_ulong()

        def start_a_thread() -> None:
            if os.getpid() != host:
                library.pthread_create(ctypes.byref(made), None, library.pause, None)

        host = os.getpid()
        handler = ctypes.CFUNCTYPE(None)(start_a_thread)
        library.__register_atfork(None, None, handler, None)
        try:
            with managing({"isolation": "process", "shared_memory": "server"}):
                return "started"
        except ConfinementError as error:
            return str(error)

    found = in_own_process(program)
    assert "policy p: no executor process can serve" in found
    assert "a library started threads in the fork server" in found
    assert found.count("(") == 1  # the number and name of the thread


class Handler(logging.Handler):
    """An object of the application, of a class of its own."""

    def reset(self) -> None:
        """Do nothing."""


@pytest.mark.parametrize(
    ("function", "of_application"),
    [
        (lambda: 1, True),
        (threading.Lock().acquire, True),
        (partial(random.seed, 1), True),
        (Handler().reset, True),
        (logging.handlers.QueueListener(queue.Queue()).start, True),
        (gc.enable, True),
        (random.seed, False),  # a method of the generator that the module has
        (vars(threading)["_after_fork"], False),
        (concurrent.futures.thread._global_shutdown_lock.release, False),
        (watcher_of_process, False),
        (Hierarchy.discover, True),
    ],
)
def test_who_registered_a_hook(function: Any, of_application: bool) -> None:
    assert fork_hooks.is_of_application(function) is of_application


@pytest.mark.parametrize("frozen", [False, True])
def test_hooks_are_found_when_objects_are_frozen(frozen: bool) -> None:
    """The collector leaves frozen objects out when it looks for the lists."""

    def program() -> tuple[Any, ...]:
        os.register_at_fork(after_in_child=lambda: SEEN.append(os.getuid()))
        gc.unfreeze()  # tests/conftest.py freezes what pytest keeps
        if frozen:
            gc.freeze()
        with managing(POLICY) as manager:
            return ask(manager, "seen")[0], SEEN, gc.get_freeze_count() > 0

    assert in_own_process(program) == ([USER], [], frozen)


def test_a_hook_that_is_registered_meanwhile_stays() -> None:
    def program() -> list[str]:
        os.register_at_fork(after_in_child=lambda: SEEN.append("first"))
        with fork_hooks.postponed():
            os.register_at_fork(after_in_child=lambda: SEEN.append("second"))
        reading, writing = os.pipe()
        if os.fork() == 0:
            os.write(writing, " ".join(SEEN).encode())
            os._exit(0)
        os.wait()
        return os.read(reading, 100).decode().split()

    assert in_own_process(program) == ["first", "second"]


def test_what_a_plugin_registers_in_the_fork_server_runs_nowhere() -> None:
    class Loads:
        @hookimpl
        def rcon_prepare(self) -> None:
            os.register_at_fork(after_in_child=lambda: SEEN.append(os.getuid()))

    def program() -> Any:
        with managing({**POLICY, "max_uses": 1}, plugins=[Loads()]) as manager:
            return [ask(manager, "seen")[0] for _ in range(3)]

    assert in_own_process(program) == [[], [], []]


def test_a_thread_that_a_plugin_starts_in_the_fork_server_refuses_the_start() -> None:
    class Starts:
        @hookimpl
        def rcon_prepare(self) -> None:
            sleeper().start()

    def program() -> str:
        try:
            with managing(POLICY, plugins=[Starts()]):
                return "started"
        except ConfinementError as error:
            return str(error)

    assert "a library started threads in the fork server" in in_own_process(program)


@pytest.mark.each_layout
@pytest.mark.parametrize("refused", [False, True])
def test_executors_begin_in_their_cgroup_or_move_there_and_the_log_says_so(refused: bool) -> None:
    """A container's filter refuses clone3."""

    def program() -> tuple[Any, ...]:
        lines = logged_lines()
        if refused:
            set_no_new_privs()
            seccomp.forbid_leaving_cgroups()
        with managing({**POLICY, "max_uses": 1}) as manager:
            cgroups = [ask(manager, "cgroup")[0] for _ in range(3)]
            usage = ask(manager, "allocate", 20)[1].usage
            return cgroups, usage.memory_peak or 0, sum("15 ms longer" in line for line in lines)

    act("cgroup", lambda: Path("/proc/self/cgroup").read_text())
    cgroups, peak, told = in_own_process(program)
    for lines in cgroups:
        paths = {line.split(":", 2)[2] for line in lines.splitlines()}
        assert sum("/work/p/" in path for path in paths) == 1
        assert "0::/" not in lines.replace("0::/rcon", "")
    assert peak >= 20 * 2**20
    assert told == refused


def test_threads_of_the_application_that_executors_lack_are_named_once() -> None:
    def program() -> list[str]:
        lines = logged_lines()
        again = threading.Thread(target=time.sleep, args=(60,), daemon=True, name="exporter")
        for thread in (
            again,
            threading.Thread(target=time.sleep, args=(60,), daemon=True, name="scheduler"),
            threading.Thread(target=time.sleep, args=(60,), daemon=True, name="ticks"),
        ):
            thread.start()
        _thread.start_new_thread(count_for_ever, ())
        os.register_at_fork(
            after_in_child=lambda: threading.Thread(
                target=time.sleep, args=(60,), daemon=True, name="exporter"
            ).start()
        )
        with managing({**POLICY, "max_uses": 1}) as manager:
            ask(manager, "pid")
            ask(manager, "pid")
        return [line for line in lines if "threads" in line]

    (line,) = in_own_process(program)
    assert (
        f"do not run in executor processes: 'scheduler', '{__name__}.count_for_ever', 'ticks'. Start" in line
    )


# -- what runs in each new executor ----------------------------------------------------------------


@pytest.mark.smoke
def test_rcon_executor_started_is_called_in_each_new_executor_before_its_first_work() -> None:
    class Warm:
        @hookimpl
        def rcon_executor_started(self, policy: Policy) -> None:
            SEEN.append([policy.name, os.getuid(), os.getpid()])

    def program() -> Any:
        os.register_at_fork(after_in_child=lambda: SEEN.append("hook"))
        settings = {"executor_started": f"{__name__}:started"}
        with managing({**POLICY, "max_uses": 2}, plugins=[Warm()], settings=settings) as manager:
            return [(ask(manager, "pid")[0], ask(manager, "seen")[0]) for _ in range(2)]

    found = in_own_process(program)
    assert found[0][0] != found[1][0]
    for pid, seen_there in found:
        assert seen_there == ["hook", ["p", USER, pid], "started"]


def test_what_fails_in_every_executor_refuses_the_start() -> None:
    def program() -> str:
        try:
            with managing(POLICY, settings={"executor_started": f"{__name__}:fails"}):
                return "started"
        except ConfinementError as error:
            return str(error)

    assert in_own_process(program) == (
        f"policy p: no executor process can serve: executor_started '{__name__}:fails' raised LookupError: no database"
    )


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("no_such_module:connect", "ModuleNotFoundError"),
        (f"{__name__}:no_such_function", "AttributeError"),
        (f"{__name__}:NOT_CALLABLE", "is a int, which cannot be called"),
    ],
)
def test_a_function_that_cannot_be_called_refuses_the_start(name: str, problem: str) -> None:
    with (
        pytest.raises(SettingsError, match=problem) as raised,
        managing({"isolation": "process"}, settings={"executor_started": name}),
    ):
        pass
    assert raised.value.key == "executor_started"


def test_a_function_that_never_returns_refuses_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    class Waits:
        @hookimpl
        def rcon_executor_started(self) -> None:
            time.sleep(60)

    monkeypatch.setattr("rcon_plugins.executors.process.READY_SECONDS", 1.0)
    with (
        pytest.raises(RconError, match=r"it was not ready within 1 s"),
        managing({"isolation": "process"}, plugins=[Waits()]),
    ):
        pass


def test_the_trial_at_the_start_leaves_nothing() -> None:
    with managing({**POLICY, "max_uses": 1}) as manager:
        assert manager.fork_server_pid is not None
        listed = subprocess.run(
            ["ps", "--ppid", str(manager.fork_server_pid), "-o", "pid="], capture_output=True, check=False
        )
        assert listed.stdout.split() == []
        assert soon(lambda: manager.instance.work.children() == [])


def test_other_work_neither_hinders_the_trial_nor_is_hindered() -> None:
    """Another worker of the same server has as many processes as it may, and all the memory."""
    keys = {"policy": {"p": {"pids": 1, "memory": "64M"}}, "route": [{"policy": "p"}]}
    deployment = Manager(from_mapping(keys)).deploy()
    try:
        first = deployment.start(service.serve)
        try:
            work = service.begin(first, "wait_for", "/nowhere")

            def start_another() -> str:
                second = deployment.start(service.serve)
                second.close()
                return "started"

            assert in_child(start_another) == "started"
            assert work.outcome is None
            work.abort("the test is over")
        finally:
            first.close()
    finally:
        deployment.close()


def test_what_the_application_says_before_it_is_ready_is_not_believed() -> None:
    """It has the channel from the moment on when its own code runs."""

    class Lies:
        @hookimpl
        def rcon_executor_started(self) -> None:
            for link in Path("/proc/self/fd").iterdir():
                try:
                    with socket.socket(fileno=os.dup(int(link.name))) as channel:
                        channel.send(struct.pack("!BI", FAILED, 12) + b"first\nsecond")
                except OSError:
                    continue

    with pytest.raises(ConfinementError) as raised, managing(POLICY, plugins=[Lies()]):
        pass
    assert "\n" not in str(raised.value)
    assert "first" in str(raised.value)


def test_no_trial_where_the_user_is_known_with_the_request_alone() -> None:
    class Never:
        @hookimpl
        def rcon_executor_started(self) -> None:
            os.kill(os.getpid(), signal.SIGKILL)

    policy = {**POLICY, "user": "owner:/srv/{host}"}
    with managing(policy, plugins=[Never()]) as manager:
        assert manager.fork_server_pid is not None
