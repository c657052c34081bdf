"""`drop`: the rights that remain, that they cannot be regained, and that other threads do not change."""

from __future__ import annotations

import ctypes
import os
import socket
import subprocess
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from rcon_plugins.errors import CapabilityError, KernelError
from rcon_plugins.kernel import capability
from rcon_plugins.kernel.capability import Capabilities, Identity, Ids, State, drop, read_state
from rcon_plugins.kernel.capability.state import parse_status

NONE = Capabilities.none()
TENANT = Identity(12345, 12346, (12347, 12348))
KEPT = Capabilities.of("net_bind_service", "kill")


def become(*arguments: Any, **keywords: Any) -> State:
    """Drop privileges, and return the state."""
    drop(*arguments, **keywords)
    return read_state()


def assert_is(state: State, identity: Identity, keep: Capabilities = NONE, *, ambient: bool = False) -> None:
    assert state.uids == Ids.all(identity.uid)
    assert state.gids == Ids.all(identity.gid)
    assert state.groups == tuple(sorted(identity.groups))
    assert state.permitted == state.effective == state.bounding == keep
    assert state.inheritable == state.ambient == (keep if ambient else NONE)
    assert (state.securebits or 0) & capability.SECBIT_KEEP_CAPS == 0
    assert state.no_new_privs


@pytest.mark.smoke
def test_nothing_is_left(in_child: Any) -> None:
    assert_is(in_child(become, TENANT), TENANT)


@pytest.mark.parametrize("ambient", [False, True])
def test_kept_capabilities_are_held_afterwards(in_child: Any, ambient: bool) -> None:
    def child() -> State:
        return become(TENANT, KEPT, ambient=ambient)

    assert_is(in_child(child), TENANT, KEPT, ambient=ambient)


def test_root_without_capabilities(in_child: Any) -> None:
    """Root without capabilities still owns root's files, but gets no capability by execve."""
    assert_is(in_child(become, Identity(0, 0)), Identity(0, 0))


def test_without_an_identity_the_ids_stay(in_child: Any) -> None:
    def child() -> tuple[State, State]:
        capability.set_groups((5,))
        capability.set_uids(7, 0, 9)
        return read_state(), become(None, KEPT)

    before, after = in_child(child)
    assert (after.uids, after.gids, after.groups) == (before.uids, before.gids, before.groups)
    assert after.permitted == after.effective == after.bounding == KEPT


def ways_back() -> dict[str, Callable[[], object]]:
    root = Capabilities.of("setuid")
    libc = ctypes.CDLL(None, use_errno=True)

    def fs_id(call: Callable[[int], int]) -> None:
        call(0)
        if call(-1) != 0:
            raise KernelError("not changed")

    return {
        "setresuid": lambda: capability.set_uids(0, 0, 0),
        "the effective uid": lambda: capability.set_uids(-1, 0, -1),
        "the saved uid": lambda: capability.set_uids(-1, -1, 0),
        "setresgid": lambda: capability.set_gids(0, 0, 0),
        "the effective gid": lambda: capability.set_gids(-1, 0, -1),
        "setgroups": lambda: capability.set_groups((0,)),
        "no groups": lambda: capability.set_groups(()),
        "setfsuid": lambda: fs_id(libc.setfsuid),
        "setfsgid": lambda: fs_id(libc.setfsgid),
        "permitted": lambda: capability.set_capabilities(root, root, NONE),
        "inheritable": lambda: capability.set_capabilities(NONE, NONE, root),
        "ambient": lambda: capability.set_ambient(root),
        "securebits": lambda: capability.set_securebits(capability.SECBIT_NOROOT),
    }


def walk_back() -> dict[str, str]:
    """Try each way back. Return, for each, the name of the exception, or that it succeeded."""
    answers = {}
    for name, act in ways_back().items():
        try:
            act()
        except KernelError as error:
            answers[name] = type(error).__name__
        else:
            answers[name] = "went back"
    return answers


