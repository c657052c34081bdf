"""What a server keeps for each key, executor, thread and identity is bounded: each is counted at ten times its bound.

And whoever ends last removes the cgroup: a dropped confinement, its last executor, its last thread.
"""

from __future__ import annotations

import ctypes
import gc
import logging
import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest

from rcon_plugins import Manager, RunningManager, Server, Work, hookimpl
from rcon_plugins.confinement.admission import InlineAdmission, ThreadAdmission
from rcon_plugins.confinement.removal import Removals
from rcon_plugins.errors import ConcurrencyLimitExceeded, ConfinementError, KernelError
from rcon_plugins.executors import pool, process
from rcon_plugins.kernel.cgroup import Cgroup, Hierarchy, Resources
from rcon_plugins.kernel.events import watcher_of_process
from rcon_plugins.settings.file import from_mapping
from tests.children import in_child
from tests.kernel.cgroup.helpers import running, sleep_forever
from tests.kernel.executors.service import Left, ask, begin, leaving, managing, serve, soon
from tests.processes import children, entries

pytestmark = pytest.mark.each_layout

PROCESSES, CONFINEMENTS, THREADS = 3, 6, 4
KEYS = 10 * CONFINEMENTS
BOUNDS = {"processes": PROCESSES, "confinements": CONFINEMENTS, "threads": THREADS}


def groups(manager: RunningManager, kind: str) -> set[str]:
    """The confinements that have a directory in any hierarchy."""
    cgroup = manager.instance.work if kind == "work" else manager.instance.host
    return set(cgroup.children())


def leaves(manager: RunningManager) -> int:
    directories = manager.instance.work.directories
    groups = [entries(Path(directory)) for directory in directories]
    return max(sum(leaf.is_dir() for group in some for leaf in entries(group)) for some in groups)


def descriptors(pid: int | str = "self") -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


class Listener:
    """A plugin that wants events, so that every cgroup is watched."""

    @hookimpl
    def rcon_event(self, event: Any) -> None:
        del event


@pytest.mark.smoke
def test_whoever_ends_last_removes_the_cgroup() -> None:
    with managing({"per": "host", "each": {"timeout": "60s"}}, settings=BOUNDS) as manager:
        for number in range(KEYS):
            assert ask(manager, "pid", host=f"h{number}")[1].ending == "ok"
        # The executor ended long before its confinement was dropped, and the other way round.
        assert soon(lambda: len(groups(manager, "work")) <= CONFINEMENTS)
        assert soon(lambda: leaves(manager) <= PROCESSES)


def test_work_that_outlives_its_confinement_removes_the_cgroup() -> None:
    settings = {**BOUNDS, "confinements": 1, "processes": 20}
    with managing({"per": "host", "max_uses": 1, "each": {"timeout": "60s"}}, settings=settings) as manager:
        busy = [begin(manager, "sleep", 300, host=f"h{number}") for number in range(5)]
        for admission in busy:
            admission.abort("over")
        ask(manager, "pid", host="last")
        assert soon(lambda: groups(manager, "work") == {"p~last"})


