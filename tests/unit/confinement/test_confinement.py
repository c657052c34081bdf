"""The names of confinements, and their slots."""

from __future__ import annotations

import os
import threading

from hypothesis import given
from hypothesis import strategies as st

from rcon_plugins.kernel.cgroup.branch import check_name
from rcon_plugins.tree.group_names import cgroup_name
from rcon_plugins.tree.locks import Allocation, ByteLocks, first_slot
from tests.children import in_child


def test_names_of_plain_keys_are_readable() -> None:
    assert cgroup_name("tenant", None) == "tenant"
    assert cgroup_name("tenant", "a.customers.example") == "tenant~a.customers.example"


@given(st.text(st.characters(), max_size=300) | st.from_regex(r"[a-z0-9.~/_-]{1,110}", fullmatch=True))
def test_names_are_never_paths_nor_too_long(key: str) -> None:
    name = cgroup_name("tenant", key)
    assert name.startswith("tenant~")
    assert check_name(name) == name
    assert not set(name) & set("/\0\n")
    assert len(name.encode()) < 200
    assert ".." not in name


@given(st.text(max_size=30), st.text(max_size=30))
def test_different_keys_never_share_a_name(one: str, other: str) -> None:
    assert (cgroup_name("p", one) == cgroup_name("p", other)) == (one == other)


def test_no_plain_key_has_a_hashed_name() -> None:
    hashed = cgroup_name("p", "Ü")
    assert cgroup_name("p", hashed.removeprefix("p~")) != hashed


def _slots() -> ByteLocks:
    return ByteLocks(os.memfd_create("test", os.MFD_CLOEXEC))


def test_slots_run_out_and_come_back() -> None:
    slots, first = _slots(), first_slot("p~a")
    held = slots.reserve_one(first, first + 2)
    assert held is not None
    assert slots.reserve_one(first, first + 2) is not None
    assert slots.reserve_one(first, first + 2) is None
    other = first_slot("p~b")
    assert slots.reserve_one(other, other + 2) is not None  # another confinement has slots of its own
    slots.release(held)
    slots.release(held)  # again is harmless
    assert slots.reserve_one(first, first + 2) is not None
    assert slots.reserve_one(first, first + 2) is None


def test_forks_share_slots_and_release_them_when_they_end() -> None:
    slots, first = _slots(), first_slot("p")
    mine = slots.reserve_one(first, first + 2)

    def other() -> tuple[bool, bool]:
        return slots.reserve_one(first, first + 2) is not None, slots.reserve_one(first, first + 2) is None

    assert in_child(other) == (True, True)
    assert slots.reserve_one(first, first + 2) is not None
    assert mine is not None


def test_threads_never_reserve_the_same_slot() -> None:
    slots, first = _slots(), first_slot("p")
    taken: list[Allocation | None] = []
    threads = [
        threading.Thread(
            target=lambda: taken.extend(slots.reserve_one(first, first + 100) for _ in range(10))
        )
        for _ in range(10)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({one.ranges[0] for one in taken if one is not None}) == 100
    assert slots.reserve_one(first, first + 100) is None
