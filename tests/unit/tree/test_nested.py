"""Where the tree of a process may be that is in another tree: by path alone."""

from __future__ import annotations

import pytest

from rcon_plugins.tree.nested import Place, is_within, place_among, place_of

OUTER = "/rcon/rcon-10-500"


@pytest.mark.parametrize(
    "path", ["/", "/rcon", "/user.slice/a.scope", "/rcon/rcon-tests-7", "/rcon-10/work/g/main"]
)
def test_outside_of_any_tree(path: str) -> None:
    assert place_of(path) is None


@pytest.mark.parametrize("inside", ["", "/host", "/work", "/taken"])
def test_a_servers_own_processes_have_no_limits(inside: str) -> None:
    assert place_of(f"{OUTER}{inside}") == Place("/rcon", None)
    assert place_of(f"/rcon-10-500-2{inside}") == Place("/", None)


@pytest.mark.parametrize("kind", ["work", "taken"])
def test_in_a_group_of_its_own_the_group(kind: str) -> None:
    group = f"{OUTER}/{kind}/backup-12"
    assert place_of(f"{group}/main") == Place(group, group)


@pytest.mark.parametrize(
    "inside", ["work/p/12-1", "work/p~key/12-1", "work/p", "taken/g", "work/g/main/deeper"]
)
def test_in_any_other_leaf_the_leaf(inside: str) -> None:
    path = f"{OUTER}/{inside}"
    assert place_of(path) == Place(path, path)


def test_what_a_thread_started_has_no_place() -> None:
    assert place_of(f"{OUTER}/host/p") == Place(None, f"{OUTER}/host/p")


def test_the_innermost_tree_decides() -> None:
    group = f"{OUTER}/work/g"
    inner = f"{group}/rcon-11-600"
    assert place_of(f"{inner}/work/h/main") == Place(f"{inner}/work/h", f"{inner}/work/h")
    assert place_of(f"{inner}/host") == Place(group, group)
    assert place_of(f"{OUTER}/work/p/12-1/rcon-11-600/host") == Place(
        f"{OUTER}/work/p/12-1", f"{OUTER}/work/p/12-1"
    )


def test_hierarchies_that_say_the_same() -> None:
    group = f"{OUTER}/work/g"
    assert place_among([f"{group}/main", f"{group}/main"]) == Place(group, group)
    assert place_among(["/", "/user.slice", None]) is None
    # Where one was not entered, that one sets no limits.
    assert place_among(["/", f"{group}/main", None]) == Place(group, group)


def test_for_io_the_group_stands_for_its_leaf() -> None:
    assert place_among([f"{OUTER}/work/g", f"{OUTER}/work/g/main"]) == Place(
        f"{OUTER}/work/g", f"{OUTER}/work/g"
    )
    leaf = f"{OUTER}/work/p/12-1"
    assert place_among([f"{OUTER}/work/p", leaf]) == Place(leaf, leaf)


def test_a_thread_that_entered_one_hierarchy() -> None:
    found = place_among([f"{OUTER}/host", f"{OUTER}/host/p", "/"])
    assert found == Place(None, f"{OUTER}/host/p")


def test_groups_that_are_not_inside_of_each_other_leave_no_place() -> None:
    found = place_among([f"{OUTER}/work/g/main", "/rcon/rcon-20-1/work/h/main"])
    assert found is not None
    assert found.base is None
    assert found.boundary in (f"{OUTER}/work/g", "/rcon/rcon-20-1/work/h")


def test_one_inside_of_the_other_is_the_narrower() -> None:
    inner = f"{OUTER}/work/g/rcon-20-1/work/h"
    assert place_among([f"{OUTER}/work/g/main", f"{inner}/main"]) == Place(inner, inner)


def test_within() -> None:
    assert is_within("/a/b", "/a/b")
    assert is_within("/a/b/c", "/a/b")
    assert is_within("/a", "/")
    assert not is_within("/a/bc", "/a/b")
    assert not is_within("/a", "/a/b")
