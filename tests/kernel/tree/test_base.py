"""Find the base of the tree, or raise an error with the remedy."""

from __future__ import annotations

import ctypes
import errno
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from rcon_plugins.errors import DelegationError
from rcon_plugins.kernel.cgroup import Cgroup, Hierarchy, Resources
from rcon_plugins.tree.base import find_base
from rcon_plugins.tree.instance import Instance
from tests import children
from tests.kernel.cgroup.helpers import layout, running

pytestmark = pytest.mark.each_layout

NOBODY = 65534
CLONE_NEWNS = 0x00020000
CLONE_NEWCGROUP = 0x02000000


def delegation_error(act: Callable[[], object]) -> tuple[int | None, str]:
    with pytest.raises(DelegationError) as caught:
        act()
    return caught.value.errno, str(caught.value)


@pytest.mark.smoke
def test_the_base_of_root_is_made_and_removed() -> None:
    instance = Instance.create(Hierarchy.discover())
    assert instance.base == "/rcon"
    assert not instance.needs_adoption
    assert instance.close()


def test_the_setting_comes_first(group: Cgroup, hierarchy: Hierarchy) -> None:
    assert find_base(hierarchy, f"{group.path}/deeper/base") == f"{group.path}/deeper/base"
    assert hierarchy.cgroup(f"{group.path}/deeper/base").exists()
    with pytest.raises(ValueError, match="path"):
        find_base(hierarchy, "/a/../b")


def _alone_in_our_own(group: Cgroup) -> list[str]:
    group.enter_process()
    hierarchy = Hierarchy.discover()
    seen = [find_base(hierarchy)]
    instance = Instance.create(hierarchy)
    seen.append(str(instance.needs_adoption))
    instance.adopt()
    leaf = instance.executor_cgroup("p", "1-1").create()
    instance.policy_cgroup("p").configure(Resources(memory_max=1 << 26, pids_max=5))
    with running(leaf, os.getpid) as child:
        child.result()
    instance.sweep("1-")
    threaded = instance.threaded("t").create()
    threaded.configure(Resources(cpu_quota=0.5))
    threaded.delete()
    assert instance.close()
    seen.append(Path("/proc/self/cgroup").read_text())
    return seen


@pytest.mark.layout("v2")
def test_our_own_cgroup_if_we_are_alone_in_it(group: Cgroup) -> None:
    own = group.child("unit", shared=False).create()
    base, needs_adoption, after = children.in_child(_alone_in_our_own, own)
    assert (base, needs_adoption) == (own.path, "True")
    assert after == f"0::{own.path}\n"
    assert own.children() == []


def _alone_per_hierarchy(group: Cgroup) -> str:
    group.enter_process()
    return find_base(Hierarchy.discover())


@pytest.mark.layout("v1", "hybrid")
def test_our_own_cgroup_on_v1_if_it_is_one_path(group: Cgroup) -> None:
    assert children.in_child(_alone_per_hierarchy, group.child("unit").create()) == f"{group.path}/unit"


def _nobody(group: Cgroup | None) -> tuple[int | None, str]:
    if group is not None:
        group.enter_process()
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)
    hierarchy = Hierarchy.discover()
    return delegation_error(lambda: find_base(hierarchy, "/rcon-tests-nobody" if group is None else None))


@pytest.mark.parametrize("inside", [True, False])
def test_nothing_delegated(group: Cgroup, inside: bool) -> None:
    number, message = children.in_child(_nobody, group if inside else None)
    assert number == errno.EACCES
    assert ("chown nobody /sys/fs/cgroup" in message) or ("systemd-run --user" in message)
    assert "/cgroup.procs" in message or "Delegate=" in message


def _read_only() -> tuple[int | None, str]:
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.unshare(CLONE_NEWNS) == 0
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    for mount in Hierarchy.discover().mounts:
        subprocess.run(["mount", "-o", "remount,bind,ro", mount.path], check=True)
    return delegation_error(lambda: Instance.create(Hierarchy.discover()))


def test_a_read_only_file_system() -> None:
    number, message = children.in_child(_read_only)
    assert number == errno.EROFS
    assert "read-only" in message
    assert "docker run --cgroupns=private" in message
    assert "mount -o remount,rw /sys/fs/cgroup" in message


def _full_base(group: Cgroup) -> tuple[int | None, str]:
    return delegation_error(lambda: Instance.create(Hierarchy.discover(), base=f"{group.path}/base"))


@pytest.mark.layout("v2")
def test_a_cgroup_with_processes_passes_nothing_on(group: Cgroup) -> None:
    """This happens in a container whose root cgroup has a shell beside the server."""
    full = group.child("container").create()

    def inside() -> tuple[int | None, str]:
        full.enter_process()
        return _full_base(full)

    number, message = children.in_child(inside)
    assert number == errno.EBUSY
    assert "only process of the container" in message


def _second_of_an_adopted(group: Cgroup) -> tuple[str, str]:
    group.enter_process()
    first = Instance.create(Hierarchy.discover())
    first.adopt()
    second = Instance.create(Hierarchy.discover())
    second.adopt()
    leaf = second.executor_cgroup("p", "1-1").create()
    with running(leaf, os.getpid) as child:
        child.result()
    second.sweep("1-")
    assert second.close()
    assert first.close()
    return first.base, second.base


def test_a_server_in_the_tree_of_another_uses_the_same_base(group: Cgroup) -> None:
    own = group.child("unit").create()
    assert children.in_child(_second_of_an_adopted, own) == (own.path, own.path)
    assert own.children() == []


def _as_in_a_container(group: Cgroup) -> tuple[str, bool, str]:
    group.enter_process()
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.unshare(CLONE_NEWNS | CLONE_NEWCGROUP) == 0
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    subprocess.run(["umount", "--lazy", "/sys/fs/cgroup"], check=True)
    subprocess.run(["mount", "-t", "cgroup2", "none", "/sys/fs/cgroup"], check=True)
    hierarchy = Hierarchy.discover()
    instance = Instance.create(hierarchy)
    adoption = instance.needs_adoption
    instance.adopt()
    leaf = instance.executor_cgroup("p", "1-1").create()
    leaf.configure(Resources(memory_max=1 << 26, pids_max=5))
    with running(leaf, os.getpid) as child:
        child.result()
    instance.sweep("1-")
    assert instance.close()
    return instance.base, adoption, Path("/proc/self/cgroup").read_text()


@pytest.mark.layout("v2")
def test_the_root_of_a_containers_tree(group: Cgroup) -> None:
    own = group.child("container").create()
    assert children.in_child(_as_in_a_container, own) == ("/", True, "0::/\n")
    assert own.children() == []


@pytest.mark.layout("hybrid")
def test_a_hybrid_whose_v2_side_is_read_only_goes_without(group: Cgroup) -> None:
    """The limits are on v1. Processes are killed one by one then."""
    assert layout() == "hybrid"
    seen = children.in_child(_without_v2, group.path)
    assert not any("/unified/" in directory for directory in seen)


def _without_v2(base: str) -> list[str]:
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.unshare(CLONE_NEWNS) == 0
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    unified = Hierarchy.discover().unified
    assert unified is not None
    subprocess.run(["mount", "-o", "remount,bind,ro", unified.path], check=True)
    instance = Instance.create(Hierarchy.discover(), base=f"{base}/sub")
    leaf = instance.executor_cgroup("p", "1-1").create()
    with running(leaf, os.getpid) as child:
        child.result()
    instance.sweep("1-")
    directories = leaf.directories
    assert instance.close()
    return directories