def test_dropped_rights_cannot_be_regained(in_child: Any) -> None:
    def child() -> tuple[dict[str, str], State, State]:
        drop(TENANT)
        before = read_state()
        return walk_back(), before, read_state()

    answers, before, after = in_child(child)
    assert {name for name, answer in answers.items() if answer == "went back"} == set()
    assert len(answers) == 13
    assert after == before


def test_eight_threads_eight_users(in_child: Any) -> None:
    """The other threads never change: neither the main thread, nor one started before, nor one started later."""

    def child() -> tuple[list[State], list[dict[str, str]], list[State], list[State]]:
        ready, end = threading.Barrier(9), threading.Event()
        witness_goes, witnessed = threading.Event(), []

        def tenant(number: int) -> tuple[State, dict[str, str]]:
            drop(Identity(20000 + number, 30000 + number, (40000 + number,)))
            ready.wait()
            answers = walk_back()
            end.wait()
            return read_state(), answers

        def witness() -> None:
            witnessed.append(read_state())
            witness_goes.wait()
            witnessed.append(read_state())

        earlier = threading.Thread(target=witness)
        earlier.start()
        before = read_state()
        with ThreadPoolExecutor(8) as pool:
            futures = [pool.submit(tenant, number) for number in range(8)]
            ready.wait()
            during = read_state()
            with ThreadPoolExecutor(1) as later:
                witnessed.append(later.submit(read_state).result())
            end.set()
            results = [future.result() for future in futures]
        witness_goes.set()
        earlier.join()
        return [r[0] for r in results], [r[1] for r in results], [before, during, read_state()], witnessed

    states, answers, of_main, witnessed = in_child(child, timeout=60)
    for number, state in enumerate(states):
        assert_is(state, Identity(20000 + number, 30000 + number, (40000 + number,)))
    assert {answer for each in answers for answer in each.values()} == {"CapabilityError", "KernelError"}
    assert len(set(of_main)) == 1
    assert set(witnessed) == set(of_main)
    assert len(witnessed) == 3


def test_permitted_is_enough(in_child: Any) -> None:
    """The three capabilities that `drop` needs need not be effective, and it raises no others meanwhile."""

    def child() -> State:
        now = read_state()
        capability.set_capabilities(now.permitted, NONE, NONE)
        return become(TENANT, KEPT)

    assert_is(in_child(child), TENANT, KEPT)


def test_without_setpcap_the_bounding_set_stays(in_child: Any) -> None:
    def child() -> tuple[State, State]:
        some = Capabilities.of("setuid", "setgid", "kill")
        capability.set_capabilities(some, NONE, NONE)
        return read_state(), become(TENANT, Capabilities.of("kill"))

    before, after = in_child(child)
    assert before.bounding
    assert after.bounding == before.bounding
    assert after.permitted == after.effective == Capabilities.of("kill")
    assert after.uids == Ids.all(TENANT.uid)


@pytest.mark.parametrize(
    "securebits",
    [
        capability.SECBIT_NO_SETUID_FIXUP,
        capability.SECBIT_KEEP_CAPS,
        capability.SECBIT_NOROOT,
        capability.SECBIT_NO_SETUID_FIXUP | capability.SECBIT_KEEP_CAPS_LOCKED,
    ],
)
def test_with_securebits(in_child: Any, securebits: int) -> None:
    def child() -> State:
        capability.set_securebits(securebits)
        return become(TENANT, KEPT, ambient=True)

    assert_is(in_child(child), TENANT, KEPT, ambient=True)


def test_no_new_privs_only_where_asked(in_child: Any) -> None:
    def child() -> State:
        return become(TENANT, no_new_privs=False)

    assert in_child(child).no_new_privs is False


def test_groups_in_any_order_and_twice(in_child: Any) -> None:
    def child() -> State:
        drop(Identity(5, 5, (9, 8, 9)), no_new_privs=False)
        return become(Identity(5, 5, (8, 9, 8, 8)))  # the same groups, so that it needs no privilege

    assert set(in_child(child).groups) == {8, 9}


