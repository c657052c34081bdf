"""gunicorn with an identity for each tenant: `--user`, what is refused, and which files of the server are not seen."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.directories import let_others_read
from tests.integrations.gunicorn.server import Gunicorn
from tests.integrations.gunicorn.tenants import NOTHING, TENANTS, ids, is_right, settings
from tests.processes import alive, children, until

TO_BECOME_OTHERS = 1 << 6 | 1 << 7 | 1 << 8


@pytest.mark.parametrize(
    "arguments",
    [("sync",), ("gthread", "--threads", "4"), ("gevent",)],
    ids=["sync", "gthread", "gevent"],
)
def test_a_worker_of_another_user_keeps_the_capabilities_to_change_users(
    tmp_path: Path, homes: Path, arguments: tuple[str, ...]
) -> None:
    more = ("--worker-class", *arguments, "--user", "www-data", "--group", "www-data")
    let_others_read(tmp_path)
    with Gunicorn(tmp_path, settings(homes, "process"), *more) as server:
        for name, uid in TENANTS.items():
            answer = server.get("/state", Host=name)
            assert answer.status == 200, server.log()
            assert is_right(answer.body, uid), answer.body
        (worker,) = server.workers()
        for task in Path(f"/proc/{worker}/task").iterdir():
            state = dict(line.split(":\t") for line in ids(task).splitlines())
            assert state["Uid"].split() == ["33"] * 4
            assert int(state["CapPrm"], 16) == TO_BECOME_OTHERS
            assert int(state["CapEff"], 16) == 0
            assert int(state["CapInh"], 16) == int(state["CapAmb"], 16) == 0
        free = server.get("/free/state").json()
        assert free["uids"] == [33] * 4
        assert {name: free[name] for name in NOTHING} == NOTHING  # work without an identity has none of it


def test_threads_of_a_worker_of_another_user(tmp_path: Path, homes: Path) -> None:
    more = ("--worker-class", "gthread", "--threads", "8", "--user", "www-data", "--group", "www-data")
    let_others_read(tmp_path)
    with Gunicorn(tmp_path, settings(homes, "thread"), *more) as server:
        for name, uid in TENANTS.items():
            assert is_right(server.get("/state", Host=name).body, uid), server.log()


def test_executors_of_other_users_end_with_the_fork_server(tmp_path: Path, homes: Path) -> None:
    """Whom the worker, as www-data, may not signal."""
    more = ("--worker-class", "gthread", "--threads", "4", "--user", "www-data", "--group", "www-data")
    let_others_read(tmp_path)
    with Gunicorn(tmp_path, settings(homes, "process"), *more) as server:
        for name in TENANTS:
            assert server.get("/state", Host=name).status == 200
        executors = server.executors("tenant")
        assert len(executors) == len(TENANTS)
        (worker,) = server.workers()
        (fork_server,) = [pid for pid in children(worker) if pid not in executors]
        os.kill(fork_server, signal.SIGKILL)
        until(lambda: not any(map(alive, executors)))
        until(lambda: server.status("/free/who") == 200)  # a new worker serves


def test_a_hanging_request_of_another_user_is_ended_at_its_deadline(tmp_path: Path, homes: Path) -> None:
    more = ("--worker-class", "gthread", "--threads", "4", "--user", "www-data", "--group", "www-data")
    let_others_read(tmp_path)
    text = settings(homes, "process").replace('per = "host"', 'per = "host"\neach = { timeout = "1s" }')
    with Gunicorn(tmp_path, text, *more) as server:
        assert server.get("/sleep?seconds=60", Host="tenant1").status == 504
        until(lambda: len(server.executors("tenant")) <= 1)  # the successor, if anybody
        until(
            lambda: server.get("/state", Host="tenant1").status == 200
        )  # within its second, in which it may not start


@pytest.mark.parametrize("isolation", ["thread", "process"])
def test_identities_that_the_policy_forbids_are_refused(tmp_path: Path, homes: Path, isolation: str) -> None:
    with Gunicorn(
        tmp_path, settings(homes, isolation), "--worker-class", "gthread", "--threads", "2"
    ) as server:
        hosts = ["root", "daemon", "nobody-here", "out", "..", ".", "%2e%2e", "a/b", "../homes/tenant1"]
        for host in hosts:
            answer = server.get("/state", Host=host)
            assert answer.status == 403, host
            assert answer.headers["Content-Type"] == "application/problem+json"
            assert str(homes) not in answer.body.decode()
        # A link that stays inside of what was given is followed.
        assert is_right(server.get("/state", Host="elsewhere").body, TENANTS["tenant1"])
        told = [line for line in server.lines() if line["event"] == "forbidden"]
        assert len(told) == len(hosts)
        assert all(line["policy"] == "tenant" and line["detail"] for line in told)


#: gunicorn's logs through handlers that open their file again, each time it is another one.
LOGGING = """
[loggers]
keys = root, gunicorn.error, gunicorn.access
[handlers]
keys = error, access
[formatters]
keys = plain
[logger_root]
handlers =
[logger_gunicorn.error]
level = INFO
qualname = gunicorn.error
handlers = error
propagate = 0
[logger_gunicorn.access]
level = INFO
qualname = gunicorn.access
handlers = access
propagate = 0
[handler_error]
class = logging.handlers.WatchedFileHandler
args = ("{logs}/error",)
formatter = plain
[handler_access]
class = logging.handlers.WatchedFileHandler
args = ("{logs}/access",)
formatter = plain
[formatter_plain]
format = plain %(message)s
"""


@pytest.mark.parametrize("worker", ["sync", "gthread", "gevent"])
@pytest.mark.parametrize("how", ["files", "capture", "config"])
def test_executors_have_no_log_file_of_the_server(tmp_path: Path, homes: Path, worker: str, how: str) -> None:
    logs = tmp_path / "logs"
    logs.mkdir(mode=0o700)
    files = ("--error-logfile", f"{logs}/error", "--access-logfile", f"{logs}/access")
    (tmp_path / "logging.ini").write_text(LOGGING.format(logs=logs))
    more = {
        "files": files,
        "capture": (*files, "--capture-output"),
        "config": ("--log-config", f"{tmp_path}/logging.ini"),
    }[how]
    with Gunicorn(tmp_path, settings(homes, "process"), "--worker-class", worker, *more) as server:
        assert (logs / "error").exists()
        for path, host in [("/files", "tenant1"), ("/free/files", "x")]:
            files_of_work = server.get(path, Host=host).json()
            named = {name for name, target in files_of_work.items() if target.startswith(f"{logs}/")}
            # Captured output is the error log: standard output and standard error of code with the server's user.
            assert named == ({"1", "2"} if how == "capture" and host == "x" else set())
        # What the application says through gunicorn's loggers goes to the error log, with the policy and the key.
        assert is_right(server.get("/state", Host="tenant1").body, TENANTS["tenant1"])
        answer = server.get("/log?say=something", Host="tenant1")
        assert (answer.status, answer.json()["uid"]) == (200, TENANTS["tenant1"])
        until(lambda: "something in gunicorn.access" in (logs / "error").read_text())
        said = [line for line in (logs / "error").read_text().splitlines() if "something in" in line]
        assert {line.partition(" ")[0] for line in said} == {"[tenant"}
        assert any("something in gunicorn.error" in line for line in said)
        assert "Logging error" not in server.log() + (logs / "error").read_text()
        # The server logs as ever.
        assert server.get("/state", Host="root").status == 403
        until(lambda: "rcon: forbidden " in (logs / "error").read_text())
        until(lambda: "/log?say=something" in (logs / "access").read_text())
        assert "something in" not in (logs / "access").read_text()
        (logs / "access").unlink()
        server.signal(signal.SIGUSR1)  # to open the files again
        until(lambda: server.status("/free/who") == 200 and (logs / "access").exists())


def test_a_worker_that_may_change_users_cannot_gain_other_capabilities(tmp_path: Path, homes: Path) -> None:
    """Work in its own process, which no route names: what it could raise again, and what it could not."""
    let_others_read(tmp_path)
    text = 'unmatched = "allow"\n' + settings(homes, "process").replace(
        '[[route]]\npolicy = "tenant"', '[[route]]\nhost = "tenant1"\npolicy = "tenant"'
    )
    more = ("--worker-class", "sync", "--user", "www-data", "--group", "www-data")
    with Gunicorn(tmp_path, text, *more) as server:
        inside = server.get("/state", Host="elsewhere.example").json()
        assert inside["uids"] == [33] * 4
        assert inside["CapPrm"] == inside["CapBnd"] == TO_BECOME_OTHERS
        assert inside["CapEff"] == 0
        assert "can become the users of other policies" in server.log()
        assert is_right(server.get("/state", Host="tenant1").body, TENANTS["tenant1"])


def test_requests_that_run_as_root_are_warned_about(tmp_path: Path) -> None:
    text = '[policy.free]\nisolation = "process"\npids = 64\n[[route]]\npolicy = "free"\n'
    with Gunicorn(tmp_path, text) as server:
        assert (
            "policy free: requests run as root and can overwrite root's files. Set `user =`" in server.log()
        )
