"""All workers of an application: `celery inspect rcon`, `celery control rcon_set` and `rcon top --celery`."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from rcon_plugins.errors import MemoryLimitExceeded, TimeLimitExceeded
from rcon_plugins.groups.find import Group, find_groups
from rcon_plugins.kernel.cgroup import MAX, read_limits
from rcon_plugins.settings.units import parse_size
from tests.forks import ROOT
from tests.integrations.celery import limited
from tests.integrations.celery.producers import closing
from tests.integrations.celery.redis_server import RedisServer
from tests.integrations.celery.sessions import Session, Sessions
from tests.integrations.celery.test_deaths import nothing_runs
from tests.integrations.celery.worker import Worker
from tests.processes import until
from tests.terminals import terminal


def test_inspect(sessions: Sessions) -> None:
    with sessions() as session:
        session.error("hog", MemoryLimitExceeded)
        session.error("hog", MemoryLimitExceeded)
        session.error("hang", TimeLimitExceeded)
        session.get("where")
        command = [sys.executable, "-m", "celery", "-A", limited.__name__, "inspect", "rcon", "--json"]
        before = datetime.now(UTC).replace(microsecond=0)
        done = subprocess.run(
            command,
            cwd=ROOT,
            env={**os.environ, limited.BROKER: session.url},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        )
        (reply,) = json.loads(done.stdout).values()
        told = datetime.fromisoformat(reply["time"])
        assert before <= told <= datetime.now(UTC)
        assert reply["policies"]["hog"] == {"each": {"memory": "64M", "timeout": "1m"}}
        assert reply["policies"]["small"]["memory"] == "1G"
        assert (reply["endings"], reply["refusals"]) == ({"ok": 1, "memory": 2, "timeout": 1}, {})
        assert reply["confinements"]["where"]["cpu_seconds"] > 0
        # On cgroup v1 the kernel's own counts have ended with the tasks.
        hog = reply["confinements"]["hog"]
        assert hog["tally"]["endings"]["memory"] == hog["memory_limit_hits"] == 2
        assert hog["oom_kills"] >= 2


def test_inspect_a_running_task(sessions: Sessions) -> None:
    with sessions(concurrency=1) as session:
        result = session.send("stay", "watched")
        until(lambda: bool(session.log("watched")))

        def running() -> dict[str, Any]:
            (reply,) = session.app.control.inspect(timeout=10, limit=1)._request("rcon").values()
            found: dict[str, Any] = reply["confinements"]
            return found

        stays = running()["stay"]
        result.revoke(terminate=True)
        assert stays["processes"] >= 1
        assert stays["memory"] > 0


def rcon_set(session: Session, *arguments: str) -> dict[str, Any]:
    """Return the worker's answer to `celery control rcon_set`."""
    done = session.celery("control", "--json", "rcon_set", *arguments)
    (reply,) = json.loads(done.stdout)
    answer: dict[str, Any] = reply["w@test"]
    return answer


def group_of(session: Session, name: str) -> Group:
    """Return a confinement of its worker."""
    instance = session.worker.cgroups()[0].name
    (found,) = [one for one in find_groups().groups if one.instance == instance and one.name == name]
    return found


@contextlib.contextmanager
def staying(session: Session) -> Iterator[Group]:
    """Run the task `stay` while the ``with`` block runs; return its confinement."""
    result = session.send("stay", "watched")
    until(lambda: bool(session.log("watched")))
    try:
        yield group_of(session, "stay")
    finally:  # a worker that stops would wait for it
        result.revoke(terminate=True)
        nothing_runs(session, "watched")


def test_set_while_work_runs(sessions: Sessions) -> None:
    """The limit holds in the cgroups at once, and for later tasks in each process of the pool, new ones included."""
    with sessions(concurrency=2) as session:
        for _ in range(3):  # so that both processes know the old limit
            assert "memory limit 64M reached" in str(session.error("hog", MemoryLimitExceeded))
        with staying(session) as stay:
            reply = rcon_set(session, "hog", "each.memory", "128M")["ok"]
            assert (reply["policy"], reply["limit"], reply["before"], reply["after"]) == (
                "hog",
                "each.memory",
                "64M",
                "128M",
            )
            reply = rcon_set(session, "stay", "each.pids", "32")["ok"]
            assert (reply["before"], reply["after"], reply["kept"]) == (64, 32, 0)
            assert reply["cgroups"] >= 1
            leaves = [stay.cgroup.child(name) for name in stay.cgroup.children()]
            assert {read_limits(leaf).pids_max for leaf in leaves} == {32}
            for limit in ("160M", "200M", "180M"):
                reply = rcon_set(session, "stay", "each.memory", limit)["ok"]
                assert reply["kept"] == 0
                assert ["/dev/shm" in note for note in reply["notes"]] == [True] * (limit == "200M")
                assert {read_limits(leaf).memory_max for leaf in leaves} == {parse_size(limit)}
            reply = rcon_set(session, "stay", "memory", "256M")["ok"]
            assert (reply["before"], reply["after"], reply["cgroups"]) == (None, "256M", 1)
            assert stay.limits().memory_max == 256 << 20
            assert len(stay.pids()) >= 2  # and it goes on

            for _ in range(3):
                assert "memory limit 128M reached" in str(session.error("hog", MemoryLimitExceeded))
            before = set(session.worker.children())
            for pid in before:
                os.kill(pid, signal.SIGKILL)
            until(lambda: len(set(session.worker.children()) - before) == 2)
            for _ in range(3):
                assert "memory limit 128M reached" in str(session.error("hog", MemoryLimitExceeded))
            (answer,) = session.app.control.broadcast("rcon", reply=True, timeout=10, limit=1)
            assert answer["w@test"]["policies"]["hog"]["each"]["memory"] == "128M"


