"""Processes that begin in their cgroup: clone3(2) by its own hand."""

from __future__ import annotations

import ctypes
import errno
import gc
import os
import random
import select
import signal
import ssl
import sys
import threading
import uuid
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rcon_plugins.errors import KernelError
from rcon_plugins.kernel import syscalls
from rcon_plugins.kernel.cgroup import Cgroup, Resources
from rcon_plugins.kernel.clone import Cloner, CloneUnavailable
from tests.children import in_child

_PTHREAD_MUTEX_ROBUST = 1
_PROCESS_SHARED = 1


def of_child(cloner: Cloner, directory: str, look: Callable[[], str]) -> str:
    """Make a child there. Return what it says."""
    reading, writing = os.pipe()
    child = cloner.into(directory)
    if child.pid == 0:
        try:
            os.write(writing, look().encode())
        finally:
            os._exit(0)
    os.close(writing)
    told = b""
    while part := os.read(reading, 4096):
        told += part
    os.close(reading)
    os.close(child.pidfd)
    assert os.waitpid(child.pid, 0) == (child.pid, 0)
    return told.decode()


def in_group(group: Cgroup) -> str:
    directory = group.unified_directory
    assert directory is not None
    return directory


@pytest.mark.smoke
@pytest.mark.each_layout
def test_a_child_begins_in_the_cgroup(group: Cgroup) -> None:
    def program() -> tuple[str, str]:
        found = of_child(Cloner(), in_group(group), Path("/proc/self/cgroup").read_text)
        return found, Path("/proc/self/cgroup").read_text()

    child, parent = in_child(program)
    assert f"0::{group.path}" in child.splitlines()
    assert f"0::{group.path}" not in parent.splitlines()


def test_it_is_as_a_fork(group: Cgroup) -> None:
    """Its own thread id, signals blocked, no collector, threads that can start and end, and a fork of its own."""

    def look() -> str:
        said: list[str] = []
        thread = threading.Thread(target=lambda: said.append("thread"))
        thread.start()
        thread.join()
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, ())
        signal.pthread_kill(threading.get_ident(), 0)  # the C library looks up its own thread id
        own = threading.get_native_id() == os.getpid()
        pid = os.fork()
        if pid == 0:
            os._exit(7)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        return (
            f"{said[0]} {signal.SIGTERM in blocked} {own} {gc.isenabled()} {status} {os.getppid() == parent}"
        )

    def program() -> tuple[str, bool, bool]:
        found = of_child(Cloner(), in_group(group), look)
        return found, gc.isenabled(), signal.SIGTERM in signal.pthread_sigmask(signal.SIG_BLOCK, ())

    def outer() -> tuple[str, bool, bool]:
        global parent
        parent = os.getpid()
        return program()

    assert in_child(outer) == ("thread True True False 7 True", True, False)


parent = 0


def test_the_pidfd_is_that_of_the_child(group: Cgroup) -> None:
    def program() -> tuple[int, bool, bool]:
        child = Cloner().into(in_group(group))
        if child.pid == 0:
            signal.pause()
        inheritable = os.get_inheritable(child.pidfd)
        signal.pidfd_send_signal(child.pidfd, signal.SIGKILL)
        ready = bool(select.select([child.pidfd], [], [], 10)[0])
        return os.waitpid(child.pid, 0)[1], ready, inheritable

    assert in_child(program) == (signal.SIGKILL, True, False)


def test_the_owner_of_a_robust_mutex_that_dies_leaves_it_to_the_next(group: Cgroup) -> None:
    """The kernel finds it by a list that clone3 does not pass on."""

    def program() -> int:
        library = ctypes.CDLL(None)
        shared = ctypes.CDLL(None).mmap
        shared.restype = ctypes.c_void_p
        shared.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long)
        mutex = ctypes.c_void_p(shared(None, 4096, 3, 0x21, -1, 0))
        attributes = ctypes.create_string_buffer(64)
        library.pthread_mutexattr_init(attributes)
        library.pthread_mutexattr_setpshared(attributes, _PROCESS_SHARED)
        library.pthread_mutexattr_setrobust(attributes, _PTHREAD_MUTEX_ROBUST)
        assert library.pthread_mutex_init(mutex, attributes) == 0

        def die_with_it() -> str:
            assert library.pthread_mutex_lock(mutex) == 0
            return "locked"

        assert of_child(Cloner(), in_group(group), die_with_it) == "locked"
        return int(library.pthread_mutex_trylock(mutex))

    assert in_child(program) == errno.EOWNERDEAD


@pytest.mark.layout("v2")
def test_the_kernel_refuses_it_at_the_limit_on_processes(group: Cgroup) -> None:
    def program() -> Any:
        try:
            Cloner().into(in_group(group))
        except CloneUnavailable:
            return "unavailable"
        except KernelError as error:
            return error.errno
        os._exit(0)

    group.configure(Resources(pids_max=0))
    assert in_child(program) == errno.EAGAIN
    assert group.read().pids_limit_hits == 1


def test_a_cgroup_that_is_gone_says_so(group: Cgroup) -> None:
    gone = group.child("gone").create()
    directory = in_group(gone)
    gone.delete()

    def program() -> Any:
        try:
            Cloner().into(directory)
        except CloneUnavailable:
            return "unavailable"
        except KernelError as error:
            return error.errno
        os._exit(0)

    assert in_child(program) == errno.ENOENT


def test_it_is_unavailable_beside_threads_and_behind_a_filter(group: Cgroup) -> None:
    def beside_threads() -> str:
        thread = threading.Thread(target=threading.Event().wait, daemon=True)
        thread.start()
        try:
            Cloner()
        except CloneUnavailable as error:
            return str(error)
        return "made"

    def behind_a_filter() -> str:
        from rcon_plugins.kernel import seccomp

        cloner = Cloner()
        seccomp.forbid_leaving_cgroups()
        try:
            cloner.into(in_group(group))
        except CloneUnavailable as error:
            return str(error)
        os._exit(0)

    assert "thread id" in in_child(beside_threads)
    assert in_child(behind_a_filter) == "clone3: Function not implemented"


def test_unknown_machines_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "uname", lambda: SimpleNamespace(machine="vax"))
    syscalls._number.cache_clear()
    with pytest.raises(CloneUnavailable, match="vax"):
        Cloner()
    syscalls._number.cache_clear()


def test_an_openssl_that_needs_its_fork_handler_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "_ssl", SimpleNamespace(OPENSSL_VERSION_NUMBER=0x1010103F))
    with pytest.raises(CloneUnavailable, match="OpenSSL"):
        Cloner()


def test_two_children_have_other_random_numbers(group: Cgroup) -> None:
    def program() -> list[str]:
        ssl.RAND_bytes(8)

        def look() -> str:
            return f"{ssl.RAND_bytes(8).hex()} {uuid.uuid4()} {random.random()}"

        cloner = Cloner()
        return [of_child(cloner, in_group(group), look) for _ in range(2)]

    first, second = in_child(program)
    assert not set(first.split()) & set(second.split())
