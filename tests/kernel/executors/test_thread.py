"""What `thread` enforces: threads of this process that dropped for good. Each test has a process of its own."""

from __future__ import annotations

import contextlib
import contextvars
import ctypes
import logging
import logging.handlers
import os
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rcon_plugins import Manager, RunningManager, Server, Work, hookimpl
from rcon_plugins.confinement.admission import ThreadAdmission
from rcon_plugins.errors import ConcurrencyLimitExceeded, ConfinementError, SettingsError
from rcon_plugins.kernel.capability import CAP_SETUID, Capabilities, read_state, set_capabilities
from rcon_plugins.settings.file import from_mapping
from tests import leftovers
from tests.children import in_child
from tests.kernel.executors import ways_back
from tests.kernel.executors.service import Left, leaving, soon, status
from tests.kernel.quota import quota_in_force

TENANT, OTHER = 61001, 61002
POLICY: dict[str, Any] = {"isolation": "thread", "user": TENANT, "group": TENANT, "groups": [61011]}
NOTHING = {"CapInh": 0, "CapPrm": 0, "CapEff": 0, "CapBnd": 0, "CapAmb": 0}


def managed(policy: dict[str, Any], program: Callable[[RunningManager], Any], **settings: Any) -> Any:
    """Run ``program`` with a started manager, in a process of its own."""

    def run() -> Any:
        manager = Manager(
            from_mapping({"policy": {"p": policy}, "route": [{"policy": "p"}], **settings})
        ).start()
        try:
            return program(manager)
        finally:
            manager.close()
            left = [thread.name for thread in threading.enumerate() if thread.name.startswith("rcon-")]
            assert left == []

    return in_child(run, timeout=60)


def admit(manager: RunningManager, **attributes: str) -> ThreadAdmission:
    admission = manager.admit(Work("call", "x", attributes))
    assert isinstance(admission, ThreadAdmission)
    return admission


def run(manager: RunningManager, act: Callable[..., Any], *arguments: Any, **attributes: str) -> Any:
    admission = admit(manager, **attributes)
    try:
        return admission.call(act, *arguments)
    finally:
        admission.finish()


def own_status() -> dict[str, Any]:
    return status(Path("/proc/thread-self/status"))


def where() -> str:
    return Path("/proc/thread-self/cgroup").read_text()


def others() -> list[dict[str, Any]]:
    """The states there are among the threads that are not executors."""
    executors = {str(t.native_id) for t in threading.enumerate() if t.name.startswith("rcon-")}
    tasks = [task for task in Path("/proc/self/task").iterdir() if task.name not in executors]
    found = []
    for task in tasks:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it ended just now
            state = status(task / "status")
            if state not in found:
                found.append(state)
    return found


@pytest.mark.smoke
@pytest.mark.each_layout
def test_work_runs_as_the_tenant_in_its_cgroup_and_nothing_else_changes() -> None:
    def program(manager: RunningManager) -> Any:
        before = others()
        inside = run(manager, own_status), run(manager, where)
        return before == others(), inside, where()

    unchanged, (state, place), outside = managed({**POLICY, "pids": 50}, program)
    assert unchanged
    assert state == {
        "uids": [TENANT] * 4,
        "gids": [TENANT] * 4,
        "groups": [61011],
        "no_new_privs": True,
        **NOTHING,
    }
    assert "/p" in place
    assert place != outside


def test_eight_tenants_at_once_under_eight_users() -> None:
    policy = {"isolation": "thread", "user": "owner:{root}/{{host}}", "per": "host"}

    def program(manager: RunningManager, hosts: list[str]) -> Any:
        before = others()
        together = threading.Barrier(len(hosts))
        seen: dict[str, set[int]] = {host: set() for host in hosts}

        def work() -> list[int]:
            together.wait(20)  # all of them are inside of the kernel's eight identities at this moment
            state = own_status()
            return [*state["uids"], *state["gids"], *state["groups"], state["CapPrm"], state["CapEff"]]

        def serve(host: str) -> None:
            for _ in range(20):
                seen[host].update(run(manager, work, host=host))

        threads = [threading.Thread(target=serve, args=(host,)) for host in hosts]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return seen, before == others()

    with tempfile.TemporaryDirectory() as root:
        hosts = [f"tenant{number}" for number in range(8)]
        for number, host in enumerate(hosts):
            Path(root, host).mkdir()
            os.chown(Path(root, host), 61001 + number, 61001 + number)
        policy["user"] = f"owner:{root}/{{host}}"
        seen, unchanged = managed(policy, lambda manager: program(manager, hosts))
    assert seen == {host: {61001 + number, 0} for number, host in enumerate(hosts)}
    assert unchanged


