"""Delegated cgroups: delegated by hand with the printed remedy, or by systemd, which marks them."""

from __future__ import annotations

import errno
import os
import subprocess
from pathlib import Path

import pytest

from rcon_plugins import Manager, Server, Work, confine
from rcon_plugins.confinement.admission import InlineAdmission
from rcon_plugins.errors import DelegationError
from rcon_plugins.kernel.cgroup import Cgroup, Hierarchy, Resources
from rcon_plugins.settings.file import from_mapping
from rcon_plugins.tree import base as tree_base
from rcon_plugins.tree.base import find_base, own_cgroup, remedy
from rcon_plugins.tree.instance import Instance
from tests import children
from tests.kernel.cgroup.helpers import layout, running, settings_of, sleep_forever

pytestmark = pytest.mark.each_layout

NOBODY = 65534


def become_nobody() -> None:
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)


def remedy_for_nobody(path: str) -> str:
    become_nobody()
    hierarchy = Hierarchy.discover()
    return remedy(hierarchy, path, own_cgroup(hierarchy))


def follow(text: str) -> None:
    """Run the commands of the remedy as root, with this process as the shell that starts the server."""
    first, *steps, last = text.split("; ")
    assert first.startswith("run the server as root, or run once as root: ")
    assert last.startswith("and set cgroup = ")
    for step in (first.partition("as root: ")[2], *steps):
        subprocess.run(
            ["sh", "-ec", step.replace("PID-OF-THE-SHELL-THAT-STARTS-IT", str(os.getpid()))], check=True
        )


def every_limit_in(setting: str | None) -> tuple[str, str, str]:
    instance = Instance.create(Hierarchy.discover(), setting)
    if instance.needs_adoption:
        instance.adopt()
    leaf = instance.executor_cgroup("g", "main").create()
    limits = Resources(cpu_quota=0.5, cpus="0", memory_max=1 << 26, pids_max=9)
    instance.policy_cgroup("g").configure(limits)
    with running(leaf, os.sched_getaffinity, 0) as child:
        assert child.result() == {0}
    found = settings_of(instance.policy_cgroup("g"), "pids.max")
    path = instance.path
    assert instance.close()
    return instance.base, path, found


@pytest.mark.parametrize("deeper", ["", "/deeper"])
def test_the_printed_remedy_is_enough(group: Cgroup, deeper: str) -> None:
    """This includes limits of cpus: a new v1 cpuset is empty, and no process can enter it."""
    path = f"{group.path}/given{deeper}"

    def act() -> tuple[str, str, str]:
        follow(children.in_child(remedy_for_nobody, path))
        become_nobody()
        return every_limit_in(path)

    base, tree, pids = children.in_child(act)
    assert base == path
    assert tree.startswith(f"{path}/rcon-")
    assert pids == "9"


@pytest.mark.smoke
def test_root_keeps_a_base_that_it_gave_to_a_user(group: Cgroup, monkeypatch: pytest.MonkeyPatch) -> None:
    """The printed remedy names root's own base. Root removes that after its last use, but not if a user owns it."""
    path = f"{group.path}/base"
    monkeypatch.setattr(tree_base, "ROOT_BASE", path)
    hierarchy = Hierarchy.discover()
    base = hierarchy.cgroup(path, shared=True)
    assert Instance.create(hierarchy, path).close()
    assert not base.exists()

    in_use = Instance.create(hierarchy, path)
    printed = children.in_child(remedy_for_nobody, path)
    assert in_use.close()
    assert not base.exists()

    def act() -> list[str]:
        follow(printed)
        assert Instance.create(hierarchy, path).close()
        become_nobody()
        return [every_limit_in(path)[0], every_limit_in(path)[0]]

    assert children.in_child(act) == [path, path]
    assert all(Path(directory).stat().st_uid == NOBODY for directory in base.directories)
    assert Instance.create(hierarchy, path).close()
    assert base.exists()


