"""Names of groups: what they tell, and which group they are the name of."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rcon_plugins.errors import KernelError, UnknownGroup
from rcon_plugins.groups.find import Group, Kind, Owner, find_group, with_labels
from rcon_plugins.kernel.cgroup import Hierarchy
from rcon_plugins.kernel.cgroup.mounts import Mount
from rcon_plugins.kernel.files import gone
from rcon_plugins.tree.group_names import cgroup_name, split_name

HIERARCHY = Hierarchy.of([Mount(2, "/nowhere", controllers=frozenset({"cpu"}))])
OWNER = Owner(1, alive=True, uid=0, command="init")


def group(name: str, kind: Kind = "work", instance: str = "rcon-1-10", base: str = "/rcon") -> Group:
    cgroup = HIERARCHY.cgroup(f"{base}/{instance}/{kind}/{name}")
    return Group(name, kind, instance, cgroup, OWNER, "", *split_name(name))


@given(
    st.from_regex(r"[a-z][a-z0-9_-]{0,20}", fullmatch=True),
    st.one_of(st.none(), st.from_regex(r"[a-z0-9][a-z0-9_-]{0,20}", fullmatch=True), st.text(min_size=1)),
    st.integers(0, 3),
)
def test_policy_and_key_are_read_out_of_a_name(policy: str, key: str | None, generation: int) -> None:
    told = split_name(cgroup_name(policy, key, generation))
    if key is None:
        assert told == (None, None)  # it may be a policy's, or a command's
    else:
        assert told[0] == policy
        assert told[1] in (key, None)  # None: kept as a hash


def test_keys_are_read_out_of_names() -> None:
    assert split_name("tenant~a.example") == ("tenant", "a.example")
    assert split_name("tenant.2~a.example") == ("tenant", "a.example")
    assert split_name(cgroup_name("tenant", "A/../b")) == ("tenant", None)
    assert split_name("sleep-1234") == split_name("~x") == split_name("x~") == (None, None)


def test_the_shortest_label_that_names_one() -> None:
    found = with_labels(
        [
            group("a"),
            group("b"),
            group("b", instance="rcon-2-20"),
            group("c", "host"),
            group("c", "work"),
            group("d", base="/one"),
            group("d", base="/two"),
        ]
    )
    assert [one.label for one in found] == [
        "a",
        "rcon-1-10/b",
        "rcon-2-20/b",
        "rcon-1-10/host/c",
        "rcon-1-10/work/c",
        "/one/rcon-1-10/work/d",
        "/two/rcon-1-10/work/d",
    ]
    assert [find_group(one.label, found) for one in found] == found
    assert find_group("rcon-1-10/a", found).name == "a"
    assert find_group("rcon-1-10/work/a", found).name == "a"
    assert find_group("/rcon/rcon-1-10/work/a", found).name == "a"


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("tenant~a.exmple", "there is no group 'tenant~a.exmple' (did you mean tenant~a.example?)"),
        ("b", "'b' names 2 groups (one of: rcon-1-10/b, rcon-2-20/b)"),
        ("zzzz", "there is no group 'zzzz' (rcon ls lists all groups)"),
        ("", "there is no group '' (rcon ls lists all groups)"),
        ("../a\0", "there is no group '../a\\x00' (rcon ls lists all groups)"),
    ],
)
def test_unknown_and_ambiguous_names(name: str, says: str) -> None:
    known = with_labels([group("tenant~a.example"), group("b"), group("b", instance="rcon-2-20")])
    with pytest.raises(UnknownGroup) as caught:
        find_group(name, known)
    assert str(caught.value) == says


def test_gone_distinguishes_missing_from_refused() -> None:
    assert [gone(KernelError("x", errno=number)) for number in (2, 19, 3, 13)] == [True, True, True, False]