def test_no_system_call_regains_privileges() -> None:
    found = managed(POLICY, lambda manager: run(manager, lambda: ways_back.by_identity(others=OTHER)))
    assert len(found) > 30
    assert {name: said for name, said in found.items() if said not in ("EPERM", "EACCES")} == {}


def test_a_thread_is_used_again_and_only_for_its_own_identity() -> None:
    policy = {"isolation": "thread", "user": "owner:{path}", "min_uid": 100}

    def program(manager: RunningManager) -> list[list[int]]:
        ids = [threading.get_native_id()]
        return [
            [run(manager, threading.get_native_id, path=path) for path in ("/a", "/b", "/a", "/b")],
            ids,
        ]

    with tempfile.TemporaryDirectory() as root:
        for name, uid in (("a", TENANT), ("b", OTHER)):
            Path(root, name).touch()
            os.chown(Path(root, name), uid, uid)
        (a, b, a2, b2), (own,) = managed({**policy, "user": f"owner:{root}/{{path}}"}, program)
    assert (a, b) == (a2, b2)
    assert len({a, b, own}) == 3


def test_the_number_of_threads_is_bounded_and_the_least_recently_used_ends() -> None:
    def program(manager: RunningManager) -> tuple[list[bool], int, str]:
        first = run(manager, threading.get_native_id, host="a")
        run(manager, threading.get_native_id, host="b")
        run(manager, threading.get_native_id, host="c")  # a's makes room
        gone = [Path(f"/proc/self/task/{first}").exists()]
        count = sum(thread.name.startswith("rcon-") for thread in threading.enumerate())
        held = [admit(manager, host="b"), admit(manager, host="c")]
        try:
            admit(manager, host="d")
        except ConcurrencyLimitExceeded as error:
            limit = error.limit
        for admission in held:
            admission.finish()
        return gone, count, limit

    policy = {**POLICY, "per": "host"}
    assert managed(policy, program, threads=2) == ([False], 2, "threads")


def test_concurrency_holds() -> None:
    def program(manager: RunningManager) -> str:
        held = admit(manager)
        try:
            admit(manager)
        except ConcurrencyLimitExceeded as error:
            return error.limit
        finally:
            held.finish()
        return "admitted"

    assert managed({**POLICY, "concurrency": 1}, program) == "concurrency"


def test_an_exception_reaches_the_caller_and_the_thread_serves_on() -> None:
    def program(manager: RunningManager) -> list[object]:
        def fail() -> None:
            raise KeyError("its own")

        first = run(manager, threading.get_native_id)
        try:
            run(manager, fail)
        except KeyError as error:
            return [str(error), first == run(manager, threading.get_native_id)]
        return []

    assert managed(POLICY, program) == ["'its own'", True]


def test_a_call_that_was_left_alone_is_not_disturbed_and_its_thread_not_used_again() -> None:
    """As when a signal handler raises in the thread that waits."""

    def program(manager: RunningManager) -> list[object]:
        go_on = threading.Event()
        admission = admit(manager)
        first = admission.call(threading.get_native_id)
        with pytest.raises(Left):
            admission.call(leaving(go_on.wait), 20)
        admission.finish("error")
        second = run(manager, threading.get_native_id)
        go_on.set()
        ended = soon(lambda: not Path(f"/proc/self/task/{first}").exists())
        return [first != second, ended]

    assert managed(POLICY, program) == [True, True]


def inject(thread_id: int, error: type[BaseException]) -> None:
    """Set an exception in a thread, as libraries for timeouts do. It is raised when the thread next runs Python."""
    ident = next(t.ident for t in threading.enumerate() if t.native_id == thread_id)
    assert (
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(ident or 0), ctypes.py_object(error)) == 1
    )


def leave(admission: ThreadAdmission, act: Callable[..., Any], *arguments: Any) -> None:
    """Call, and leave the call to itself when it is under way."""
    with pytest.raises(Left):
        admission.call(leaving(act), *arguments)


def abandoned_calls(records: list[logging.LogRecord]) -> list[str]:
    return [record.getMessage() for record in records if "its caller left" in record.getMessage()]


@contextlib.contextmanager
def logged() -> Iterator[list[logging.LogRecord]]:
    handler = logging.handlers.BufferingHandler(1000)
    logger = logging.getLogger("rcon")
    logger.addHandler(handler)
    try:
        yield handler.buffer
    finally:
        logger.removeHandler(handler)