def test_ten_times_as_many_keys_as_are_kept() -> None:
    """Confinements, executors, watches, deadlines, locks, threads and descriptors."""
    policy = {
        "per": "host",
        "concurrency": 5,
        "pids": 50,
        "max_uses": 2,
        "each": {"timeout": "1h", "memory": {"limit": "60M", "up_to": "90M", "expand": "2x"}},
    }
    with managing(policy, settings=BOUNDS, plugins=[Listener()]) as manager:
        at_first: dict[str, int] = {}
        for number in range(KEYS):
            assert ask(manager, "pid", host=f"h{number}")[1].ending == "ok"
            if number == CONFINEMENTS:
                at_first = kept(manager)
        assert soon(lambda: kept(manager)["ending"] == 0)
        assert soon(lambda: len(groups(manager, "work")) <= CONFINEMENTS)
        now = kept(manager)
        assert now["confinements"] <= CONFINEMENTS
        assert now["monitored"] <= CONFINEMENTS
        assert now["living"] <= PROCESSES
        assert now["waiting"] <= PROCESSES
        assert now["spares"] <= PROCESSES
        assert now["held locks"] == 0
        assert now["pending removals"] == 0
        assert now["deadlines"] <= 1000  # executors that are gone leave theirs until there are so many
        assert soon(lambda: kept(manager)["watches"] <= 2 * CONFINEMENTS + 2 * PROCESSES)
        each = at_first["descriptors"] / (CONFINEMENTS + PROCESSES)
        assert soon(lambda: kept(manager)["descriptors"] <= at_first["descriptors"] + 2 * each)
        assert soon(lambda: kept(manager)["fork server"] <= at_first["fork server"] + PROCESSES)
        assert kept(manager)["threads"] <= at_first["threads"]


def kept(manager: RunningManager) -> dict[str, int]:
    """What a manager keeps, by its name."""
    processes = manager._pool.processes
    supervisor = processes._supervisor
    assert supervisor is not None
    return {
        "confinements": len(manager._confinements),
        "monitored": len(manager._monitor._confinements),
        "living": processes.count_usable(),
        "ending": len(processes._ending),
        "waiting": sum(map(len, manager._pool._waiting.values())),
        "spares": max(len(manager._pool._spares_wanted), len(manager._pool._last_taken)),
        "held locks": len(manager._reservations._slots._held),
        "pending removals": manager._removals.pending,
        "deadlines": len(supervisor._deadlines),
        "watches": len(watcher_of_process()._watches),
        "descriptors": descriptors(),
        "fork server": descriptors(manager.fork_server_pid or 0),
        "threads": len(list(Path("/proc/self/task").iterdir())),
    }


@pytest.mark.once
def test_deadlines_of_executors_that_are_gone_are_dropped() -> None:
    with managing({"each": {"timeout": "24h"}}, settings=BOUNDS) as manager:
        supervisor = manager._pool.processes._supervisor
        assert supervisor is not None
        ask(manager, "pid")
        (executor,) = manager._pool.processes._living.values()
        for _ in range(10):

            class Gone:
                pass

            for _ in range(1000):
                supervisor.at(executor.since + 86400, lambda _: None, Gone())
        assert len(supervisor._deadlines) <= 1000


@pytest.mark.once
def test_ten_times_as_many_keys_want_spares() -> None:
    with managing({"per": "host", "max_uses": 1, "each": {"timeout": "60s"}}, settings=BOUNDS) as manager:
        for number in range(10 * PROCESSES):
            ask(manager, "pid", host=f"h{number}")
            assert len(manager._pool._spares_wanted) == len(manager._pool._last_taken) <= PROCESSES


