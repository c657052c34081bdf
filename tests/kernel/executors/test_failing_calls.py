"""A kernel call that fails says nothing: only ENOENT, ENODEV and ESRCH mean gone. All others are tried again."""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import platform
import resource
import socket
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from rcon_plugins import Manager
from rcon_plugins.errors import ConfinementError, KernelError
from rcon_plugins.kernel import descriptors, files, landlock, namespaces
from rcon_plugins.kernel.cgroup import MAX, Hierarchy, Resources
from rcon_plugins.kernel.events import Watcher
from rcon_plugins.settings.file import from_mapping
from tests.children import in_child
from tests.kernel.executors.service import ask, begin, managing, serve, soon
from tests.processes import alive, children
from tests.system_calls import refuse_system_call

MIB = 2**20


@contextmanager
def no_descriptors() -> Iterator[None]:
    """No file can be opened by this process; those that are open stay."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@contextmanager
def logged() -> Iterator[list[str]]:
    """The lines that rcon logs."""
    lines: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    handler = Handler(logging.ERROR)
    logging.getLogger("rcon").addHandler(handler)
    try:
        yield lines
    finally:
        logging.getLogger("rcon").removeHandler(handler)


@pytest.mark.smoke
@pytest.mark.each_layout
def test_children_of_ended_work_die_when_there_are_descriptors_again() -> None:
    def program() -> tuple[str, list[bool], int, int]:
        with managing({"isolation": "process", "each": {"timeout": "1s"}}) as manager, logged() as lines:
            left, outcome = ask(manager, "leave_sleepers", 0)
            assert (left, outcome.ending) == ([], "ok")
            admission = begin(manager, "sleep", 300)
            pid = admission.executor_pid
            with no_descriptors():
                time.sleep(2.5)
                ending = admission.died().ending
            gone = [soon(lambda: not alive(pid), 10)]
            gone.append(soon(lambda: not manager._pool.processes._ending, 10))
            gone.append(ask(manager, "pid")[1].ending == "ok")
            told = sum("could not be ended" in line for line in lines)
            return ending, gone, told, manager._pool.processes.failures

    ending, gone, told, failures = in_child(program)
    assert (ending, gone, told) == ("timeout", [True] * 3, 1)
    assert failures > 1


@pytest.mark.each_layout
def test_processes_that_left_the_executor_die_though_the_host_has_no_descriptors() -> None:
    """A kill by pid does not reach them. The fork server, which has descriptors, kills the cgroup."""

    def program() -> tuple[list[bool], bool]:
        with managing({"isolation": "process", "each": {"timeout": "30s"}}) as manager:
            admission = begin(manager, "leave_sleepers", 3)
            frame = admission.channel.receive()
            sleepers = [int(pid) for pid in frame.payload.strip(b"[]").split(b",")]
            with no_descriptors():
                outcome = admission.finish()
                died = soon(lambda: not any(map(_exists, sleepers)), 5)
            ended = [soon(lambda: not any(map(alive, sleepers)), 10), outcome.ending == "ok"]
            return ended, died

    ended, died = in_child(program)
    assert ended == [True, True]
    assert died


@pytest.mark.once
@pytest.mark.each_layout
def test_a_start_without_room_for_its_thread_leaves_nothing_and_may_be_tried_again() -> None:
    """As a pool process of Celery does. The fork server is made before the thread."""

    def program() -> tuple[str, list[int], list[bool]]:
        full = Hierarchy.discover().cgroup(f"/rcon-failing-{os.getpid()}", controllers=frozenset({"pids"}))
        settings = from_mapping(
            {"policy": {"p": {"isolation": "process"}}, "route": [{"policy": "p"}], "cgroup": "/rcon"}
        )
        manager = Manager(settings)
        deployment = manager.deploy()
        before = _open_files()
        full.create()
        full.configure(Resources(pids_max=2))
        full.attach(os.getpid())
        with pytest.raises(KernelError, match="the thread rcon-supervisor could not be started") as raised:
            deployment.start(serve)
        left = [_open_files() - before, len(children(os.getpid()))]
        full.configure(Resources(pids_max=MAX))
        running = deployment.start(serve)
        served = [ask(running, "pid")[1].ending == "ok"]
        running.close()
        deployment.close()
        Hierarchy.discover().cgroup("/").attach(os.getpid())
        full.delete()
        return str(raised.value.errno), left, served

    number, left, served = in_child(program)
    assert (int(number), left, served) == (errno.EAGAIN, [0, 0], [True])


def _open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_close_is_bounded_while_calls_fail() -> None:
    def program() -> tuple[float, list[bool]]:
        with managing({"isolation": "process", "each": {"timeout": "60s"}}) as manager:
            pids = [begin(manager, "sleep", 300).executor_pid for _ in range(5)]
            began = time.monotonic()
            with no_descriptors(), pytest.raises(OSError, match="Too many open files"):
                manager.close()
            took = time.monotonic() - began
            ended = [soon(lambda pid=pid: not alive(pid), 10) for pid in pids]
            manager.instance.close()
            return took, ended

    took, ended = in_child(program, timeout=60)
    assert ended == [True] * 5
    assert took < 40


def test_descriptors_that_cannot_be_made_are_refused_with_the_remedy() -> None:
    makers: dict[str, Callable[[], object]] = {
        "eventfd": descriptors.event_counter,
        "pipe": descriptors.pipe,
        "memfd_create": lambda: descriptors.memory_file("rcon-test"),
        "socketpair": lambda: descriptors.socket_pair(socket.SOCK_STREAM, socket),
        "pidfd_open(1)": lambda: descriptors.of_process(1),
    }

    def program() -> dict[str, str]:
        found = {}
        for call, make in makers.items():
            with no_descriptors(), pytest.raises(KernelError) as refused:
                make()
            assert refused.value.errno == errno.EMFILE
            found[call] = str(refused.value)
        return found

    remedy = (
        "raise the limit on open files of this process: RLIMIT_NOFILE, `ulimit -n`, LimitNOFILE= of a unit"
    )
    assert in_child(program) == {call: f"{call}: Too many open files ({remedy})" for call in makers}


def test_a_server_without_a_descriptor_for_an_executor_says_how_to_raise_the_limit() -> None:
    def program() -> list[str]:
        said = []
        for isolation, limits in (("thread", {"pids": 64}), ("process", {"each": {"timeout": "60s"}})):
            with managing({"isolation": isolation, **limits}) as manager:
                with no_descriptors(), pytest.raises(ConfinementError) as refused:
                    begin(manager, "pid")
                said.append(str(refused.value))
        return said

    assert [("Too many open files" in one, "`ulimit -n`" in one) for one in in_child(program)] == [
        (True, True)
    ] * 2


@pytest.mark.each_layout
def test_a_group_whose_processes_cannot_be_read_is_not_empty() -> None:
    def program() -> list[int | None]:
        cgroup = Hierarchy.discover().cgroup(f"/rcon-failing-{os.getpid()}")
        cgroup.child("below").create()
        found: list[int | None] = []
        acts: list[Callable[[], object]] = [
            lambda: cgroup.processes(subtree=True),
            lambda: cgroup.kill(timeout=0.2),
            lambda: cgroup.read(),
        ]
        for act in acts:
            with no_descriptors():
                try:
                    act()
                    found.append(None)
                except KernelError as error:
                    found.append(error.errno)
        cgroup.delete()
        return found

    assert in_child(program) == [errno.EMFILE] * 3


def test_only_three_errors_mean_gone() -> None:
    meaning = {number for number in errno.errorcode if files.gone(OSError(number, ""))}
    assert meaning == {errno.ENOENT, errno.ENODEV, errno.ESRCH}


@pytest.mark.each_layout
def test_a_watch_goes_on_after_calls_have_failed() -> None:
    def program() -> tuple[bool, int]:
        cgroup = Hierarchy.discover().cgroup(f"/rcon-failing-{os.getpid()}").create()
        events: list[Any] = []
        try:
            with Watcher() as watcher, logged() as lines:
                watcher.add(cgroup, events.append, kinds=(), thresholds=(20 * MIB,))
                go, grown = os.pipe(), os.pipe()
                pid = os.fork()
                if pid == 0:
                    cgroup.enter_process()
                    os.read(go[0], 1)
                    held = bytearray(os.urandom(4096) * (40 * 256))
                    os.write(grown[1], b"x")
                    time.sleep(300)
                    os._exit(len(held) % 2)
                time.sleep(0.3)
                with no_descriptors():
                    os.write(go[1], b"x")
                    os.read(grown[0], 1)
                    time.sleep(0.5)
                    before = len(events)
                seen = soon(lambda: len(events) > before, 10) or before > 0
                told = sum("cannot be watched" in line for line in lines)
                return seen and not any("no longer" in line for line in lines), told
        finally:
            cgroup.kill()
            os.waitpid(pid, 0)
            cgroup.delete()

    seen, told = in_child(program)
    assert seen
    assert told <= 1


def answer_landlock_with(number: int) -> None:
    """Have every later call of landlock_create_ruleset(2) fail with this errno (seccomp(2))."""
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.prctl(38, 1, 0, 0, 0) == 0  # PR_SET_NO_NEW_PRIVS
    code = [(0x20, 0, 0, 0), (0x15, 0, 1, 444), (0x06, 0, 0, 0x00050000 | number), (0x06, 0, 0, 0x7FFF0000)]
    program = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *one) for one in code))
    header = struct.pack("@HP", len(code), ctypes.addressof(program))
    assert libc.prctl(22, 2, ctypes.create_string_buffer(header), 0, 0) == 0  # PR_SET_SECCOMP, filter


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (errno.ENOSYS, 0),
        (errno.EOPNOTSUPP, 0),
        (errno.EPERM, 0),
        (errno.ENOMEM, "ENOMEM"),
        (errno.EMFILE, "EMFILE"),
    ],
)
def test_no_landlock_is_told_from_a_call_that_fails(number: int, expected: int | str) -> None:
    def program() -> int | str:
        answer_landlock_with(number)
        try:
            return landlock.abi()
        except KernelError as error:
            return errno.errorcode[error.errno or 0]

    assert in_child(program) == expected


def change_the_mounts() -> None:
    """Mount something for this process alone, so that the fork server's rules are no longer valid."""
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.unshare(0x00020000) == 0
    assert libc.mount(None, b"/", None, (1 << 18) | 16384, None) == 0  # private, with all below
    assert libc.mount(b"none", b"/mnt", b"tmpfs", 0, None) == 0