@pytest.mark.parametrize("error", [KeyError, SystemExit, KeyboardInterrupt])
def test_an_exception_set_in_a_waiting_thread_ends_it_and_fails_the_next_call(
    error: type[BaseException],
) -> None:
    def program(manager: RunningManager) -> list[object]:
        admission = admit(manager)
        first = admission.call(threading.get_native_id)
        inject(first, error)
        said = []
        for _ in range(2):  # the second finds it ended
            try:
                admission.call(os.getpid)
            except ConfinementError as refusal:
                said.append(str(refusal))
        admission.finish("error")
        ended = soon(lambda: not Path(f"/proc/self/task/{first}").exists())
        return [said, ended, first != run(manager, threading.get_native_id)]

    assert managed(POLICY, program, threads=1) == [["the executor thread ended"] * 2, True, True]


def test_a_thread_that_ended_while_it_waited_takes_up_no_room() -> None:
    def program(manager: RunningManager) -> list[int]:
        first = run(manager, threading.get_native_id, host="a")
        inject(first, KeyError)
        with contextlib.suppress(ConfinementError):
            run(manager, os.getpid, host="a")
        held = [admit(manager, host="b"), admit(manager, host="c")]
        for admission in held:
            admission.finish()
        try:
            return [run(manager, os.getuid, host="a")]
        finally:
            assert soon(lambda: sum(thread.name.startswith("rcon-") for thread in threading.enumerate()) <= 2)

    assert managed({**POLICY, "per": "host"}, program, threads=2) == [TENANT]


def test_an_exception_set_in_a_busy_thread_is_raised_in_its_call() -> None:
    def program(manager: RunningManager) -> list[object]:
        first = run(manager, threading.get_native_id)

        def work() -> None:
            inject(threading.get_native_id(), KeyError)
            time.sleep(0)

        try:
            run(manager, work)
        except KeyError:
            return [first == run(manager, threading.get_native_id)]
        return []

    assert managed(POLICY, program) == [True]


def test_calls_that_were_left_count_until_they_end() -> None:
    def program(manager: RunningManager) -> list[object]:
        go_on = threading.Event()
        for _ in range(4):
            admission = admit(manager)
            leave(admission, go_on.wait, 20)
            with pytest.raises(ConfinementError):
                admission.call(os.getpid)  # it is at work
            admission.finish("error")
        refused = 0
        for _ in range(5):
            try:
                run(manager, os.getpid)
            except ConcurrencyLimitExceeded as error:
                refused += error.limit == "threads"
        count = sum(thread.name.startswith("rcon-") for thread in threading.enumerate())
        go_on.set()
        soon(lambda: not any(thread.name.startswith("rcon-") for thread in threading.enumerate()))
        return [refused, count, run(manager, os.getuid)]

    assert managed(POLICY, program, threads=4) == [5, 4, TENANT]


def test_close_while_a_thread_is_taken_lets_it_finish_and_makes_no_more() -> None:
    def program() -> list[object]:
        manager = Manager(from_mapping({"policy": {"default": POLICY}})).start()
        admission = admit(manager)
        inside, go_on = threading.Event(), threading.Event()
        results: list[object] = []

        def work() -> int:
            inside.set()
            go_on.wait(20)
            return os.getuid()

        serving = threading.Thread(target=lambda: results.append(admission.call(work)))
        serving.start()
        inside.wait(20)
        with logged() as records:
            manager.close()
            go_on.set()
            serving.join(20)
            admission.finish()
        try:
            admission.call(os.getpid)  # to be closed after its end: in a new thread, and there are none now
        except ConfinementError as error:
            results.append(str(error))
        ended = soon(lambda: not any(thread.name.startswith("rcon-") for thread in threading.enumerate()))
        return [*results, abandoned_calls(records), ended]

    assert in_child(program) == [TENANT, "the executor threads were closed", [], True]


def test_only_a_call_that_was_left_is_logged_as_one() -> None:
    def program(manager: RunningManager) -> list[int]:
        go_on = threading.Event()
        with logged() as records:
            run(manager, os.getpid)
            before = len(abandoned_calls(records))
            admission = admit(manager)
            leave(admission, go_on.wait, 20)
            admission.finish("error")
        go_on.set()
        soon(lambda: not any(thread.name.startswith("rcon-") for thread in threading.enumerate()))
        return [before, len(abandoned_calls(records))]

    assert managed(POLICY, program) == [0, 1]


@pytest.mark.each_layout
def test_the_next_start_removes_the_tree_of_a_server_closed_with_a_busy_thread() -> None:
    policy = {**POLICY, "pids": 50}

    def closes() -> str:
        manager = Manager(from_mapping({"policy": {"default": policy}})).start()
        inside = threading.Event()
        admission = admit(manager)
        path = manager.instance.path

        def work() -> None:
            inside.set()
            time.sleep(20)

        threading.Thread(target=admission.call, args=(work,), daemon=True).start()
        inside.wait(20)
        manager.close()
        return path

    path = in_child(closes)
    managed(policy, lambda manager: run(manager, os.getpid))
    assert [found for found in leftovers.cgroups() if found.name == Path(path).name] == []