def test_dropping_again_takes_no_privilege(in_child: Any) -> None:
    def child() -> tuple[State, State]:
        drop(TENANT, KEPT)
        return become(TENANT, Capabilities.of("kill")), become(None)

    fewer, none = in_child(child)
    assert fewer.permitted == Capabilities.of("kill")
    assert fewer.uids == none.uids == Ids.all(TENANT.uid)
    assert none.permitted == NONE


def refused(prepare: Callable[[], object], *arguments: Any, **keywords: Any) -> tuple[str, State, State]:
    """Return the message of a refused drop, and the state before and after it."""
    prepare()
    before = read_state()
    try:
        drop(*arguments, **keywords)
    except CapabilityError as error:
        return str(error), before, read_state()
    raise AssertionError("it was not refused")


def lock(bits: int) -> Callable[[], None]:
    return lambda: capability.set_securebits(bits)


def only(*names: str) -> Callable[[], None]:
    some = Capabilities.of(*names)
    return lambda: capability.set_capabilities(some, some, NONE)


def unbound() -> None:
    capability.drop_bounding(NONE)


REFUSED = [
    (lambda: drop(Identity(5, 6, (7,))), (Identity(8, 6, (7,)),), {}, "cap_setuid, to change the uid from 5 to 8"),
    (lambda: drop(Identity(5, 6, (7,))), (Identity(5, 8, (7,)),), {}, "cap_setgid, to change the gid from 6 to 8"),
    (lambda: drop(Identity(5, 6, (7,))), (Identity(5, 6, (8,)),), {}, "to change the groups from [7] to [8]"),
    (only("setuid"), (TENANT,), {}, "cap_setgid"),
    (only("setuid", "setgid"), (TENANT, KEPT), {}, "cannot keep cap_kill,cap_net_bind_service"),
    (lock(capability.SECBIT_KEEP_CAPS_LOCKED), (TENANT, KEPT), {}, "SECBIT_KEEP_CAPS is off and locked"),
    (
        lock(capability.SECBIT_NO_CAP_AMBIENT_RAISE),
        (TENANT, KEPT),
        {"ambient": True},
        "SECBIT_NO_CAP_AMBIENT_RAISE is set",
    ),
    (int, (Identity(-1, 5),), {}, "-1 is not a uid"),
    (int, (Identity(5, 4294967295),), {}, "4294967295 is not a gid"),
    (int, (Identity(5, 5, (-1,)),), {}, "-1 is not a group"),
    (unbound, (TENANT, KEPT), {"ambient": True}, "neither inheritable nor in the bounding set"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("prepare", "arguments", "keywords", "words"), REFUSED, ids=[case[3] for case in REFUSED]
)
def test_a_refused_drop_changes_nothing(
    in_child: Any, prepare: Callable[[], object], arguments: Any, keywords: Any, words: str
) -> None:
    def child() -> tuple[str, State, State]:
        return refused(prepare, *arguments, **keywords)

    message, before, after = in_child(child)
    assert words in message
    assert message.endswith(")"), "there is a remedy"
    assert after == before


@pytest.mark.parametrize("ambient", [False, True])
def test_only_ambient_capabilities_survive_execve(in_child: Any, ambient: bool) -> None:
    """Only ambient capabilities survive execve."""

    def child() -> bytes:
        drop(TENANT, KEPT, ambient=ambient)
        return subprocess.run(["cat", "/proc/self/status"], stdout=subprocess.PIPE, check=True).stdout

    held = parse_status(in_child(child))
    assert held.permitted == held.effective == (KEPT if ambient else NONE)
    assert held.uids == Ids.all(TENANT.uid)


def test_a_thread_with_net_bind_service_can_only_bind(in_child: Any, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("of root")
    secret.chmod(0o600)

    def child() -> list[str]:
        drop(TENANT, Capabilities.of("net_bind_service"))
        with socket.socket() as server:
            server.bind(("127.0.0.1", 81))
        answers = []
        for act in (
            secret.read_text,
            lambda: os.setuid(0),
            lambda: os.chroot("/"),
        ):
            try:
                act()
            except PermissionError:
                answers.append("refused")
        return answers

    assert in_child(child) == ["refused"] * 3
