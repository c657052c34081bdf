"""A process in a group with limits makes its tree inside of that group, or cannot make one."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rcon_plugins.errors import DelegationError
from rcon_plugins.kernel import proc
from rcon_plugins.kernel.cgroup import Cgroup, Hierarchy, IoMax, Resources, device_of
from rcon_plugins.kernel.syscalls import unshare
from rcon_plugins.tree.base import ROOT_BASE, find_base
from rcon_plugins.tree.instance import Instance
from tests import children
from tests.kernel.cgroup.helpers import DISK, layout, running, settings_of, sleep_forever

pytestmark = pytest.mark.each_layout

NOBODY = 65534
CLONE_NEWCGROUP = 0x02000000


@pytest.fixture
def outer(group: Cgroup) -> Cgroup:
    """Return the root of a tree that looks like that of another process."""
    return group.child(f"rcon-{os.getpid()}-{proc.start_time(os.getpid())}").create()


def own_paths() -> set[str]:
    """Return the paths of this process in v2 and in the hierarchies with controllers that rcon uses."""
    ours = {"cpu", "cpuset", "memory", "blkio", "pids", ""}
    lines = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    return {path for _, names, path in lines if set(names.split(",")) & ours}


def become(user: int) -> None:
    os.setgroups([])
    os.setresgid(user, user, user)
    os.setresuid(user, user, user)


def inside(place: Cgroup, act: Callable[[], Any], user: int | None = None) -> Any:
    """Return the result of ``act`` in a child that entered ``place`` and changed to ``user``."""

    def child() -> Any:
        place.enter_process()
        if user is not None:
            become(user)
        return act()

    return children.in_child(child)


def base() -> str:
    return find_base(Hierarchy.discover())


def refusal(setting: str | None = None) -> tuple[int | None, str]:
    with pytest.raises(DelegationError) as caught:
        find_base(Hierarchy.discover(), setting)
    return caught.value.errno, str(caught.value)


def a_tree_of_its_own() -> tuple[str, set[str]]:
    """Make a tree. Return its base, and the paths of a process in one of its leaves."""
    instance = Instance.create(Hierarchy.discover())
    if instance.needs_adoption:
        instance.adopt()
    leaf = instance.executor_cgroup("inner", "main").create()
    instance.policy_cgroup("inner").configure(Resources(pids_max=9))
    with running(leaf, own_paths) as child:
        seen = child.result()
    assert instance.close()
    return instance.base, seen


@pytest.mark.parametrize("kind", ["work", "attached"])
@pytest.mark.parametrize("user", [None, NOBODY])
def test_a_tree_inside_a_group(outer: Cgroup, kind: str, user: int | None) -> None:
    group = outer.child(kind).child("g")
    main = group.child("main").create()
    group.configure(Resources(pids_max=20))
    if user is not None:
        group.delegate(user, user)
        main.delegate(user, user)
    found, paths = inside(main, a_tree_of_its_own, user)
    assert found == group.path
    assert all(path.startswith(f"{group.path}/rcon-") and path.endswith("/work/inner/main") for path in paths)
    assert settings_of(group, "pids.max") == "20"
    assert group.children() == ["main"]


@pytest.mark.smoke
def test_a_tree_inside_a_nested_group(outer: Cgroup) -> None:
    group = outer.child("work").child("g")

    def deeper() -> tuple[str, str]:
        instance = Instance.create(Hierarchy.discover())
        found = inside(instance.executor_cgroup("h", "main").create(), base)
        expected = instance.policy_cgroup("h").path
        assert instance.close()
        return found, expected

    found, expected = inside(group.child("main").create(), deeper)
    assert found == expected
    assert found.startswith(f"{group.path}/rcon-")


def test_another_user_than_the_groups_is_refused(outer: Cgroup) -> None:
    main = outer.child("work").child("g").child("main").create()
    number, message = inside(main, refusal, NOBODY)
    assert number == errno.EACCES
    assert "rcon run --user nobody" in message


@pytest.mark.parametrize("setting", [ROOT_BASE, "/", "/rcon-tests-elsewhere"])
def test_no_setting_leads_out(outer: Cgroup, setting: str) -> None:
    group = outer.child("work").child("g")
    main = group.child("main").create()
    number, message = inside(main, lambda: refusal(setting))
    assert number == errno.EACCES
    assert f"do not set the cgroup {setting} here" in message
    deeper = f"{group.path}/below"
    assert inside(main, lambda: find_base(Hierarchy.discover(), deeper)) == deeper


def test_in_the_leaf_of_an_executor_inside_of_that(outer: Cgroup) -> None:
    """The limits of each request or task are on the leaf."""
    leaf = outer.child("work").child("p").child(f"{os.getpid()}-1").create()
    found, paths = inside(leaf, a_tree_of_its_own)
    assert found == leaf.path
    assert all(path.startswith(f"{leaf.path}/rcon-") for path in paths)


def test_a_tree_in_a_command_whose_own_cgroup_has_limits(outer: Cgroup) -> None:
    """A policy with `each` sets such limits. A tree beside the command would be outside of them."""
    main = outer.child("work").child("g").child("main").create()
    main.configure(Resources(pids_max=30))
    assert inside(main, a_tree_of_its_own)[0] == main.path


@pytest.mark.layout("v2")
def test_a_leaf_with_others_in_it_has_no_room(outer: Cgroup) -> None:
    leaf = outer.child("work").child("p").child(f"{os.getpid()}-1").create()
    with running(leaf, sleep_forever):
        number, message = inside(leaf, refusal)
    assert number == errno.EBUSY
    assert "each = ..." in message


def test_a_tree_in_a_program_started_by_a_thread_is_refused(outer: Cgroup) -> None:
    host = outer.child("host").create()
    threads = host.child("p").create(threaded=True)

    def enter() -> tuple[int | None, str]:
        if layout() == "v2":
            host.enter_process()
        with threads.entrance() as entrance:
            entrance.enter()
        return children.in_child(refusal)

    number, message = children.in_child(enter)
    assert number == errno.EOPNOTSUPP
    assert 'isolation = "process"' in message


@pytest.mark.layout("v1", "hybrid")
def test_io_limits_of_the_group_hold_for_a_tree_inside(outer: Cgroup) -> None:
    """On v1, IO limits do not hold for child cgroups, so no blkio child is made."""
    device = device_of(str(DISK))
    group = outer.child("work").child("g")
    main = group.child("main").create()
    group.configure(Resources(io={device: IoMax(wbps=1 << 22)}))

    def look() -> tuple[list[str], str, list[str]]:
        instance = Instance.create(Hierarchy.discover())
        asked = Resources(io={device: IoMax(wbps=1 << 20)}, pids_max=5)
        refused = [refusal.reason for refusal in instance.hierarchy.refusals(asked)]
        leaf = instance.executor_cgroup("inner", "main").create()
        with running(leaf, Path("/proc/self/cgroup").read_text) as child:
            text = child.result()
        blkio = next(line for line in text.splitlines() if ":blkio:" in line)
        assert instance.close()
        return refused, blkio.split(":")[2], Hierarchy.discover().cgroup(group.path).children()

    refused, blkio, children_of_group = inside(main, look)
    assert blkio == group.path
    assert children_of_group == ["main"]
    assert len(refused) == 1
    assert "blkio" in refused[0]
    assert group.path in refused[0]


@pytest.mark.layout("v1", "hybrid")
def test_io_limits_hold_at_any_depth(group: Cgroup) -> None:
    deep = group.child("a").child("b").child("c")
    group.configure(Resources(io={device_of(str(DISK)): IoMax(wbps=1 << 22)}))
    deep.create()
    with running(deep, Path("/proc/self/cgroup").read_text) as child:
        text = child.result()
    assert f":blkio:{group.path}\n" in text
    assert f":pids:{deep.path}\n" in text


def test_a_process_that_cannot_see_its_cgroup_gets_no_tree(group: Cgroup) -> None:
    def in_a_namespace() -> tuple[int | None, str]:
        unshare(CLONE_NEWCGROUP)
        return refusal()

    number, told = inside(group.child("held").create(), in_a_namespace)
    assert number == errno.EXDEV
    assert "cannot see its own cgroup" in told
