"""What a server counts, in each isolation, and who can read and write it."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from rcon_plugins import Manager, RunningManager, Server, Work, hookimpl
from rcon_plugins.cli.rcon import run_main
from rcon_plugins.confinement import budget
from rcon_plugins.confinement.admission import ProcessAdmission
from rcon_plugins.errors import RconError
from rcon_plugins.groups.find import find_group, find_groups
from rcon_plugins.kernel import landlock
from rcon_plugins.kernel.capability import CAP_SYS_ADMIN, Capabilities, read_state, set_capabilities
from rcon_plugins.kernel.cgroup import Cgroup
from rcon_plugins.outcome import Outcome
from rcon_plugins.settings.file import from_mapping
from rcon_plugins.tally import reader
from rcon_plugins.tally.layout import Name
from rcon_plugins.tally.reader import Counts, read_directory
from rcon_plugins.tally.writer import Tally
from rcon_plugins.tree import runtime
from rcon_plugins.tree.owner import Owner
from tests.children import in_child
from tests.kernel.cgroup.helpers import eventually
from tests.kernel.executors.service import ASK, ask, begin, end, serve

TENANT = 20001


@pytest.fixture
def policy() -> str:
    """The name of a policy that only this test has: the tally of this process's servers goes on from test to test."""
    return f"t{time.monotonic_ns() % 10**12}"


@contextlib.contextmanager
def serving(
    policies: dict[str, Any], plugins: Any = (), threads: bool = False, **settings: Any
) -> Iterator[tuple[RunningManager, Path]]:
    """A server with these policies: the `command` of work names its policy. Yield it and the directory of its tally."""
    routes = [{"policy": name, "command": name} for name in policies]
    manager = Manager(
        from_mapping({"policy": policies, "route": routes, **settings}),
        server=Server(threads=threads),
        plugins=plugins,
    )
    deployment = manager.deploy()
    assert deployment.directory is not None
    running = deployment.start(serve, on_close=deployment.close)
    try:
        yield running, Path(deployment.directory)
    finally:
        running.close()


def counts(directory: Path, policy: str, key: str | None = None) -> Counts:
    found = read_directory(str(directory))
    assert found is not None
    its = found.of(policy, key)
    assert its is not None
    return its


def some(counts: dict[str, int]) -> dict[str, int]:
    return {name: number for name, number in counts.items() if number}