@pytest.mark.layout("v1", "hybrid")
def test_threads_of_an_ordinary_user_come_back_on_v1(group: Cgroup) -> None:
    """Threads return to the tree, and at the end to the delegated cgroup; not to where root started the server."""
    uid = 1_000_000 + os.getpid()  # no other test delegates a cgroup to this user
    given = group.child("given").create()
    given.delegate(uid, uid)
    path = given.path

    def where() -> str:
        lines = Path("/proc/thread-self/cgroup").read_text().splitlines()
        return next(line.split(":", 2)[2] for line in lines if ":pids:" in line)

    def act() -> list[str]:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
        seen = [where()]
        settings = from_mapping({"cgroup": path, "policy": {"default": {"pids": 50}}})
        manager = Manager(settings, server=Server(threads=False)).start()
        admission = manager.admit(Work("call", "x"))
        assert isinstance(admission, InlineAdmission)
        for _ in range(2):
            with admission.entered():
                seen.append(where())
            seen.append(where())
        admission.finish()
        manager.close()
        for _ in range(2):
            with confine(pids=40):
                seen.append(where())
            seen.append(where())
        return seen

    before, inside, out, again, out_again, *blocks = children.in_child(act)
    tree = out.removesuffix("/host")
    assert not before.startswith(path)
    assert tree.startswith(f"{path}/rcon-")
    assert (inside, again, out_again) == (f"{tree}/host/default", inside, out)
    assert "/host/confine~" in blocks[0]
    assert blocks[1::2] == [path, path]
    assert given.children() == []


@pytest.mark.layout("v2")
def test_without_a_setting_the_cgroup_around_the_shell_is_the_base(group: Cgroup) -> None:
    path = f"{group.path}/given"

    def act() -> list[str]:
        follow(children.in_child(remedy_for_nobody, path))
        become_nobody()
        alone = every_limit_in(None)[0]
        with running(None, sleep_forever):
            beside_another = every_limit_in(None)[0]
        return [alone, beside_another]

    assert children.in_child(act) == [path, path]


def test_a_directory_of_root_is_not_used_as_a_base(group: Cgroup) -> None:
    """A directory of root that contains the user's directory does not belong to the user."""
    own = group.child("around").child("server").create()
    own.delegate(NOBODY, NOBODY)

    def act() -> str:
        own.enter_process()
        become_nobody()
        with running(None, sleep_forever), pytest.raises(DelegationError) as caught:
            find_base(Hierarchy.discover())
        return str(caught.value)

    expected = "no cgroup is delegated to this process" if layout() == "v2" else own.path
    said = children.in_child(act) if layout() == "v2" else children.in_child(alone_on_v1, own)
    assert expected in said


def alone_on_v1(own: Cgroup) -> str:
    """Return the base on v1, where a cgroup with processes can have children.

    Only the process's own cgroup is sure to belong to its user.
    """
    own.enter_process()
    become_nobody()
    return find_base(Hierarchy.discover())


@pytest.mark.parametrize("mark", ["trusted.delegate", "user.delegate"])
def test_a_unit_with_a_subgroup_for_its_processes(group: Cgroup, mark: str) -> None:
    """systemd 254 makes such a subgroup with Delegate= and DelegateSubgroup=. It may contain several processes."""
    unit = group.child("site.service")
    own = unit.child("main").create()
    for directory in unit.directories:
        os.setxattr(directory, mark, b"1")

    def act() -> str:
        own.enter_process()
        with running(None, sleep_forever):
            return every_limit_in(None)[0]

    assert children.in_child(act) == unit.path
    assert unit.children() == ["main"]


def test_a_scope_comes_after_a_delegated_cgroup_and_before_the_base_of_root(group: Cgroup) -> None:
    asked: list[str] = []

    def ask() -> None:
        asked.append(Path("/proc/self/cgroup").read_text())
        raise DelegationError("nobody home", errno=errno.ENOENT, hint="call again")

    assert find_base(Hierarchy.discover(), f"{group.path}/set", ask) == f"{group.path}/set"
    assert asked == []
    own = group.child("own").create()

    def alone() -> tuple[str, int]:
        own.enter_process()
        return find_base(Hierarchy.discover(), None, ask), len(asked)

    assert children.in_child(alone) == (own.path, 0)

    def refused() -> tuple[str, int]:
        own.enter_process()
        become_nobody()
        with pytest.raises(DelegationError) as caught:
            find_base(Hierarchy.discover(), None, ask)
        return str(caught.value), len(asked)

    message, times = children.in_child(refused)
    assert times == (1 if layout() == "v2" else 0)
    assert ("nobody home" in message) == (layout() == "v2")


def test_in_a_group_with_limits_systemd_is_not_asked(group: Cgroup) -> None:
    """A scope of systemd would be outside of the group."""
    main = group.child("rcon-1-1").child("work").child("g").child("main").create()

    def act() -> str:
        main.enter_process()
        return find_base(Hierarchy.discover(), None, lambda: pytest.fail("was asked"))

    assert children.in_child(act) == f"{group.path}/rcon-1-1/work/g"