@pytest.mark.once
def test_executors_that_do_not_end_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fork server that is stopped reports no exit, so every executor that is ended stays."""
    monkeypatch.setattr(pool, "_FEWEST_ENDING", 2)
    monkeypatch.setattr(process, "READY_SECONDS", 20.0)
    monkeypatch.setattr(process, "DEATH_SECONDS", 0.1)
    with managing({"per": "host", "isolation": "process"}, settings={**BOUNDS, "processes": 2}) as manager:
        for number in range(2):
            ask(manager, "pid", host=f"h{number}")
        monkeypatch.setattr(process, "READY_SECONDS", 0.1)
        assert manager.fork_server_pid is not None
        os.kill(manager.fork_server_pid, signal.SIGSTOP)
        try:
            refused = 0
            for number in range(2, 22):
                with pytest.raises((ConfinementError, ConcurrencyLimitExceeded)) as caught:
                    begin(manager, "pid", host=f"h{number}")
                refused += "have not ended" in str(caught.value)
                assert len(manager._pool.processes._living) <= 2 + 2 + 2
            assert refused >= 10
        finally:
            os.kill(manager.fork_server_pid, signal.SIGCONT)
        monkeypatch.setattr(process, "READY_SECONDS", 20.0)
        assert soon(lambda: not manager._pool.processes._ending)
        assert ask(manager, "pid", host="after")[1].ending == "ok"


def local(isolation: str, program: Any) -> Any:
    """Run a program with a manager whose policy runs work in threads, in a process of its own."""

    def run() -> Any:
        policy: dict[str, Any] = {"isolation": isolation, "per": "host", "pids": 50}
        settings = from_mapping({"policy": {"p": policy}, "route": [{"policy": "p"}], **BOUNDS})
        server = Server(threads=False) if isolation == "inline" else None
        manager = Manager(settings, server=server).start()
        try:
            return program(manager)
        finally:
            manager.close()

    return in_child(run, timeout=60)


def call(manager: RunningManager, host: str, function: Any = os.getpid) -> Any:
    admission = manager.admit(Work("call", "x", {"host": host}))
    assert isinstance(admission, InlineAdmission | ThreadAdmission)
    try:
        return admission.call(function)
    finally:
        admission.finish()


@pytest.mark.parametrize("isolation", ["inline", "thread"])
def test_ten_times_as_many_keys_of_threads(isolation: str) -> None:
    def program(manager: RunningManager) -> tuple[list[int], list[int], list[int]]:
        counts: tuple[list[int], list[int], list[int]] = ([], [], [])
        for number in range(KEYS):
            call(manager, f"h{number}")
            counts[0].append(len(groups(manager, "host")))
            counts[1].append(descriptors())
            counts[2].append(threading.active_count())
        return counts

    cgroups, files, threads = local(isolation, program)
    assert max(cgroups) <= CONFINEMENTS + 1
    assert max(files[CONFINEMENTS:]) <= max(files[: CONFINEMENTS + 1]) + 4
    assert max(threads) <= THREADS + 2


def test_a_busy_thread_removes_its_cgroup_when_it_ends() -> None:
    """Its caller left the call, so nobody counts as a user of the confinement."""

    def program(manager: RunningManager) -> tuple[bool, bool]:
        gate = threading.Event()
        with pytest.raises(Left):
            call(manager, "busy", leaving(gate.wait))
        for number in range(2 * CONFINEMENTS):
            call(manager, f"h{number}")
        stays = "p~busy" in groups(manager, "host")
        gate.set()
        return stays, soon(lambda: "p~busy" not in groups(manager, "host"), 10)

    assert local("thread", program) == (True, True)


def test_a_cgroup_that_others_keep_removing_leaves_no_descriptors() -> None:
    def program(manager: RunningManager) -> tuple[int, int]:
        call(manager, "a")
        before = descriptors()
        for _ in range(50):
            manager.instance.threaded("p~a").delete()
            call(manager, "a")
        return before, descriptors()

    before, after = local("inline", program)
    assert after <= before


def test_the_cgroups_of_a_killed_worker_are_removed_when_the_next_one_starts() -> None:
    def program() -> tuple[int, int]:
        settings = {
            "policy": {"p": {"isolation": "inline", "per": "host", "pids": 50}},
            "route": [{"policy": "p"}],
        }
        deployment = Manager(from_mapping({**settings, **BOUNDS}), server=Server(threads=False)).deploy()
        found = []
        try:
            for worker in range(4):
                pid = os.fork()
                if pid == 0:
                    manager = deployment.start()
                    for number in range(CONFINEMENTS):
                        call(manager, f"w{worker}-{number}")
                    os.kill(os.getpid(), signal.SIGKILL)
                os.waitpid(pid, 0)
                found.append(len(deployment.instance.host.children()))
        finally:
            deployment.close()
        return found[0], max(found)

    first, most = in_child(program)
    assert first == CONFINEMENTS
    assert most <= 2 * CONFINEMENTS


def test_a_removal_that_the_kernel_refuses_is_tried_again_and_logged_once() -> None:
    """The hierarchy is read-only for a while, in a mount namespace of its own."""

    def program() -> tuple[int, int, int, bool, int]:
        logged: list[str] = []

        class Handler(logging.Handler):
            def emit(self, record: logging.LogRecord) -> None:
                logged.append(record.getMessage())

        logging.getLogger("rcon").addHandler(Handler())
        cgroup = Hierarchy.discover().cgroup(f"/rcon-bounds-{os.getpid()}").create()
        mount = cgroup.mounts[0].path
        private_mounts()
        remount(mount, read_only=True)
        removals = Removals(lambda _: False, lambda _: False)
        try:
            removals.remove("p~a", cgroup)
            pending = removals.pending
            assert soon(lambda: removals.failures >= 4, 10)
            threads = threading.active_count()
        finally:
            remount(mount, read_only=False)
        gone = soon(lambda: not removals.pending and not cgroup.exists(), 10)
        assert soon(lambda: threading.active_count() < threads, 10)
        cgroup.delete()
        return pending, threads, removals.failures, gone, len(logged)

    pending, threads, failures, gone, logged = in_child(program)
    assert (pending, threads, gone, logged) == (1, 2, True, 1)
    assert failures >= 4


def test_a_removal_without_room_for_a_thread_waits_for_the_next(base: Cgroup) -> None:
    """The server has as many processes and threads as it may; when the next removal comes, there is room."""
    narrow, first, second = (base.child(name).create() for name in ("narrow", "first", "second"))
    narrow.configure(Resources(pids_max=1))

    def program() -> tuple[int, int, bool]:
        removals = Removals(lambda _: False, is_held=lambda _: True)
        removals.remove("p~first", first)
        found = removals.pending, threading.active_count()
        narrow.configure(Resources(pids_max=2))
        removals.remove("p~second", second)
        first.kill()
        second.kill()
        return *found, soon(lambda: not first.exists() and not second.exists(), 10)

    with running(first, sleep_forever), running(second, sleep_forever), running(narrow, program) as child:
        assert child.result() == (1, 1, True)


@pytest.mark.once
def test_a_server_without_room_for_a_thread_leaves_nothing(base: Cgroup) -> None:
    """It may have one process beside itself: the fork server, and then no thread that hears of its executors."""
    narrow = base.child("narrow").create()
    narrow.configure(Resources(pids_max=2))
    settings = from_mapping(
        {"policy": {"p": {"isolation": "process"}}, "cgroup": base.child("server").create().path}
    )

    def program() -> tuple[str, set[str], list[int], list[str]]:
        deployment = Manager(settings).deploy()
        before = open_files()
        try:
            message = ""
            try:
                deployment.start(serve)
            except KernelError as error:
                message = str(error)
            gc.collect()
            return message, open_files() - before, children(os.getpid()), deployment.instance.work.children()
        finally:
            deployment.close()

    with running(narrow, program) as child:
        message, files, processes, cgroups = child.result()
    assert "raise the limit on processes" in message
    assert (files, processes, cgroups) == (set(), [], [])


def open_files() -> set[str]:
    return {
        f"{entry.name} {entry.readlink()}" for entry in Path("/proc/self/fd").iterdir() if entry.is_symlink()
    }


MS_RDONLY, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 1, 32, 4096, 16384, 1 << 18


def private_mounts() -> None:
    """Give the calling process a mount namespace of its own, from which nothing gets out."""
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.unshare(0x00020000) == 0
    assert libc.mount(None, b"/", None, MS_REC | MS_PRIVATE, None) == 0


def remount(path: str, *, read_only: bool) -> None:
    """Make a mount point read-only for this mount namespace, or writable again."""
    libc = ctypes.CDLL(None, use_errno=True)
    flags = MS_REMOUNT | MS_BIND | (MS_RDONLY if read_only else 0)
    assert libc.mount(None, path.encode(), None, flags, None) == 0, os.strerror(ctypes.get_errno())