def test_set_less_than_is_in_use(sessions: Sessions) -> None:
    with sessions(concurrency=1) as session, staying(session) as stay:
        assert rcon_set(session, "stay", "memory", "256M")["ok"]["cgroups"] == 1
        # v1 refuses and keeps the old limit; v2 sets it and kills.
        reply = rcon_set(session, "stay", "memory", "1M")
        assert ("error" in reply) != (stay.limits().memory_max == 1 << 20)
        if "error" in reply:
            assert "more memory is in use, and the kernel could not reclaim it" in reply["error"]
            assert stay.limits().memory_max == 256 << 20


def test_set_beside_fresh_processes(sessions: Sessions) -> None:
    """No process writes the old limit when it makes an executor process."""
    with sessions(concurrency=2) as session:
        for limit in ("1G", "512M", "768M"):
            for _ in range(4):
                session.get("fresh")
            before = [session.send("fresh") for _ in range(6)]
            assert rcon_set(session, "fresh", "memory", limit)["ok"]["after"] == limit
            for result in [*before, *(session.send("fresh") for _ in range(6))]:
                session.wait(result)
            until(lambda: bool(group_of(session, "fresh").pids()))
            assert group_of(session, "fresh").limits().memory_max == parse_size(limit)


def test_set_no_limit(sessions: Sessions) -> None:
    """``max`` removes a limit, of running tasks too."""
    with sessions(concurrency=2) as session, staying(session) as stay:
        assert rcon_set(session, "stay", "memory", "1G")["ok"]["after"] == "1G"
        assert rcon_set(session, "stay", "cpu", "150%")["ok"]["cgroups"] == 1
        leaves = [stay.cgroup.child(name) for name in stay.cgroup.children()]
        for key in ("memory", "cpu", "each.pids"):
            reply = rcon_set(session, "stay", key, "max")["ok"]
            assert reply["after"] is None
            assert reply["cgroups"] >= 1
        assert (stay.limits().memory_max, stay.limits().cpu_quota) == (MAX, MAX)
        assert {read_limits(leaf).pids_max for leaf in leaves} == {MAX}
        # And for later tasks: no process of the pool writes the old limit.
        for _ in range(3):
            assert "memory limit 64M" in str(session.error("hog", MemoryLimitExceeded))
        assert rcon_set(session, "hog", "each.memory", "max")["ok"]["before"] == "64M"
        assert [session.get("hog") for _ in range(3)] == [256 << 20] * 3


def test_set_memory_that_expands(sessions: Sessions) -> None:
    """Set, change and remove it: each time for later tasks, in both processes."""
    table = '{ limit = "64M", expand = "2x", up_to = "%s" }'
    with sessions(concurrency=2) as session:
        for _ in range(3):
            assert "memory limit 64M" in str(session.error("hog", MemoryLimitExceeded))
        reply = rcon_set(session, "hog", "each.memory", table % "1G")["ok"]
        assert (reply["before"], reply["after"]) == ("64M", {"limit": "64M", "expand": "2x", "up_to": "1G"})
        assert [session.get("hog") for _ in range(3)] == [256 << 20] * 3
        assert rcon_set(session, "hog", "each.memory", table % "128M")["ok"]["before"]["up_to"] == "1G"
        for _ in range(3):
            assert "memory limit 128M (up_to" in str(session.error("hog", MemoryLimitExceeded))
        assert rcon_set(session, "hog", "each.memory", "96M")["ok"]["after"] == "96M"
        for _ in range(3):
            assert "memory limit 96M" in str(session.error("hog", MemoryLimitExceeded))
        # The limit together, while a task runs.
        with staying(session) as stay:
            assert rcon_set(session, "stay", "memory", table % "1G")["ok"]["cgroups"] == 1
            assert stay.limits().memory_max == 1 << 30
            assert rcon_set(session, "stay", "memory", table % "512M")["ok"]["cgroups"] == 1
            assert stay.limits().memory_max == 512 << 20
            assert rcon_set(session, "stay", "memory", "max")["ok"]["after"] is None
            assert stay.limits().memory_max == MAX


