"""Which way in: what `auto` chooses, what is refused at start, and what is said about it."""

from __future__ import annotations

import os
from typing import Any

import pytest

from rcon_plugins import Manager, Plan, Server, Work
from rcon_plugins.confinement.isolation import Verdict
from rcon_plugins.errors import ConfinementError, SettingsError
from rcon_plugins.settings.file import from_mapping

pytestmark = pytest.mark.each_layout

#: On a block device; in the emulated machine the root is none.
DISK = os.environ.get("RCON_TEST_DISK", "/var/tmp")
ALONE, THREADS, GREENLETS = Server(threads=False), Server(), Server(greenlets=True)


def settings(**keys: Any) -> Any:
    return from_mapping({"policy": {"p": keys}, "route": [{"policy": "p"}]})


def verdict(server: Server, **keys: Any) -> Verdict:
    return Plan.make(settings(**keys), server).verdicts["p"]


@pytest.mark.parametrize(
    ("server", "keys", "isolation", "why"),
    [
        (ALONE, {"cpu": "30%"}, "inline", "cheapest"),
        (ALONE, {"cpus": "0", "cpu_weight": 50, "pids": 100}, "inline", "cheapest"),
        (ALONE, {"concurrency": 3}, "inline", "cheapest"),
        (THREADS, {"pids": 100}, "inline", "cheapest"),
        (THREADS, {"cpu": "30%"}, "process", "GIL"),
        (THREADS, {"cpu": "30%", "isolation": "inline"}, "inline", "the policy says"),
        (ALONE, {"cpu": "30%", "isolation": "process"}, "process", "the policy says"),
        (ALONE, {"each": {"timeout": "1s"}}, "process", "each unit of work"),
        (ALONE, {"memory": "64M"}, "process", "memory"),
        (ALONE, {"each": {"pids": 3}}, "process", "each unit of work"),
        (GREENLETS, {"pids": 100}, "process", "greenlets"),
    ],
)
def test_auto_takes_the_cheapest_isolation_that_enforces_all(
    server: Server, keys: dict[str, Any], isolation: str, why: str
) -> None:
    found = verdict(server, **keys)
    assert found.isolation == isolation
    assert why in found.why
    assert found.refusals == ()


@pytest.mark.once
@pytest.mark.parametrize("isolation", ["auto", "inline", "thread", "process"])
def test_retry_keys_are_refused_without_tasks(isolation: str) -> None:
    asked = {"isolation": isolation, "max_deaths": 2, "dead_letter": "dead"}
    found = verdict(ALONE, **asked)
    assert [refusal.limit for refusal in found.refusals] == ["max_deaths", "dead_letter"]
    with pytest.raises(SettingsError, match=r"policy\.p\.max_deaths: .*only Celery tasks.*leave it out"):
        found.check()
    assert verdict(Server(threads=False, tasks=True), **asked).refusals == ()


@pytest.mark.layout("v2")
def test_io_needs_a_process_on_v2() -> None:
    found = verdict(ALONE, io={DISK: {"write": "5M"}}, isolation="auto")
    assert found.isolation == "process"


@pytest.mark.layout("hybrid", "v1")
def test_io_of_a_thread_can_be_limited_on_v1() -> None:
    assert verdict(ALONE, io={DISK: {"write": "5M"}}).isolation == "inline"


@pytest.mark.layout("hybrid", "v1")
def test_a_policy_that_the_machine_cannot_enforce_is_refused_at_start() -> None:
    with pytest.raises(SettingsError, match=r"policy\.p\.memory_high: cannot be enforced.*v2") as refused:
        Manager(settings(memory="64M", memory_high="32M"))
    assert refused.value.hint


@pytest.mark.smoke
def test_missing_cpus_are_refused_at_start() -> None:
    with pytest.raises(SettingsError, match=r"policy\.p\.cpus"):
        Manager(settings(cpus="0-4000"))
    with pytest.raises(SettingsError, match=r"policy\.p\.each\.cpus"):
        Manager(settings(each={"cpus": "4000"}))


def test_greenlets_cannot_be_confined_inline() -> None:
    with pytest.raises(SettingsError, match="greenlets"):
        Manager(settings(pids=100, isolation="inline"), server=GREENLETS)


def test_a_policy_that_needs_processes_needs_a_service() -> None:
    manager = Manager(settings(each={"timeout": "1s"}))
    with pytest.raises(ConfinementError, match="'p' needs processes"):
        manager.start()


def test_each_start_has_its_own_cgroup_tree() -> None:
    manager = Manager(settings(pids=100), server=ALONE)
    first = manager.start()
    try:
        second = manager.start()
        try:
            assert first.instance.path != second.instance.path
        finally:
            second.close()
        assert first.admit(Work("call", "x")) is not None
    finally:
        first.close()
    with pytest.raises(ConfinementError, match="the manager is closed"):
        first.admit(Work("call", "x"))
