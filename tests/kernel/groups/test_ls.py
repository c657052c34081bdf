"""rcon ls and rcon stat, of instances made by hand."""

from __future__ import annotations

import json
import os
from typing import Any

import pytest

from rcon_plugins.cli.rcon import rcon, run_main
from rcon_plugins.kernel.cgroup import Cgroup, Hierarchy, Resources
from rcon_plugins.tree.instance import Instance
from tests.kernel.cgroup.helpers import MIB, eventually, layout, running, sleep_forever, touch

pytestmark = pytest.mark.each_layout


def no_swap() -> str:
    """What a limit of memory brings along. v1 has no such limit without swap on the machine."""
    return ", swap 0" if layout() == "v2" else ""


def rows(capsys: pytest.CaptureFixture[str]) -> dict[str, dict[str, Any]]:
    capsys.readouterr()
    assert run_main(["ls", "--json"]) == 0
    return {row["group"]: row for row in json.loads(capsys.readouterr().out)}


@pytest.mark.smoke
def test_the_table(instance: Instance, own: str, capsys: pytest.CaptureFixture[str]) -> None:
    together = instance.policy_cgroup(f"{own}~a.example").create()
    together.configure(Resources(cpu_quota=0.3, memory_max=64 * MIB, pids_max=8))
    instance.policy_cgroup(f"{own}-b").create()
    with running(instance.executor_cgroup(f"{own}~a.example", "1").create(), sleep_forever):
        assert run_main(["ls"]) == 0
    out, _ = capsys.readouterr()
    heads, *lines = out.splitlines()
    assert heads.split() == ["GROUP", "PROCS", "MEMORY", "CPU", "TIME", "HITS", "LIMITS", "PID", "OWNER"]
    (line,) = [line for line in lines if line.startswith(f"{own}~a.example ")]
    assert line.split()[1] == "1"
    assert f"  cpu 30%, memory 64M{no_swap()}, pids 8  " in line
    assert f" {os.getpid()}  " in line
    (line,) = [line for line in lines if line.startswith(f"{own}-b ")]
    assert line.split()[1] == "0"
    assert line.split()[6] == "-"


@pytest.mark.once
def test_as_json(instance: Instance, own: str, capsys: pytest.CaptureFixture[str]) -> None:
    instance.policy_cgroup(f"{own}~a.example").create().configure(Resources(cpu_quota=0.3, pids_max=8))
    row = rows(capsys)[f"{own}~a.example"]
    assert row.keys() == {
        *("group", "name", "kind", "instance", "cgroup", "policy", "key", "owner"),
        *("limits", "limits_in_words", "processes", "frozen", "usage", "hits", "tally", "unroutable"),
    }
    assert (row["kind"], row["policy"], row["key"]) == ("work", own, "a.example")
    assert row["owner"].keys() == {"pid", "alive", "uid", "command"}
    assert row["owner"]["pid"] == os.getpid()
    assert (row["limits"]["cpu"], row["limits"]["pids"], row["limits"]["memory"]) == (0.3, 8, "max")
    assert (row["processes"], row["frozen"], row["usage"]["memory_current"]) == (0, False, 0)
    # The group of a server that has no tally. On v1 the kernel's own counts end with each executor process.
    counts = 0 if Hierarchy.discover().layout == "v2" else None
    assert (row["tally"], row["hits"], row["usage"]["oom_kills"]) == (None, counts, counts)
    assert row["unroutable"] is None


def test_a_frozen_group_is_marked(instance: Instance, own: str, capsys: pytest.CaptureFixture[str]) -> None:
    leaf = instance.executor_cgroup(f"{own}-a", "1").create()
    with running(leaf, sleep_forever):
        together = instance.policy_cgroup(f"{own}-a")
        together.freeze()
        try:
            assert rows(capsys)[f"{own}-a"]["frozen"] is True
            assert run_main(["ls"]) == 0
            lines = [line.split() for line in capsys.readouterr().out.splitlines()]
            assert [line[1:3] for line in lines if line[0] == f"{own}-a"] == [["1", "frozen"]]
        finally:
            together.thaw()


@pytest.mark.once
def test_names_shared_by_two_groups(
    hierarchy: Hierarchy, base: Cgroup, instance: Instance, own: str, capsys: pytest.CaptureFixture[str]
) -> None:
    second = Instance.create(hierarchy, base=base.path)
    try:
        for one in (instance, second):
            one.policy_cgroup(own).create()
        labels = sorted(f"{one.path.rpartition('/')[2]}/{own}" for one in (instance, second))
        assert set(labels) <= set(rows(capsys))
        assert run_main(["stat", own]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err == f"rcon: '{own}' names 2 groups (one of: {', '.join(labels)}; see rcon stat --help)\n"
        assert run_main(["stat", labels[0]]) == 0
    finally:
        assert second.close()


def test_stat_shows_one_group_in_full(
    instance: Instance, own: str, capsys: pytest.CaptureFixture[str]
) -> None:
    together = instance.policy_cgroup(f"{own}~a.example").create()
    together.configure(Resources(cpu_quota=0.5, memory_max=64 * MIB, pids_max=8))
    with running(instance.executor_cgroup(f"{own}~a.example", "1").create(), _touch_and_wait) as child:
        eventually(lambda: (together.read().memory_peak or 0) > 16 * MIB)
        assert run_main(["stat", f"{own}~a.example"]) == 0
        text = capsys.readouterr().out
        assert run_main(["stat", "--json", f"{own}~a.example"]) == 0
        told = json.loads(capsys.readouterr().out)
    lines = {line[:15].strip(): line[15:] for line in text.splitlines() if line}
    assert lines["group"] == f"{own}~a.example (policy {own})"
    assert lines["limits"] == f"cpu 50%, memory 64M{no_swap()}, pids 8"
    assert lines["frozen"] == "no"
    assert "% of its limit" in lines["memory"]
    assert f"{child.pid}  root  " in text

    assert told["processes"][0]["pid"] == child.pid
    assert told["usage"]["memory_peak"] > 16 * MIB
    assert told["limits"]["memory"] == 64 * MIB
    assert told["directories"] == together.directories
    assert told["statistics"]["cpu_user_seconds"] is not None
    if layout() != "v1":
        assert told["pressure"]["cpu"]["some"]["share"] >= 0


def _touch_and_wait() -> None:
    touch(16 * MIB)
    sleep_forever()


@pytest.mark.once
def test_names_of_groups_are_completed(instance: Instance, own: str) -> None:
    instance.policy_cgroup(f"{own}~a.example").create()
    instance.policy_cgroup(f"{own}~b.example").create()
    for name in ("stat", "set", "freeze", "thaw", "kill", "watch"):
        command = rcon.get_command(rcon.make_context("rcon", ["--help"], resilient_parsing=True), name)
        assert command is not None
        context = command.make_context(name, [], resilient_parsing=True)
        (argument,) = [one for one in command.params if one.name == "group"]
        items = argument.shell_complete(context, f"{own}~")
        assert [item.value for item in items] == [f"{own}~a.example", f"{own}~b.example"]


@pytest.mark.once
def test_a_group_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_main(["stat", "no-such-group-anywhere"]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert "there is no group 'no-such-group-anywhere' (" in err