def test_set_limits_of_io(sessions: Sessions, tmp_path: Path) -> None:
    """For a task that writes to the disk of this machine, and for the next one."""
    with sessions(concurrency=2) as session:
        slow = 2 << 20

        def rate(after: int) -> float:
            """Return bytes a second of the last lines of the log, each of which is 1 MiB, once there are more."""
            until(lambda: len(session.log("writes")) >= after + 8)
            times = [float(line) for line in session.log("writes")[after:]]
            return (len(times) - 1) * (1 << 20) / (times[-1] - times[0])

        disk = disk_of(tmp_path)
        result = session.send("write", f"{disk}/file", str(tmp_path / "stop"))
        until(lambda: len(session.log("writes")) >= 8)
        reply = rcon_set(session, "write", f"io.{disk}.write", "2M")["ok"]
        assert (reply["before"], reply["after"], reply["cgroups"], reply["kept"]) == (None, "2M", 1, 0)
        group = group_of(session, "write")
        assert [most.wbps for most in group.limits().io.values()] == [slow]
        assert rate(len(session.log("writes")) + 2) < 2 * slow
        # Another value, more keys, and no limit.
        table = '{ write = "1M", write_iops = 500 }'
        assert rcon_set(session, "write", f"io.{disk}", table)["ok"]["before"] == {"write": "2M"}
        (most,) = group.limits().io.values()
        assert (most.wbps, most.wiops) == (1 << 20, 500)
        assert rcon_set(session, "write", f'io."{disk}".write', "max")["ok"]["before"] == "1M"
        (most,) = group.limits().io.values()
        assert (most.wbps, most.wiops) in ((MAX, 500), (None, 500))
        assert rcon_set(session, "write", f"io.{disk}", "max")["ok"]["after"] is None
        assert not group.limits().io
        (tmp_path / "stop").touch()
        assert session.wait(result) == "done"
        # For later tasks, in every process.
        rcon_set(session, "write", f"each.io.{disk}.write", "2M")
        for name in ("one", "two"):
            session.send("write", f"{disk}/{name}", str(tmp_path / "never"))
        until(lambda: len(group_of(session, "write").pids()) >= 2)
        leaves = [group.cgroup.child(name) for name in group.cgroup.children()]
        until(lambda: all([m.wbps for m in read_limits(leaf).io.values()] == [slow] for leaf in leaves))
        (tmp_path / "never").touch()


def disk_of(path: Path) -> str:
    """Return a directory on a disk: this one, or that of the emulated machine."""
    return os.environ.get("RCON_TEST_DISK", str(path))


@pytest.mark.parametrize("pool", ["prefork", "threads", "solo"])
def test_set_a_timeout_in_every_pool(sessions: Sessions, pool: str) -> None:
    with sessions(pool=pool, concurrency=1) as session:
        assert "wall time limit 1s reached" in str(session.error("hang", TimeLimitExceeded))
        assert rcon_set(session, "hang", "each.timeout", "500ms")["ok"]["before"] == "1s"
        assert "wall time limit 500ms reached" in str(session.error("hang", TimeLimitExceeded))


def test_set_refused(sessions: Sessions) -> None:
    with sessions(concurrency=1) as session:
        for arguments, error in (
            (("no", "memory", "1G"), "there is no policy 'no' (one of: "),
            (("small", "memory", "1x"), "policy.small.memory: '1x' is not a size (write"),
            (
                ("small", "memory", "64M"),
                "policy.small.memory: 128M is never reached: the whole policy is limited to 64M",
            ),
            (("small", "cpus", "4000"), "policy.small.cpus: "),
            (
                ("small", "io./nowhere.read", "1M"),
                "policy.small.io./nowhere: cannot be enforced on this machine: ",
            ),
            (("small", "memory"), "give POLICY, LIMIT and VALUE: "),
        ):
            reply = rcon_set(session, *arguments)
            assert reply["error"].startswith(error)
            assert "\n" not in reply["error"]
        (answer,) = session.app.control.broadcast("rcon", reply=True, timeout=10, limit=1)
        assert answer["w@test"]["policies"]["small"] == {
            "memory": "1G",
            "each": {"memory": "128M", "timeout": "1m"},
        }


RCON = "from rcon_plugins.cli.start import main; main()"


