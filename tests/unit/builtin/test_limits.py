"""From a policy to the kernel's limits: data, learned without a kernel."""

from __future__ import annotations

import pluggy
import pytest

from rcon_plugins import hookspecs
from rcon_plugins.builtin.plugins import limits_manager
from rcon_plugins.confinement.isolation import resources_of
from rcon_plugins.hookspecs import hookimpl
from rcon_plugins.kernel.cgroup import IoMax, Resources
from rcon_plugins.kernel.cgroup.device import Device
from rcon_plugins.settings.limits import Limits
from rcon_plugins.settings.policy import Policy

MIB = 1 << 20
EVERYTHING = {
    "cpu": "30%",
    "cpu_burst": "20ms",
    "cpu_weight": 50,
    "cpus": "0-1,3",
    "memory": "256M",
    "memory_high": "200M",
    "swap": 0,
    "pids": 64,
}
ALL_FIELDS = Resources(
    cpu_quota=0.3,
    cpu_burst=0.02,
    cpu_weight=50,
    cpus="0-1,3",
    memory_max=256 * MIB,
    memory_high=200 * MIB,
    swap_max=0,
    pids_max=64,
)


def resources(policy: Policy, limits: Limits | None = None, *plugins: object) -> Resources:
    manager = limits_manager()
    for plugin in plugins:
        manager.register(plugin)
    return resources_of(manager.hook, policy if limits is None else limits, policy)


def test_every_limit_of_the_table_becomes_a_field() -> None:
    assert resources(Policy.make("p", **EVERYTHING)) == ALL_FIELDS
    assert set(ALL_FIELDS.written()) == set(Resources._fields) - {"oom_group", "io", "files"}


def test_values_are_plain_numbers_and_text() -> None:
    found = resources(Policy.make("p", **EVERYTHING))
    assert {type(getattr(found, name)) for name in found.written()} == {int, float, str}


def test_without_limits_nothing_is_written() -> None:
    assert resources(Policy.make("p")) == Resources()


def test_memory_that_expands_is_limited_to_the_most_it_may_become() -> None:
    policy = Policy.make("p", memory={"limit": "64M", "expand": "2x", "up_to": "1G"})
    assert resources(policy) == Resources(memory_max=1024 * MIB)


def test_an_executor_process_is_killed_with_all_it_started_where_memory_is_limited() -> None:
    alone = Policy.make("p", each={"memory": "64M", "pids": 9})
    assert resources(alone, alone.each) == Resources(memory_max=64 * MIB, pids_max=9, oom_group=True)
    together = Policy.make("p", memory="64M")
    assert resources(together, together.each) == Resources(oom_group=True)
    neither = Policy.make("p", pids=9)
    assert resources(neither, neither.each) == Resources()


def test_io_is_by_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rcon_plugins.builtin.limits.device_of", {"/srv": Device(254, 0)}.__getitem__)
    policy = Policy.make("p", io={"/srv": {"read": "10M", "write_iops": 500}})
    assert resources(policy).io == {Device(254, 0): IoMax(rbps=10 * MIB, wiops=500)}


class Plugin:
    def __init__(self, returned: Resources | None) -> None:
        self.returned = returned

    @hookimpl
    def rcon_resources(self) -> Resources | None:
        return self.returned


def test_results_of_plugins_are_merged_and_the_first_decides() -> None:
    policy = Policy.make("p", pids=64, cpu="30%")
    first = Plugin(Resources(pids_max=3, memory_max=MIB, files={"hugetlb.2MB.max": "0"}))
    second = Plugin(
        Resources(memory_max=2 * MIB, cpus="0", files={"hugetlb.2MB.max": "1", "misc.max": "x 1"})
    )
    found = resources(
        policy, None, second, Plugin(None), first
    )  # the last that was registered is called first
    assert found == Resources(
        pids_max=3,
        cpu_quota=0.3,
        memory_max=MIB,
        cpus="0",
        files={"hugetlb.2MB.max": "0", "misc.max": "x 1"},
    )


def test_the_hook_exists() -> None:
    manager = pluggy.PluginManager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    assert manager.hook.rcon_resources.spec is not None
