"""Events of executor processes, and memory that expands, through the manager."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from rcon_plugins import Event, Limits, Memory, hookimpl, watch
from rcon_plugins.errors import MemoryLimitExceeded, UnknownGroup
from rcon_plugins.kernel.cgroup import MAX, Hierarchy, read_limits
from rcon_plugins.tree.instance import Instance
from tests.children import in_child
from tests.kernel.cgroup.helpers import MIB, eventually
from tests.kernel.executors.service import ask, begin, end, managing
from tests.listener import Listener
from tests.processes import alive


def growing(limit: str, up_to: str, expand: str = "2x") -> dict[str, object]:
    return {"limit": limit, "expand": expand, "up_to": up_to}


@pytest.fixture
def threads() -> Iterator[None]:
    yield
    eventually(lambda: not [thread for thread in threading.enumerate() if thread.name == "cgroup-events"])


pytestmark = [pytest.mark.usefixtures("threads"), pytest.mark.each_layout]


@pytest.mark.smoke
def test_nothing_is_watched_without_a_plugin_for_events() -> None:
    with managing({"memory": "256M", "each": {"memory": "128M"}}) as manager:
        ask(manager, "allocate", 10)
        assert not [thread for thread in threading.enumerate() if thread.name == "cgroup-events"]


@pytest.mark.parametrize("level", ["each", "together"])
def test_memory_expands_for_work_that_needs_more(level: str) -> None:
    memory = growing("80M", "400M")
    policy = (
        {"each": {"memory": memory}} if level == "each" else {"memory": memory, "each": {"timeout": "100s"}}
    )
    with managing(policy) as manager:
        answer, outcome = ask(manager, "allocate", 160)
        assert (answer, outcome.ending) == (160, "ok")
        assert (outcome.usage.memory_peak or 0) > 160 * MIB


@pytest.mark.parametrize("level", ["each", "together"])
def test_work_that_needs_more_than_the_bound_ends_with_the_named_outcome(level: str) -> None:
    memory = growing("60M", "200M")
    policy = (
        {"each": {"memory": memory}} if level == "each" else {"memory": memory, "each": {"timeout": "100s"}}
    )
    with managing(policy) as manager:
        outcome = ask(manager, "allocate", 400)[1]
        assert outcome.ending == "memory"
        assert outcome.limit == ("each.memory" if level == "each" else "memory")
        assert "memory limit 200M (up_to; expanded 2 times from 60M) reached" in outcome.detail
        assert isinstance(outcome.error(), MemoryLimitExceeded)
        # And the next begins anew.
        assert ask(manager, "allocate", 10)[1].ending == "ok"


def test_an_executor_whose_limit_grew_serves_no_more() -> None:
    """The next work begins with the limit of the policy."""
    with managing({"each": {"memory": growing("80M", "400M")}}) as manager:
        modest = ask(manager, "pid")[0]
        assert ask(manager, "allocate", 10)[1].ending == "ok"
        assert ask(manager, "pid")[0] == modest
        assert ask(manager, "allocate_and_hold", 120, 0.5)[1].ending == "ok"
        assert ask(manager, "pid")[0] != modest


def test_both_levels_expand_at_once() -> None:
    policy = {"memory": growing("90M", "400M"), "each": {"memory": growing("60M", "400M")}}
    with managing(policy) as manager:
        works = [begin(manager, "allocate_and_hold", 100, 0.5) for _ in range(2)]
        assert [end(work)[1].ending for work in works] == ["ok", "ok"]


def test_the_policy_limit_is_reset_when_no_request_runs() -> None:
    listener = Listener()
    with managing({"memory": growing("80M", "400M"), "max_uses": 1}, plugins=[listener]) as manager:
        for _ in range(2):
            assert ask(manager, "allocate_and_hold", 120, 0.5)[1].ending == "ok"
            time.sleep(0.3)
    bounds = [event.bound for event in listener.of("memory_limit")]
    assert bounds.count(80 * MIB) == 2


def test_rcon_event_reports_memory() -> None:
    listener = Listener()
    with managing({"per": "host", "each": {"memory": "64M"}}, plugins=[listener]) as manager:
        assert ask(manager, "allocate", 200, host="a.example")[1].ending == "memory"
        eventually(lambda: listener.of("oom_kill"))
    limit, kill = listener.of("memory_limit")[0], listener.of("oom_kill")[0]
    for event in (limit, kill):
        assert (event.policy, event.key, event.group) == ("p", "a.example", "p~a.example")
        assert (event.limit, event.bound) == ("each.memory", 64 * MIB)
    assert kill.count >= 1


def test_rcon_event_reports_the_limit_of_the_group() -> None:
    listener = Listener()
    with managing({"memory": "64M", "each": {"timeout": "100s"}}, plugins=[listener]) as manager:
        assert ask(manager, "allocate", 200)[1].ending == "memory"
        eventually(lambda: listener.of("oom_kill"))
    assert listener.of("memory_limit", "memory")
    assert {event.limit for event in listener.of("oom_kill")} == {"memory"}


def test_rcon_event_comes_before_the_limit_is_reached_and_may_raise_it(tmp_path: Path) -> None:
    """Fixed limits, too, can be raised in time."""
    go_on = tmp_path / "go on"
    listener = Listener(memory_usage=Limits(memory=Memory.parse("400M")))
    with managing({"each": {"memory": "128M"}}, plugins=[listener]) as manager:
        work = begin(manager, "allocate_and_wait", 120, str(go_on), 80)
        leaf = work._executor.leaf
        eventually(lambda: read_limits(leaf).memory_max == 400 * MIB)
        go_on.touch()
        assert end(work)[1].ending == "ok"
        event = listener.of("memory_usage")[0]
        assert (event.limit, event.bound) == ("each.memory", int(128 * MIB * 0.9))
        # That was for one work: no other begins with it.
        work = begin(manager, "sleep", 0.1)
        leaf = work._executor.leaf
        assert read_limits(leaf).memory_max == 128 * MIB
        end(work)


def test_rcon_event_decides_instead_of_the_policy(tmp_path: Path) -> None:
    go_on = tmp_path / "go on"
    listener = Listener(memory_limit=Limits(memory=Memory.parse("120M"), pids=50))
    with managing(
        {"memory": growing("60M", "400M"), "each": {"timeout": "100s"}}, plugins=[listener]
    ) as manager:
        work = begin(manager, "allocate_and_wait", 80, str(go_on))
        eventually(lambda: listener.of("memory_limit"))
        group = work.group
        eventually(lambda: read_limits(group).pids_max == 50)
        eventually(lambda: read_limits(group).memory_max == 120 * MIB)
        eventually(lambda: read_limits(group).memory_high in (None, MAX))
        # Another executor is made there meanwhile, and does not write the former limits back.
        assert ask(manager, "pid")[1].ending == "ok"
        assert read_limits(group).memory_max == 120 * MIB
        go_on.touch()
        assert end(work)[1].ending == "ok"
        outcome = ask(manager, "allocate", 300)[1]
        assert outcome.ending == "memory"
        assert "memory limit 120M reached" in outcome.detail


def test_rcon_event_reports_pids_and_cpu() -> None:
    listener = Listener()
    policy = {"cpu": "20%", "pids": 8, "each": {"timeout": "100s"}}
    with managing(policy, plugins=[listener]) as manager:
        ask(manager, "use_cpu", 0.3)
        # It fails at the limit at once, and its cgroup is gone long before the next poll.
        ask(manager, "fork_bomb", 0.0)
        eventually(lambda: listener.of("pids_limit") and listener.of("cpu_throttled"))
    assert listener.of("pids_limit")[0].limit == "pids"
    assert listener.of("pids_limit")[0].bound == 8
    assert listener.of("cpu_throttled")[0].limit == "cpu"


@pytest.mark.once
def test_rcon_event_that_fails_does_no_harm(caplog: pytest.LogCaptureFixture) -> None:
    class Broken:
        @hookimpl
        def rcon_event(self, event: Event) -> None:
            raise RuntimeError("of the plugin")

    with managing({"each": {"memory": growing("80M", "400M")}}, plugins=[Broken()]) as manager:
        assert ask(manager, "allocate", 160)[1].ending == "ok"
    assert "of the plugin" in caplog.text


@pytest.mark.layout("v2")
def test_slowed_down_work_ends_on_its_deadline() -> None:
    """Held up at its limit by a plugin that takes its time, it is still killed."""
    waiting = threading.Event()

    class Slow:
        @hookimpl
        def rcon_event(self, event: Event) -> None:
            waiting.wait(8)

    policy = {"each": {"memory": growing("60M", "800M"), "timeout": "3s"}}
    with managing(policy, plugins=[Slow()]) as manager:
        try:
            assert ask(manager, "allocate", 600)[1].ending == "timeout"
        finally:
            waiting.set()


def test_kill_9_of_the_host_while_work_is_at_its_limit() -> None:
    """Nothing hangs at a limit that nobody raises any more: the fork server ends it."""
    reading, writing = os.pipe()

    class Stuck:
        @hookimpl
        def rcon_event(self, event: Event) -> None:
            os.write(writing, b"at its limit")
            time.sleep(60)

    def host() -> None:
        with managing({"each": {"memory": growing("60M", "800M")}}, plugins=[Stuck()]) as manager:
            work = begin(manager, "allocate_and_hold", 300, 300.0)
            os.write(writing, f"{work.executor_pid:12d}{manager.fork_server_pid:12d}".encode())
            os.read(reading, 24)
            os.read(reading, 12)
            os.write(writing, f"{work.executor_pid:12d}{manager.fork_server_pid:12d}".encode())
            os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(Exception, match="killed by signal 9"):
        in_child(host)
    data = os.read(reading, 24)
    for descriptor in (reading, writing):
        os.close(descriptor)
    pids = [int(data[:12]), int(data[12:])]
    eventually(lambda: not any(alive(pid) for pid in pids))
    in_child(lambda: Instance.create(Hierarchy.discover()).close() and None)


def test_a_group_is_watched_by_its_name() -> None:
    policy = {"per": "host", "memory": "64M", "each": {"timeout": "100s"}}
    host = f"{os.getpid()}.example"  # no server of another test has this group, too
    with managing(policy) as manager:
        assert ask(manager, "pid", host=host)[1].ending == "ok"
        with watch(f"p~{host}", kinds=["memory_limit"]) as events:
            assert ask(manager, "allocate", 200, host=host)[1].ending == "memory"
            event = events.get(20)
        assert event is not None
        assert (event.group, event.policy, event.key) == (f"p~{host}", "p", host)
        assert (event.kind, event.limit, event.bound) == ("memory_limit", "memory", 64 * MIB)
        with pytest.raises(UnknownGroup, match="there is no group"):
            watch(f"p~b.{host}")


@pytest.mark.parametrize("number", range(5))
def test_the_loop_ends_with_the_group(number: int) -> None:
    """Also where the kernel has not told of the last process before it was gone."""
    kinds: list[str] = []
    with managing({"each": {"timeout": "100s"}}) as manager:
        ask(manager, "pid")
        time.sleep(0.003 * number)
        # Servers of other tests have a group of this name, too.
        events = watch(f"{manager.instance.path.rpartition('/')[2]}/p", kinds=["empty"])
        thread = threading.Thread(target=lambda: kinds.extend(event.kind for event in events))
        thread.start()
    thread.join(20)
    assert not thread.is_alive()
    assert events.ended
    assert kinds[-1:] == ["empty"]
