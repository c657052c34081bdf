"""Where the tree of a process may be that is in another tree: by path alone."""

from __future__ import annotations

import pytest

from rcon_plugins.tree.nested import Location, combine_locations, is_within, location_of

OUTER = "/rcon/rcon-10-500"


@pytest.mark.parametrize(
    "path", ["/", "/rcon", "/user.slice/a.scope", "/rcon/rcon-tests-7", "/rcon-10/work/g/main"]
)
def test_outside_of_any_tree(path: str) -> None:
    assert location_of(path) is None


@pytest.mark.parametrize("inside", ["", "/host", "/work", "/attached"])
def test_a_servers_own_processes_have_no_limits(inside: str) -> None:
    assert location_of(f"{OUTER}{inside}") == Location("/rcon", None)
    assert location_of(f"/rcon-10-500-2{inside}") == Location("/", None)


@pytest.mark.parametrize("kind", ["work", "attached"])
def test_in_an_own_group_the_base_is_the_group(kind: str) -> None:
    group = f"{OUTER}/{kind}/backup-12"
    assert location_of(f"{group}/main") == Location(group, group)


@pytest.mark.parametrize(
    "inside", ["work/p/12-1", "work/p~key/12-1", "work/p", "taken/g", "work/g/main/deeper"]
)
def test_in_any_other_leaf_the_base_is_the_leaf(inside: str) -> None:
    path = f"{OUTER}/{inside}"
    assert location_of(path) == Location(path, path)


def test_a_program_started_by_a_thread_has_no_base() -> None:
    assert location_of(f"{OUTER}/host/p") == Location(None, f"{OUTER}/host/p")


def test_the_innermost_tree_decides() -> None:
    group = f"{OUTER}/work/g"
    inner = f"{group}/rcon-11-600"
    assert location_of(f"{inner}/work/h/main") == Location(f"{inner}/work/h", f"{inner}/work/h")
    assert location_of(f"{inner}/host") == Location(group, group)
    assert location_of(f"{OUTER}/work/p/12-1/rcon-11-600/host") == Location(
        f"{OUTER}/work/p/12-1", f"{OUTER}/work/p/12-1"
    )


def test_hierarchies_that_say_the_same() -> None:
    group = f"{OUTER}/work/g"
    assert combine_locations([f"{group}/main", f"{group}/main"]) == Location(group, group)
    assert combine_locations(["/", "/user.slice", None]) is None
    # Where one was not entered, that one sets no limits.
    assert combine_locations(["/", f"{group}/main", None]) == Location(group, group)


def test_for_io_the_group_stands_for_its_leaf() -> None:
    assert combine_locations([f"{OUTER}/work/g", f"{OUTER}/work/g/main"]) == Location(
        f"{OUTER}/work/g", f"{OUTER}/work/g"
    )
    leaf = f"{OUTER}/work/p/12-1"
    assert combine_locations([f"{OUTER}/work/p", leaf]) == Location(leaf, leaf)


def test_a_thread_that_entered_one_hierarchy() -> None:
    found = combine_locations([f"{OUTER}/host", f"{OUTER}/host/p", "/"])
    assert found == Location(None, f"{OUTER}/host/p")


def test_groups_outside_of_each_other_leave_no_base() -> None:
    found = combine_locations([f"{OUTER}/work/g/main", "/rcon/rcon-20-1/work/h/main"])
    assert found is not None
    assert found.base is None
    assert found.boundary in (f"{OUTER}/work/g", "/rcon/rcon-20-1/work/h")


def test_of_two_nested_groups_the_inner_counts() -> None:
    inner = f"{OUTER}/work/g/rcon-20-1/work/h"
    assert combine_locations([f"{OUTER}/work/g/main", f"{inner}/main"]) == Location(inner, inner)


def test_within() -> None:
    assert is_within("/a/b", "/a/b")
    assert is_within("/a/b/c", "/a/b")
    assert is_within("/a", "/")
    assert not is_within("/a/bc", "/a/b")
    assert not is_within("/a", "/a/b")
