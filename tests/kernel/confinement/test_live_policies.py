"""Other limits for a policy while work runs under it, in the kernel that there is."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rcon_plugins import Deployment, Manager, RunningManager
from rcon_plugins.confinement.live_policies import Change
from rcon_plugins.errors import SettingsError
from rcon_plugins.kernel.cgroup import MAX, IoMax, read_limits
from rcon_plugins.settings.file import from_mapping
from tests.kernel.cgroup.helpers import DISK, eventually
from tests.kernel.executors.service import ask, begin, end, serve

pytestmark = pytest.mark.each_layout

MIB = 2**20


@pytest.fixture
def gate(tmp_path: Path) -> Path:
    """The file that work waits for which runs meanwhile."""
    return tmp_path / "gate"


class Site:
    """A running manager with one policy, `p`, and the deployment that changes it."""

    def __init__(self, manager: RunningManager, deployment: Deployment) -> None:
        self.manager = manager
        self._deployment = deployment

    def set(self, key: str, value: str) -> Change:
        return self._deployment.change("p", key, value)


@contextlib.contextmanager
def site(policy: dict[str, Any]) -> Iterator[Site]:
    settings = from_mapping({"policy": {"p": policy}, "route": [{"policy": "p"}]})
    deployment = Manager(settings).deploy(changeable=True)
    try:
        manager = deployment.start(serve)
        try:
            yield Site(manager, deployment)
        finally:
            manager.close()
    finally:
        deployment.close()


@pytest.mark.smoke
def test_a_limit_of_running_work_is_removed(gate: Path) -> None:
    with site({"memory": "200M", "cpu": "50%", "each": {"memory": "100M", "pids": 20}}) as here:
        work = begin(here.manager, "wait_for", str(gate))
        group = work.group
        (leaf,) = [group.child(name) for name in group.children()]
        assert (here.set("cpu", "max").old, here.set("memory", "max").new) == ("50%", None)
        assert (read_limits(group).cpu_quota, read_limits(group).memory_max) == (MAX, MAX)
        made = here.set("each.memory", "max")
        assert (made.cgroups, made.kept) == (1, 0)
        assert here.set("each.pids", "max").old == 20
        assert (read_limits(leaf).memory_max, read_limits(leaf).pids_max) == (MAX, MAX)
        gate.touch()
        assert end(work)[1].ending == "ok"
        assert ask(here.manager, "allocate", 150)[1].ending == "ok"


@pytest.mark.measures(each_layout=True)
def test_the_first_io_limit_of_running_work(gate: Path) -> None:
    """On v1 what runs is moved to where they hold; it goes on, and so does what begins beside it."""
    with site({"each": {"timeout": "100s"}}) as here:
        path = DISK / f"rcon-changes-{os.getpid()}"
        work, other = (begin(here.manager, "wait_for", str(gate)) for _ in range(2))
        group = work.group
        made = here.set(f"io.{DISK}.write", "4M")
        assert (made.old, made.new, made.cgroups, made.kept) == (None, "4M", 1, 0)
        (most,) = read_limits(group).io.values()
        assert most.wbps == 4 * MIB
        try:
            rate, outcome = ask(here.manager, "write_directly", str(path), 8)
        finally:
            path.unlink(missing_ok=True)
        assert outcome.ending == "ok"
        assert rate < 8 * MIB
        gate.touch()
        assert [end(one)[1].ending for one in (work, other)] == ["ok", "ok"]
        # One key of two, and none of both.
        assert here.set(f"io.{DISK}.read_iops", "100").new == 100
        assert here.set(f"io.{DISK}.write", "max").old == "4M"
        gate.unlink()
        work = begin(here.manager, "wait_for", str(gate))
        (most,) = read_limits(group).io.values()
        assert most.riops == 100
        assert most.wbps in (None, MAX)
        assert here.set(f"io.{DISK}", "max").old == {"read_iops": 100}
        assert all(rates == IoMax() or set(rates) <= {MAX, None} for rates in read_limits(group).io.values())
        gate.touch()
        assert end(work)[1].ending == "ok"


def test_io_limits_of_each(gate: Path) -> None:
    with site({"each": {"timeout": "100s"}}) as here:
        work = begin(here.manager, "wait_for", str(gate))
        group = work.group
        (leaf,) = [group.child(name) for name in group.children()]
        made = here.set(f"each.io.{DISK}", '{ write = "4M", read = "8M" }')
        assert (made.cgroups, made.kept, made.new) == (1, 0, {"read": "8M", "write": "4M"})
        (most,) = read_limits(leaf).io.values()
        assert (most.wbps, most.rbps) == (4 * MIB, 8 * MIB)
        gate.touch()
        assert end(work)[1].ending == "ok"


def test_each_memory_changed_to_expand(gate: Path) -> None:
    """And then to another bound, and then no more: for what begins. What runs has the bound at once."""
    table = '{ limit = "48M", expand = "2x", up_to = "%s" }'
    with site({"memory": "300M", "each": {"memory": "48M"}}) as here:
        assert ask(here.manager, "allocate", 100)[1].ending == "memory"
        work = begin(here.manager, "wait_for", str(gate))
        group = work.group
        assert here.set("each.memory", table % "200M").cgroups >= 1
        leaves = [group.child(name) for name in group.children()]
        eventually(lambda: all(read_limits(leaf).memory_max == 200 * MIB for leaf in leaves))
        gate.touch()
        assert end(work)[1].ending == "ok"
        assert ask(here.manager, "allocate_slowly", 100, 0.001)[1].ending == "ok"
        here.set("each.memory", table % "96M")
        outcome = ask(here.manager, "allocate", 150)[1]
        assert outcome.ending == "memory"
        assert "memory limit 96M (up_to" in outcome.detail
        here.set("each.memory", "64M")
        assert "memory limit 64M reached" in ask(here.manager, "allocate", 100)[1].detail


def test_policy_memory_changed_to_expand(gate: Path) -> None:
    table = '{ limit = "48M", expand = "2x", up_to = "%s" }'
    with site({"memory": "300M", "each": {"timeout": "100s"}}) as here:
        work = begin(here.manager, "wait_for", str(gate))
        group = work.group
        for bound in ("200M", "250M"):
            here.set("memory", table % bound)
            assert read_limits(group).memory_max == int(bound[:-1]) * MIB
            assert ask(here.manager, "allocate_slowly", 100, 0.001)[1].ending == "ok"
        here.set("memory", "100M")
        assert read_limits(group).memory_max == 100 * MIB
        outcome = ask(here.manager, "allocate", 200)[1]
        assert outcome.ending == "memory"
        assert "memory limit 100M" in outcome.detail
        # Nothing is slowed down any more at the mark of before.
        assert read_limits(group).memory_high in (None, MAX)
        gate.touch()
        assert end(work)[1].ending == "ok"


def test_an_invalid_limit_is_refused() -> None:
    with site({"each": {"timeout": "100s"}}) as here:
        for key, value, said in (
            ("each", "max", "is not a limit that can be changed while work runs"),
            ("io", "max", "is not a limit that can be changed while work runs"),
            ("io./nowhere.read", "1M", "/nowhere"),
            (f"io.{DISK}.read", "max and more", "is not a size"),
            ("each.timeout_soft", "20s", "only Celery tasks"),
        ):
            with pytest.raises((SettingsError, OSError), match=said):
                here.set(key, value)