def top(*arguments: str, url: str, app: str = limited.__name__) -> subprocess.CompletedProcess[str]:
    """Run `rcon top --celery` to its end."""
    command = [sys.executable, "-c", RCON, "top", "--celery", app, *arguments]
    return subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, limited.BROKER: url},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_top_of_all_workers(sessions: Sessions) -> None:
    """Two workers of one application, with a task in each."""
    with sessions("-Q", "one", concurrency=2) as one:
        other, producer, _ = sessions.make("-Q", "two", concurrency=1, url=one.url, name="other")
        with closing(producer), other:
            staying = [one.send("stay", queue, queue=queue) for queue in ("one", "two")]
            until(lambda: bool(one.log("one")) and bool(one.log("two")))
            one.get("where", queue="one")
            done = top("--json", "--iterations", "2", "--interval", "1", "--sort", "name", url=one.url)
            assert done.returncode == 0, done.stderr
            first, second = map(json.loads, done.stdout.splitlines())
            names = [row["group"] for row in second["groups"]]
            assert names == sorted(names)
            assert {"w@test/stay", "other@test/stay"} <= set(names)
            for row in first["groups"] + second["groups"]:
                assert row["node"] in ("w@test", "other@test")
                assert row["group"].startswith(f"{row['node']}/")
                assert row["cpu"] is not None
                assert row["memory"] > 0
            for line in (first, second):
                found = {one["node"]: one["unroutable"] for one in line["servers"]}
                assert found == {"w@test": 0, "other@test": 0}
            # Without JSON, a table of the same.
            done = top("--iterations", "1", "--interval", "0.5", url=one.url)
            assert done.returncode == 0, done.stderr
            assert "w@test/stay" in done.stdout
            assert "celery worker other@test" in done.stdout
            for result in staying:
                result.revoke(terminate=True)


def test_top_on_a_terminal(sessions: Sessions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A live table that reads keys while the broker does not answer, and outlives the broker."""
    with RedisServer(tmp_path) as server:
        url = server.database()
        with sessions(concurrency=1, url=url) as session:
            monkeypatch.setenv(limited.BROKER, url)
            session.send("stay", "shown")
            until(lambda: bool(session.log("shown")))
            with terminal("top", "--interval", "0.5", "--celery", limited.__name__, program=RCON) as it:
                it.until(lambda: it.shows("w@test/stay") and it.shows("1 group of 1 worker"))
                it.resize(12, 120)
                it.until(lambda: it.shows("celery worker w@test"))
                os.kill(server.process.pid, signal.SIGSTOP)
                try:
                    it.until(lambda: it.shows("old data: no answer for "))
                    it.keys("m")
                    it.until(lambda: it.shows("w@test/stay"))
                finally:
                    os.kill(server.process.pid, signal.SIGCONT)
                it.until(lambda: it.shows("sorted by memory"))
                os.kill(server.process.pid, signal.SIGSTOP)
                try:
                    it.until(lambda: it.shows("old data: no answer for "))
                    it.keys("q")
                    assert it.status() == 0
                    assert it.is_clean()
                finally:
                    os.kill(server.process.pid, signal.SIGCONT)
            with terminal("top", "--interval", "0.5", "--celery", limited.__name__, program=RCON) as it:
                it.until(lambda: it.shows("w@test/stay"))
                server.process.kill()
                it.until(lambda: it.shows("old data: the broker "))
                it.keys("\x03")
                assert it.status() == 0
                assert it.is_clean()
            session.worker.kill()  # without a broker it would not end for long
    with sessions(concurrency=1):
        pass  # it removes what the killed worker left


def test_top_without_workers(sessions: Sessions, redis_server: RedisServer) -> None:
    done = top("--iterations", "1", url=redis_server.database())
    assert done.returncode == 125
    assert done.stderr.startswith("rcon: no worker answers on the broker redis://")
    assert done.stderr.count("\n") == 1
    done = top("--iterations", "1", url="redis://127.0.0.1:1/0")
    assert done.returncode == 125
    assert "cannot be reached" in done.stderr
    assert done.stderr.count("\n") == 1
    done = top("--iterations", "1", url="", app="no.such.thing")
    assert done.returncode == 2
    assert "--celery: 'no.such.thing' cannot be loaded as a Celery application" in done.stderr


def test_top_of_unconfined_workers(redis_server: RedisServer, tmp_path: Path) -> None:
    url = redis_server.database()
    (tmp_path / "plain.py").write_text(f"import celery\napp = celery.Celery(broker={url!r})\n")
    environ = {"PYTHONPATH": str(tmp_path)}
    with Worker(tmp_path, "plain", pool="solo", environ=environ):
        done = top("--iterations", "1", url=url)
        assert done.returncode == 125
        assert done.stderr.startswith("rcon: w@test: ")


def test_top_without_celery() -> None:
    program = (
        f"import sys; sys.modules['celery'] = None\nsys.argv = ['rcon', 'top', '--celery', 'proj']\n{RCON}"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 125
    assert done.stderr == (
        "rcon: --celery: celery is not installed here (pip install 'rcon-plugins[celery]')\n"
    )