def test_context_variables_of_the_caller_belong_to_one_request() -> None:
    variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="nothing")

    def step(value: str) -> str:
        found = variable.get()
        variable.set(value)
        return found

    def program(manager: RunningManager) -> list[object]:
        variable.set("the server's")
        admission = admit(manager)
        same = [admission.call(step, str(number)) for number in range(3)]
        admission.finish()
        closing = admission.call(step, "closing")
        other = run(manager, step, "other")
        return [same, closing, other, run(manager, variable.get), variable.get()]

    assert managed(POLICY, program) == [["the server's", "0", "1"], "2", *["the server's"] * 3]


def test_close_after_a_call_was_left_runs_in_the_context_of_its_request() -> None:
    variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="nothing")

    def program(manager: RunningManager) -> str:
        go_on = threading.Event()
        admission = admit(manager)
        admission.call(variable.set, "its own")
        leave(admission, go_on.wait, 20)
        admission.finish("error")
        found = str(admission.call(variable.get))  # while the other is still busy
        go_on.set()
        soon(lambda: sum(thread.name.startswith("rcon-") for thread in threading.enumerate()) == 1)
        return found

    assert managed(POLICY, program) == "its own"


def test_working_directory_and_umask_are_the_threads_own() -> None:
    def program(manager: RunningManager) -> tuple[str, str, int]:
        run(manager, os.chdir, "/proc")
        return run(manager, os.getcwd), str(Path.cwd()), os.umask(0o022)

    inside, outside, umask = managed({**POLICY, "umask": "077"}, program)
    assert inside == "/proc"
    assert outside != "/proc"
    assert umask != 0o077


def test_a_command_started_by_the_thread_runs_as_the_tenant() -> None:
    def program(manager: RunningManager) -> str:
        said = run(manager, lambda: subprocess.run(["id", "-u"], capture_output=True, text=True, check=True))
        return str(said.stdout.strip())

    assert managed(POLICY, program) == str(TENANT)


def test_a_server_that_may_not_become_others_is_refused_at_start() -> None:
    def program() -> str:
        state = read_state()
        held = state.permitted - Capabilities.of(CAP_SETUID)
        set_capabilities(held, held, state.inheritable)
        try:
            Manager(from_mapping({"policy": {"p": POLICY}}))
        except SettingsError as error:
            return str(error)
        return "started"

    assert "cap_setuid" in in_child(program)


def test_keys_that_a_thread_cannot_enforce_are_refused() -> None:
    for key, value in (("memory", "64M"), ("each", {"timeout": "1s"}), ("rlimits", {"nofile": 10})):
        with pytest.raises(SettingsError, match=key):
            from_mapping({"policy": {"p": {**POLICY, key: value}}})


def test_greenlets_are_refused() -> None:
    settings = from_mapping({"policy": {"p": POLICY}})
    with pytest.raises(SettingsError, match="greenlets"):
        Manager(settings, server=Server(threads=False, greenlets=True))


def test_a_drop_that_fails_is_a_refusal() -> None:
    class Refuses:
        @hookimpl
        def rcon_drop(self, target: str) -> None:
            raise PermissionError(f"not in a {target}")

    def program() -> str:
        manager = Manager(from_mapping({"policy": {"default": POLICY}}), plugins=[Refuses()]).start()
        try:
            manager.admit(Work("call", "x"))
        except ConfinementError as error:
            return str(error)
        finally:
            manager.close()
        return "ran"

    assert "not in a thread" in in_child(program)


def test_threads_that_ended_leave_no_descriptor() -> None:
    def program(manager: RunningManager) -> list[int]:
        def count() -> int:
            return sum(1 for _ in Path("/proc/self/fd").iterdir())

        before = count()
        admissions = [admit(manager, host=host) for host in ("a", "b", "c")]
        most = count()
        for admission in admissions:
            admission.call(int)
            admission.finish()
        del admission
        admissions.clear()
        manager._threads.close()
        return [before, most, count()]

    before, most, after = managed(POLICY, program)
    assert before == after < most


@pytest.mark.each_layout
def test_the_kernel_has_the_quota() -> None:
    def program(manager: RunningManager) -> Any:
        return run(manager, quota_in_force), quota_in_force()

    assert managed({**POLICY, "cpu": "30%"}, program) == (0.3, None)
