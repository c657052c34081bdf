"""rcon watch: a line for each event, until the group is gone."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from rcon_plugins.cli.rcon import run_main
from rcon_plugins.kernel.cgroup import Cgroup, Resources
from rcon_plugins.tree.instance import Instance
from tests.commands import become_rcon
from tests.kernel.cgroup.helpers import MIB, eventually, running, sleep_forever, touch
from tests.processes import alive, entries, until

pytestmark = pytest.mark.each_layout


class Watching:
    """``rcon watch`` beside the test."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self._out, self._err = folder / "out", folder / "err"
        self._status: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            become_rcon(["watch", *arguments], [self._out, self._err])

    def watches(self) -> bool:
        """Whether its thread is there, and it waits."""
        assert alive(self.pid), self._err.read_text()
        return len(entries(Path(f"/proc/{self.pid}/task"))) > 1

    def wait_for(self, kind: str) -> None:
        """Until it has told of one."""
        eventually(lambda: kind in self._out.read_text(), 60)

    def ended(self) -> tuple[int, str, str]:
        until(lambda: not alive(self.pid))
        return self._wait(), self._out.read_text(), self._err.read_text()

    def kill(self) -> None:
        if self._status is None:
            os.kill(self.pid, signal.SIGKILL)
            self._wait()

    def _wait(self) -> int:
        self._status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self._status


Watch = Callable[..., contextlib.AbstractContextManager[Watching]]


@pytest.fixture
def watching(tmp_path: Path) -> Watch:
    return functools.partial(_watching, tmp_path)


@contextlib.contextmanager
def _watching(folder: Path, *arguments: str) -> Iterator[Watching]:
    made = Watching(folder, *arguments)
    try:
        eventually(made.watches, 60)
        time.sleep(0.3)
        yield made
    finally:
        made.kill()


@pytest.fixture
def group(instance: Instance, own: str) -> Cgroup:
    together = instance.policy_cgroup(f"{own}-w").create()
    together.configure(Resources(memory_max=32 * MIB, pids_max=3))
    return together


def fork_too_many() -> None:
    with contextlib.suppress(BlockingIOError):
        for _ in range(5):
            if os.fork() == 0:
                sleep_forever()
    sleep_forever()


@pytest.mark.smoke
def test_a_line_for_each_until_the_group_is_gone(group: Cgroup, own: str, watching: Watch) -> None:
    with watching(f"{own}-w", "--kind", "oom_kill,pids_limit") as it:
        # The leaf is in the way of nothing: v1 counts in the cgroup of the process itself.
        with running(group, touch, 64 * MIB) as child:
            assert child.wait() == -signal.SIGKILL
        with running(group, fork_too_many):
            it.wait_for("pids_limit")
            group.kill()
        assert group.delete()
        status, out, err = it.ended()
    lines = out.splitlines()
    assert (status, err) == (0, f"rcon: group {own}-w is gone\n")
    kinds = [line.split()[1] for line in lines]
    assert set(kinds) == {"oom_kill", "pids_limit"}
    assert all(line[2] == line[5] == ":" for line in lines)
    assert " of 32M" in lines[kinds.index("oom_kill")]
    assert "a fork failed: " in lines[kinds.index("pids_limit")]


def test_as_json_and_with_a_threshold(group: Cgroup, own: str, watching: Watch) -> None:
    with watching(f"{own}-w", "--json", "--threshold", "16M", "--kind", "memory_usage") as it:
        with running(group, hold, 20 * MIB):
            it.wait_for("memory_usage")
        assert group.delete()
        status, out, _ = it.ended()
    assert status == 0
    told = [json.loads(line) for line in out.splitlines()]
    assert told
    assert {one["kind"] for one in told} == {"memory_usage"}
    assert (told[0]["group"], told[0]["bound"]) == (f"{own}-w", 16 * MIB)
    assert told[0]["usage"] >= 15 * MIB


def hold(size: int) -> None:
    held = bytearray(size)
    held[::4096] = b"x" * len(held[::4096])
    sleep_forever()


@pytest.mark.once
def test_interrupted(group: Cgroup, own: str, watching: Watch) -> None:
    with watching(f"{own}-w") as it:
        os.kill(it.pid, signal.SIGINT)
        assert it.ended() == (130, "", "")


def test_events_that_a_group_cannot_report_are_refused(
    instance: Instance, own: str, capsys: pytest.CaptureFixture[str]
) -> None:
    threaded = instance.threaded(f"{own}-t").create(threaded=True, controllers=frozenset({"cpu"}))
    try:
        assert run_main(["watch", f"{own}-t", "--kind", "oom_kill"]) == 2
        assert "cannot report oom_kill: it has no memory controller" in capsys.readouterr().err
    finally:
        threaded.delete()


BAD = [
    (["--kind", "oom"], "--kind: unknown event 'oom' (choose from memory_high, memory_limit"),
    (["--threshold", "much"], "--threshold: 'much' is not a size"),
    (
        ["--pressure", "disk"],
        "--pressure: 'disk' is not RESOURCE[:STALL/WINDOW] (for example memory:200ms/2s",
    ),
    (["--pressure", "io:2s"], "--pressure: 'io:2s' is not RESOURCE[:STALL/WINDOW]"),
    (["--pressure", "io:5/2"], "--pressure: '5' is not a length of time"),
    (["--pressure", "io:3s/2s"], "--pressure: 3 s is not within a window of 2 s"),
    (["--pressure", "io:1s/60s"], "--pressure: a window of 60 s is not between"),
]


@pytest.mark.once
@pytest.mark.parametrize(
    ("options", "says"), BAD, ids=lambda one: " ".join(one) if isinstance(one, list) else ""
)
def test_bad_usage(
    group: Cgroup, own: str, options: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_main(["watch", f"{own}-w", *options]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert says in err
