"""Read and set the state of threads. Each call acts on the calling thread alone."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from rcon_plugins.errors import CapabilityError, KernelError
from rcon_plugins.kernel import capability
from rcon_plugins.kernel.capability import Capabilities, Ids, State, read_state

NONE = Capabilities.none()
SOME = Capabilities.of("chown", "kill", "setpcap")
KILL = Capabilities.of("kill")


def in_thread(function: Callable[..., Any], *arguments: Any) -> Any:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function, *arguments).result()


@pytest.mark.smoke
def test_the_state_is_that_of_the_standard_library() -> None:
    state = read_state()
    assert state.uids[:3] == os.getresuid()
    assert state.gids[:3] == os.getresgid()
    assert state.groups == tuple(sorted(os.getgroups()))
    assert state.effective <= state.permitted <= Capabilities.known()
    assert state.securebits == 0
    assert state.no_new_privs is False


def test_the_known_capabilities_are_those_of_the_kernel() -> None:
    last = int(Path("/proc/sys/kernel/cap_last_cap").read_text())
    assert len(Capabilities.known()) == last + 1


def test_the_state_of_other_threads_and_processes(in_child: Any) -> None:
    def child() -> tuple[State, State, State]:
        ready, end = threading.Event(), threading.Event()
        found: list[State] = []

        def other() -> None:
            capability.set_groups((3, 2, 1))
            capability.set_uids(7, 8, 9)
            found.append(read_state())
            ready.set()
            end.wait()

        thread = threading.Thread(target=other)
        thread.start()
        ready.wait()
        assert thread.native_id is not None
        seen = read_state(thread.native_id)
        end.set()
        thread.join()
        return found[0], seen, read_state(os.getpid())

    own, seen, of_process = in_child(child)
    assert own.uids == Ids(7, 8, 9, 8)
    assert own.groups == (1, 2, 3)
    assert own.effective == NONE  # because the effective uid changed from 0
    assert seen == own._replace(securebits=None)
    assert of_process.securebits == 0  # known, because it is the calling thread
    assert of_process.uids == Ids.all(0)


def test_the_state_of_a_parent(in_child: Any) -> None:
    assert in_child(read_state, os.getpid()) == read_state()._replace(securebits=None)


def test_a_missing_thread_has_no_state() -> None:
    with pytest.raises(KernelError, match="no process or thread has the id 4194305") as caught:
        read_state(4194305)
    assert caught.value.errno == errno.ESRCH


def raise_ambient(capabilities: Capabilities) -> None:
    capability.set_capabilities(SOME, SOME, SOME)
    capability.set_ambient(capabilities)


def lower_ambient() -> None:
    """Lower the ambient set, which is possible even if raising it is not."""
    raise_ambient(SOME)
    capability.set_securebits(capability.SECBIT_NO_CAP_AMBIENT_RAISE)
    capability.set_ambient(KILL)


def keep_no_capabilities() -> None:
    capability.set_keep_capabilities(True)
    capability.set_keep_capabilities(False)


SETTERS: dict[str, tuple[Callable[[], object], Callable[[State], object], object]] = {
    "groups": (lambda: capability.set_groups((7, 5)), lambda s: s.groups, (5, 7)),
    "no groups": (lambda: capability.set_groups(()), lambda s: s.groups, ()),
    "gids": (lambda: capability.set_gids(1, 2, 3), lambda s: s.gids, Ids(1, 2, 3, 2)),
    "one gid": (lambda: capability.set_gids(-1, 2, -1), lambda s: s.gids, Ids(0, 2, 0, 2)),
    "uids": (lambda: capability.set_uids(1, 2, 3), lambda s: s.uids, Ids(1, 2, 3, 2)),
    "one uid": (lambda: capability.set_uids(-1, -1, 4), lambda s: s.uids, Ids(0, 0, 4, 0)),
    "a high uid": (lambda: capability.set_uids(4294967294, 0, 0), lambda s: s.uids[0], 4294967294),
    "capabilities": (
        lambda: capability.set_capabilities(SOME, KILL, NONE),
        lambda s: (s.permitted, s.effective, s.inheritable),
        (SOME, KILL, NONE),
    ),
    "the highest capability": (
        lambda: capability.set_capabilities(*[Capabilities.of("checkpoint_restore")] * 3),
        lambda s: (s.permitted, s.effective, s.inheritable),
        (Capabilities.of(40),) * 3,
    ),
    "ambient": (lambda: raise_ambient(KILL), lambda s: s.ambient, KILL),
    "less ambient": (lower_ambient, lambda s: s.ambient, KILL),
    "bounding": (lambda: capability.drop_bounding(SOME), lambda s: s.bounding, SOME),
    "securebits": (lambda: capability.set_securebits(0x2F), lambda s: s.securebits, 0x2F),
    "keep capabilities": (
        lambda: capability.set_keep_capabilities(True),
        lambda s: s.securebits,
        capability.SECBIT_KEEP_CAPS,
    ),
    "keep no capabilities": (keep_no_capabilities, lambda s: s.securebits, 0),
    "no_new_privs": (capability.set_no_new_privs, lambda s: s.no_new_privs, True),
}


@pytest.mark.parametrize("name", SETTERS)
def test_each_is_set_for_the_calling_thread_alone(in_child: Any, name: str) -> None:
    act, look, wanted = SETTERS[name]

    def there() -> State:
        act()
        return read_state()

    def child() -> tuple[State, State, State]:
        before = read_state()
        return before, in_thread(there), read_state()

    before, changed, after = in_child(child)
    assert look(changed) == wanted
    assert after == before


def test_invalid_ids_are_refused_before_the_system_call() -> None:
    with pytest.raises(CapabilityError, match="-2 is not a uid"):
        capability.set_uids(-2, 0, 0)
    with pytest.raises(CapabilityError, match="4294967296 is not a gid"):
        capability.set_gids(0, 1 << 32, 0)
    with pytest.raises(CapabilityError, match="4294967295 is not a group"):
        capability.set_groups((4294967295,))
    with pytest.raises(CapabilityError, match="65537 supplementary groups are too many"):
        capability.set_groups(range(65537))


def nothing() -> None:
    capability.set_capabilities(NONE, NONE, NONE)


def nobody() -> None:
    capability.set_uids(9, 9, 9)


def locked() -> None:
    capability.set_securebits(0xAA)


def without_setpcap() -> None:
    some = Capabilities.of("chown")
    capability.set_capabilities(some, some, NONE)


def unbound() -> None:
    capability.drop_bounding(NONE)


def no_ambient() -> None:
    capability.set_securebits(capability.SECBIT_NO_CAP_AMBIENT_RAISE)
    capability.set_capabilities(SOME, SOME, SOME)


def inheriting() -> None:
    capability.set_capabilities(Capabilities.of("chown"), NONE, KILL)


REFUSED: list[tuple[Callable[[], object], Callable[[], object], str]] = [
    (nobody, lambda: capability.set_uids(0, 0, 0), "cannot change the uids to (0, 0, 0): cap_setuid is not effective"),
    (nobody, lambda: capability.set_uids(-1, 0, -1), "to (unchanged, 0, unchanged)"),
    (nobody, lambda: capability.set_gids(1, 1, 1), "cannot change the gids to (1, 1, 1): cap_setgid is not effective"),
    (nobody, lambda: capability.set_groups((1,)), "cannot change the supplementary groups to [1]"),
    (nothing, lambda: capability.set_capabilities(SOME, NONE, NONE), "cap_chown,cap_kill,cap_setpcap cannot become p"),
    (nothing, lambda: capability.drop_bounding(NONE), "cannot drop cap_chown from the bounding set"),
    (nothing, lambda: capability.set_securebits(1), "cannot set the securebits: cap_setpcap"),
    (int, lambda: capability.set_capabilities(NONE, KILL, NONE), "cap_kill cannot be effective without"),
    (without_setpcap, lambda: capability.set_capabilities(NONE, NONE, KILL), "cap_kill cannot become inh"),
    (unbound, lambda: capability.set_capabilities(SOME, SOME, KILL), "not in the bounding set"),
    (int, lambda: capability.set_ambient(KILL), "cap_kill cannot become ambient: it is not inheritable"),
    (inheriting, lambda: capability.set_ambient(KILL), "cap_kill cannot become ambient: it is not permitted"),
    (no_ambient, lambda: capability.set_ambient(KILL), "SECBIT_NO_CAP_AMBIENT_RAISE is set"),
    (locked, lambda: capability.set_keep_capabilities(True), "SECBIT_KEEP_CAPS_LOCKED is set"),
    (locked, lambda: capability.set_securebits(0), "from 0xaa to 0x0: the kernel has locked some"),
    (int, lambda: capability.set_securebits(1 << 20), "0x100000 has unknown securebits"),
]  # fmt: skip


@pytest.mark.parametrize(("prepare", "act", "words"), REFUSED, ids=[case[2] for case in REFUSED])
def test_a_refusal_says_why(
    in_child: Any, prepare: Callable[[], object], act: Callable[[], object], words: str
) -> None:
    def child() -> tuple[str, int | None, State, State]:
        prepare()
        before = read_state()
        try:
            act()
        except CapabilityError as error:
            return str(error), error.errno, before, read_state()
        raise AssertionError("it was not refused")

    message, number, before, after = in_child(child)
    assert words in message
    assert message.endswith(")"), "there is a remedy"
    assert number == errno.EPERM
    assert after == before