@pytest.mark.skipif(not landlock.abi(), reason="the kernel has no Landlock")
@pytest.mark.parametrize("number", [0, errno.ENOSYS, errno.EPERM, errno.ENOMEM])
def test_what_was_there_at_the_start_must_be_there_in_the_drop(number: int) -> None:
    def program() -> str:
        spoil = [change_the_mounts]
        if number:
            spoil.append(lambda: answer_landlock_with(number))
        try:
            with managing({"isolation": "process"}, after_fork=spoil) as manager:
                return str(ask(manager, "pid")[1].ending)
        except ConfinementError as error:
            return str(error)

    found = in_child(program)
    assert ("andlock" in found) if number else (found == "ok")


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the number of unshare(2)")
@pytest.mark.parametrize(
    ("number", "expected"), [(errno.EPERM, "said"), (errno.ENOSPC, "ENOSPC"), (errno.ENOMEM, "ENOMEM")]
)
def test_namespaces_that_are_refused_are_told_from_a_trial_that_fails(number: int, expected: str) -> None:
    def program() -> str:
        namespaces._trial.cache_clear()  # of tests before this one
        refuse_system_call(272, number)
        try:
            return "said" if namespaces.why_not() else "can"
        except KernelError as error:
            return errno.errorcode[error.errno or 0]

    assert in_child(program) == expected


@pytest.mark.each_layout
def test_a_limit_that_cannot_be_announced_is_not_changed() -> None:
    """The kernel has the old limits again, as the policy does."""

    def program() -> tuple[int | None, list[str]]:
        settings = from_mapping({"policy": {"p": {"memory": "64M"}}, "route": [{"policy": "p"}]})
        deployment = Manager(settings).deploy(changeable=True)
        manager = deployment.start(serve)
        try:
            ask(manager, "pid")
            soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))  # cgroups have no size
            with pytest.raises(KernelError, match="log of changes"):
                deployment.change("p", "memory", "96M")
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            limits = [
                path.read_text().strip()
                for name in ("memory.limit_in_bytes", "memory.max")
                for directory in deployment.instance.policy_cgroup("p").directories
                if (path := Path(directory, name)).exists()
            ]
            memory = deployment.policies.all()["p"].memory
            return None if memory is None else memory.limit, limits
        finally:
            manager.close()
            deployment.close()

    assert in_child(program) == (64 * MIB, [str(64 * MIB)])