def rows(capsys: pytest.CaptureFixture[str], *command: str) -> Any:
    capsys.readouterr()
    assert run_main([*command]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.smoke
@pytest.mark.each_layout
def test_kills_are_counted_and_shown_after_their_cgroups_are_gone(
    policy: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """On v1 the kernel's counters of a request end with its cgroup: top, stat and ls showed 0."""
    policies = {
        policy: {"per": "host", "each": {"memory": "40M", "timeout": "60s"}},
        f"{policy}-brief": {"each": {"timeout": "100ms"}},
    }
    with serving(policies) as (manager, directory):
        work = {"command": policy, "host": "a.example"}
        for _ in range(3):
            assert ask(manager, "allocate", 200, **work)[1].ending == "memory"
        assert end(begin(manager, "sleep", 60, command=f"{policy}-brief"))[1].ending == "timeout"
        brief = counts(directory, f"{policy}-brief")
        assert (some(brief.endings), brief.limit_hits) == ({"timeout": 1}, 1)
        assert ask(manager, "pid", **work)[1].ending == "ok"
        assert ask(manager, "raises", **work)[1].ending == "error"
        under_way = begin(manager, "sleep", 0.2, **work)
        found = counts(directory, policy, "a.example")
        assert (found.begun, found.under_way) == (6, 1)
        end(under_way)

        name = f"{policy}~a.example"
        found = counts(directory, policy, "a.example")
        assert some(found.endings) == {"ok": 2, "error": 1, "memory": 3}
        assert (found.lost, found.under_way, found.limit_hits) == (0, 0, 3)
        assert found.oom_kills is not None and found.oom_kills >= 3  # noqa: PT018
        assert found.spawns >= 4
        assert found.memory_peak is not None and found.memory_peak > 30 << 20  # noqa: PT018
        assert found.cpu_seconds is not None and found.cpu_seconds > 0  # noqa: PT018
        assert found.wall_seconds >= 0.2

        row = {one["group"]: one for one in rows(capsys, "ls", "--json")}[name]
        assert row["tally"] == found.to_data()
        assert (row["hits"], row["usage"]["memory_limit_hits"]) == (3, 3)
        assert row["usage"]["oom_kills"] == found.oom_kills
        assert run_main(["ls"]) == 0
        (line,) = [one for one in capsys.readouterr().out.splitlines() if one.startswith(f"{name} ")]
        assert "3" in line.split()[4:7]
        row = rows(capsys, "stat", name, "--json")
        assert row["tally"]["endings"]["memory"] == 3
        assert run_main(["stat", name]) == 0
        out = capsys.readouterr().out
        assert "served         2 ok, 1 error, 3 memory; 0 under way, 0 lost\n" in out
        assert "refused        0\n" in out
        top = rows(capsys, "top", "--json", "--iterations", "1", "--interval", "0.1")
        (row,) = [one for one in top["groups"] if one["group"] == name]
        assert (row["hits"]["total"], row["hits"]["memory"], row["tally"]["endings"]["ok"]) == (3, 3, 2)


@pytest.mark.layout("v2")
def test_less_memory_for_a_group_in_use_tells_its_kills(
    policy: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The tally counts a kill only when its request has ended: rcon set asks the kernel."""
    policies = {policy: {"memory": "200M", "each": {"timeout": "60s"}}}
    with serving(policies) as (manager, _):
        under_way = begin(manager, "allocate_and_hold", 60, 60, command=policy)
        group = find_group(policy)
        eventually(lambda: (group.usage().memory_current or 0) > 60 << 20)
        assert run_main(["set", policy, "--memory", "24M"]) == 0
        assert end(under_way)[1].ending == "memory"
    err = capsys.readouterr().err
    # The executor process that replaces the killed one may be the next, while the limit is below what is in use.
    assert re.search(r"M of memory was in use: the kernel reclaimed what it could and killed [1-9]", err), err
    assert "which may write the limits of its policy again" in err


def test_each_refusal_is_counted_by_its_reason(policy: str) -> None:
    class Owner:
        @hookimpl
        def rcon_select_policy(self, work: Work) -> str | None:
            return "no-such-policy" if work.name == "invented" else None

    policies = {
        policy: {"per": "host", "concurrency": 1, "each": {"timeout": "60s"}},
        f"{policy}-few": {"each": {"timeout": "60s"}},
        f"{policy}-user": {"user": "owner:/srv/{host}", "each": {"timeout": "60s"}},
    }
    with serving(policies, [Owner()], processes=1) as (manager, directory):

        def refused(name: str, **attributes: str) -> None:
            with pytest.raises(RconError):
                manager.admit(Work("call", name, attributes))

        before = counts(directory, "").refusals
        refused("nobody")
        refused("invented")
        after = counts(directory, "").refusals
        assert after["unroutable"] == before["unroutable"] + 1
        assert after["refused"] == before["refused"] + 1  # a plugin is wrong, not the client
        admission = begin(manager, "sleep", 0.5, command=policy, host="a")
        refused("x", command=policy, host="a")
        refused("x", command=f"{policy}-few")
        refused("x", command=f"{policy}-user", host="no-such-host")
        end(admission)
        assert some(counts(directory, policy, "a").refusals) == {"concurrency": 1}
        assert some(counts(directory, f"{policy}-few").refusals) == {"processes": 1}
        assert some(counts(directory, f"{policy}-user").refusals) == {"forbidden": 1}
        assert counts(directory, policy, "a").begun == 1

        # One executor process in all: that of the first policy ends to make room.
        assert ask(manager, "pid", command=f"{policy}-few")[1].ending == "ok"
        assert counts(directory, policy, "a").executor_evictions == 1


def test_executors_that_keep_too_much_memory_are_counted(policy: str) -> None:
    with serving({policy: {"each": {"memory": "64M"}}}) as (manager, directory):
        for _ in range(3):
            assert ask(manager, "keep", 52, command=policy)[1].ending == "ok"
        assert counts(directory, policy).memory_replacements == 3


def test_what_no_route_names_is_shown_with_its_server(
    policy: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also by a server without a group: when all its work is refused, it never makes one."""
    with serving({policy: {"each": {"timeout": "60s"}}}) as (manager, directory):
        before = counts(directory, "").refusals["unroutable"]
        for _ in range(3):
            with pytest.raises(RconError):
                manager.admit(Work("call", "nobody", {}))
        number = before + 3

        assert run_main(["ls"]) == 0
        line = f"unroutable: {number} requests or tasks that no route names, refused by "
        (shown,) = [one for one in capsys.readouterr().out.splitlines() if one.startswith(line)]
        assert shown.endswith(f" (pid {os.getpid()})")
        top = rows(capsys, "top", "--json", "--iterations", "1", "--interval", "0.1")
        (server,) = [one for one in top["servers"] if one["instance"] == directory.name]
        assert (server["unroutable"], server["new_unroutable"], server["node"]) == (number, 0, None)
        assert run_main(["top", "--iterations", "1", "--interval", "0.1"]) == 0
        heading = capsys.readouterr().out.splitlines()[0]
        told = re.search(r", unroutable ([0-9]+)", heading)
        assert told is not None
        assert int(told[1]) >= number

        assert ask(manager, "pid", command=policy)[1].ending == "ok"
        row = {one["group"]: one for one in rows(capsys, "ls", "--json")}[policy]
        assert (row["unroutable"], row["tally"]["refusals"]["unroutable"]) == (number, 0)
        assert rows(capsys, "stat", policy, "--json")["unroutable"] == number
        assert run_main(["stat", policy]) == 0
        shown = f"unroutable     {number} refused by the whole server, as no route names them\n"
        assert shown in capsys.readouterr().out


def test_the_budget_refuses_and_confinements_give_way(
    policy: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # All servers of this machine share its ledger: other tests may hold some of that.
    monkeypatch.setattr(budget, "_folder", lambda: str(tmp_path / "rcon"))
    in_child(refuse_and_give_way, policy)


def refuse_and_give_way(policy: str) -> None:
    each = {"memory": "32M", "timeout": "60s"}
    with serving(
        {policy: {"per": "host", "each": each}}, budget={"memory": "40M", "wait": "10ms"}, confinements=2
    ) as (manager, directory):
        admission = begin(manager, "sleep", 0.5, command=policy, host="h1")
        with pytest.raises(RconError):
            manager.admit(Work("call", "x", {"command": policy, "host": "h1"}))
        end(admission)
        assert some(counts(directory, policy, "h1").refusals) == {"budget": 1}
        for number in range(2, 5):
            assert ask(manager, "pid", command=policy, host=f"h{number}")[1].ending == "ok"
        assert sum(counts(directory, policy, f"h{number}").evictions for number in range(1, 5)) == 2


@pytest.mark.parametrize("isolation", [pytest.param("inline", marks=pytest.mark.each_layout), "thread"])
def test_work_in_threads_is_counted(policy: str, isolation: str) -> None:
    with serving({policy: {"isolation": isolation, "cpu": "50%"}}) as (manager, directory):

        def use_cpu() -> None:
            until = time.thread_time() + 0.05
            while time.thread_time() < until:
                pass

        admission = manager.admit(Work("call", "x", {"command": policy}))
        assert admission is not None
        admission.call(use_cpu)  # type: ignore[union-attr]
        admission.finish()
        other = manager.admit(Work("call", "x", {"command": policy}))
        assert other is not None
        other.abort("the client went away")
        found = counts(directory, policy)
        assert some(found.endings) == {"ok": 1, "aborted": 1}
        assert found.cpu_seconds is not None and 0.04 < found.cpu_seconds < 1  # noqa: PT018
        assert (found.memory_peak, found.oom_kills, found.spawns) == (None, None, 0)
        if isolation == "inline":
            (group,) = [one for one in find_groups().groups if one.name == policy]
            assert (group.kind, group.tally()) == ("host", found)


@pytest.mark.parametrize("isolation", ["inline", "thread", "process"])
def test_threads_that_end_work_at_the_same_time_lose_no_count(policy: str, isolation: str) -> None:
    """Two threads of the server end a unit of work each, at the same moment, over and over."""
    limits = {"each": {"timeout": "60s"}} if isolation == "process" else {"pids": 200}
    rounds = 150
    with serving({policy: {"isolation": isolation, **limits}}, threads=True) as (manager, directory):
        together = threading.Barrier(2, timeout=60)

        def work() -> None:
            for _ in range(rounds):
                admission = manager.admit(Work("call", "pid", {"command": policy}))
                assert admission is not None
                if isinstance(admission, ProcessAdmission):
                    admission.channel.send((ASK, b'["pid"]'))
                    admission.channel.receive()
                else:
                    admission.call(os.getpid)
                together.wait()
                admission.finish()

        before = sys.getswitchinterval()
        sys.setswitchinterval(1e-6)
        try:
            with ThreadPoolExecutor(2) as pool:
                for done in [pool.submit(work) for _ in range(2)]:
                    done.result()
        finally:
            sys.setswitchinterval(before)
        found = counts(directory, policy)
    assert (found.begun, some(found.endings), found.under_way) == (2 * rounds, {"ok": 2 * rounds}, 0)
    assert some(found.refusals) == {}


# -- hostile work


def serve_without_sys_admin(policy: str) -> dict[str, str]:
    """What work as root can do where the server can give no namespaces. Call it in a child."""
    held = read_state().permitted - Capabilities.of(CAP_SYS_ADMIN)
    set_capabilities(held, held, Capabilities.of())
    with serving({policy: {"each": {"timeout": "60s"}}}) as (manager, directory):
        # `truncate` alone is not tried before Linux 6.2: Landlock does not know it there, and it would end this server.
        act = "reach_file" if landlock.abi() >= 3 else "reach_file_but_truncate"
        found: dict[str, str] = ask(manager, act, str(directory / "0"), command=policy)[0]
        assert ask(manager, "pid", command=policy)[1].ending == "ok"
        return found


def test_without_namespaces_landlock_alone_keeps_the_file(policy: str) -> None:
    found = in_child(serve_without_sys_admin, policy)
    assert len(found) >= 5
    assert set(found.values()) <= {os.strerror(errno.EACCES), os.strerror(errno.EXDEV)}


@pytest.mark.parametrize("user", [None, TENANT])
def test_hostile_work_has_no_mapping_and_cannot_change_the_file(policy: str, user: int | None) -> None:
    """Work as root without capabilities, and as a user of its own."""
    keys: dict[str, Any] = {"each": {"timeout": "60s", "memory": "64M"}}
    if user is not None:
        keys |= {"user": user, "group": user}
    with serving({policy: keys}) as (manager, directory):
        assert ask(manager, "pid", command=policy)[1].ending == "ok"
        file = directory / "0"
        before = counts(directory, policy).begun
        traces = ask(manager, "traces_of", str(directory), command=policy)[0]
        assert traces == []
        done = ask(manager, "reach_file", str(file), command=policy)[0]
        assert "done" not in done.values(), done
        assert file.stat().st_size > 0
        assert ask(manager, "pid", command=policy)[1].ending == "ok"
        assert counts(directory, policy).begun == before + 3


def test_the_fork_server_has_neither_mapping_nor_descriptor(policy: str) -> None:
    with serving({policy: {"each": {"timeout": "60s"}}}) as (manager, directory):
        ask(manager, "pid", command=policy)
        server = Path(f"/proc/{manager.fork_server_pid}")
        assert str(directory) not in (server / "maps").read_text()
        links = [str(link.readlink()) for link in (server / "fd").iterdir()]
        assert [link for link in links if str(directory) in link] == []
        assert str(directory / "0") in Path("/proc/self/maps").read_text()


# -- how long it stays


def served_once(base: str, policy: str, ending: str) -> str:
    """Serve one request in a child; then close, or die. Return the directory."""
    settings = from_mapping(
        {"policy": {policy: {"each": {"timeout": "60s"}}}, "route": [{"policy": policy}], "cgroup": base}
    )
    deployment = Manager(settings, server=Server(threads=False)).deploy()
    running = deployment.start(serve, on_close=deployment.close)
    assert ask(running, "pid")[1].ending == "ok"
    if ending == "close":
        running.close()
    assert deployment.directory is not None
    return deployment.directory


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of this test's own: of all servers of this machine that have ended, only the last ones stay."""
    monkeypatch.setattr(runtime, "_ROOT_FOLDER", str(tmp_path))


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("ending", ["close", "die"])
def test_it_stays_after_the_end_for_an_hour_or_until_it_was_read(
    group: Cgroup, policy: str, ending: str
) -> None:
    first = Path(in_child(served_once, group.path, policy, ending))
    assert counts(first, policy).endings["ok"] == 1
    assert run_main(["gc", "--below", group.path]) == 0
    assert counts(first, policy).endings["ok"] == 1
    assert (first / "ended").exists()
    old = time.time() - runtime.KEEP_SECONDS - 5
    os.utime(first / "ended", (old, old))
    second = Path(in_child(served_once, group.path, policy, ending))  # the next start removes it
    assert not first.exists()
    assert second.exists()
    (second / "read").touch()
    assert run_main(["gc", "--below", group.path]) == 0
    assert not second.exists()


def test_few_of_the_ended_stay(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(runtime, "_ROOT_FOLDER", str(tmp_path))
    for number in range(1, 40):
        directory = Path(runtime.make(f"rcon-{number}-1", None))
        (directory / "0").write_bytes(b"x")
        runtime.end(str(directory))
        os.utime(directory / "ended", (time.time() - 100 + number,) * 2)
    living = Path(runtime.make(Owner.here().instance_name, None))
    (living / "0").write_bytes(b"x")
    runtime.collect()
    left = sorted(int(one.name.split("-")[1]) for one in tmp_path.iterdir() if one != living)
    assert left == [*range(24, 40)]


def test_without_a_directory_it_serves_and_says_so_once(
    policy: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    (tmp_path / "file").touch()
    monkeypatch.setattr(runtime, "_ROOT_FOLDER", str(tmp_path / "file" / "rcon"))
    keys = {policy: {"each": {"timeout": "60s"}}}
    settings = from_mapping({"policy": keys, "route": [{"policy": policy}]})
    with caplog.at_level(logging.WARNING, "rcon"):
        manager = Manager(settings, server=Server(threads=False)).start(serve)
        try:
            assert ask(manager, "pid")[1].ending == "ok"
            row = {one["name"]: one for one in rows(capsys, "ls", "--json")}[policy]
            assert (row["tally"], row["unroutable"]) == (None, None)
            assert rows(capsys, "stat", policy, "--json")["unroutable"] is None
            top = rows(capsys, "top", "--json", "--iterations", "1", "--interval", "0.1")
            (server,) = [one for one in top["servers"] if one["instance"] == row["instance"]]
            assert (server["unroutable"], server["new_unroutable"]) == (None, 0)
            assert run_main(["stat", policy]) == 0
            out = capsys.readouterr().out
            assert "served         unknown\n" in out
            assert "unroutable" not in out
        finally:
            manager.close()
    said = [record.message for record in caplog.records if "rcon top" in record.message]
    assert len(said) == 1
    assert str(tmp_path / "file" / "rcon") in said[0]


def count_as_nobody(folder: str, instance: str) -> str:
    os.environ["XDG_RUNTIME_DIR"] = folder
    os.setgroups([])
    os.setresgid(65534, 65534, 65534)
    os.setresuid(65534, 65534, 65534)
    directory = runtime.make(instance, None)
    tally = Tally.take(directory)
    record = tally.record("p", None)
    tally.begin(record)
    tally.end(record, Outcome(ending="memory"))
    return directory


def test_the_files_of_an_ordinary_user_are_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "runtime"
    folder.mkdir()
    os.chown(folder, 65534, 65534)
    for above in (tmp_path, tmp_path.parent, tmp_path.parent.parent):
        above.chmod(above.stat().st_mode | 0o011)
    instance = "rcon-4194303-1"
    directory = Path(in_child(count_as_nobody, str(folder), instance))
    assert directory == folder / "rcon" / instance
    assert directory.stat().st_uid == (directory / "0").stat().st_uid == 65534
    assert reader.read(instance) is None
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(folder))
    found = reader.read(instance)
    assert found is not None
    assert found.counts[Name("p")].limit_hits == 1


def die_with_work_under_way(base: str, policy: str) -> str:
    settings = from_mapping(
        {"policy": {policy: {"each": {"timeout": "60s"}}}, "route": [{"policy": policy}], "cgroup": base}
    )
    deployment = Manager(settings, server=Server(threads=False)).deploy()
    assert deployment.directory is not None
    pid = os.fork()
    if pid == 0:
        running = deployment.start(serve)
        begin(running, "sleep", 60)
        begin(running, "sleep", 60)
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)
    found = counts(Path(deployment.directory), policy)
    assert (found.begun, found.lost, found.under_way) == (2, 2, 0)
    running = deployment.start(serve, on_close=deployment.close)  # the next worker
    assert ask(running, "pid")[1].ending == "ok"
    found = counts(Path(deployment.directory), policy)
    assert (found.begun, found.lost, found.under_way, found.endings["ok"]) == (3, 2, 0, 1)
    running.close()
    return deployment.directory


@pytest.mark.usefixtures("folder")
def test_the_next_worker_counts_on_after_kill_9(group: Cgroup, policy: str) -> None:
    directory = Path(in_child(die_with_work_under_way, group.path, policy))
    assert sorted(one.name for one in directory.iterdir()) == ["0", "ended"]
