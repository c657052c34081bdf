"""With systemd as PID 1 and the system bus: root and users request scopes, and the units of the examples start.

These tests run in an emulated machine: tests/vm_systemd.py. pytest is a service there, and its cgroup is not delegated,
like that of a shell.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jeepney.io.blocking
import pytest

from rcon_plugins import confine
from rcon_plugins.kernel.cgroup import Hierarchy
from rcon_plugins.kernel.cgroup.mounts import is_systemds
from rcon_plugins.tree import systemd
from rcon_plugins.tree.base import find_base
from tests import children
from tests.commands import become_rcon
from tests.directories import let_others_read
from tests.integrations.celery.redis_server import RedisServer
from tests.kernel.cgroup.helpers import running, sleep_forever
from tests.kernel.command.harness import ALLOCATE, rcon, until
from tests.kernel.systemd.test_user_manager import a_server

pytestmark = [pytest.mark.kernel, pytest.mark.layout("v2"), pytest.mark.init("systemd")]

CGROUPS = Path("/sys/fs/cgroup")
UNITS = Path("/run/systemd/system")
EXAMPLES = Path(__file__).resolve().parents[3] / "examples" / "systemd"
BIN = Path(sys.executable).parent
USER = "www-data"
UID, GID = 33, 33  # the same on every Debian
DELEGATE = "Delegate=cpu cpuset io memory pids"
#: A command that needs more than 64 MiB of memory.
GREEDY = ALLOCATE.format(200).split()


def systemctl(*words: str) -> str:
    done = subprocess.run(["systemctl", *words], capture_output=True, text=True, check=False, timeout=280)
    assert done.returncode == 0, f"systemctl {' '.join(words)}: {done.stdout}{done.stderr}"
    return done.stdout


def as_service(*words: str, **properties: str) -> subprocess.CompletedProcess[str]:
    """Run a command as a service of its own."""
    options = [f"--property={name}={value}" for name, value in properties.items()]
    return subprocess.run(
        ["systemd-run", "--wait", "--pipe", "--collect", "--quiet", *options, *words],
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )


def scope_of(text: str) -> str:
    """Return the name of our scope in a path."""
    found = re.search(r"/(rcon-\d+-[0-9a-f]{8}\.scope)/", text)
    assert found, text
    return found[1]


def gone(unit: str) -> bool:
    return "LoadState=not-found" in systemctl("show", "--property=LoadState", unit)


# -- root, from a shell


def test_a_command_of_roots() -> None:
    assert is_systemds()
    done = rcon("run", "--memory", "64M", "--cpu", "50%", "--", "cat", "/proc/self/cgroup")
    assert (done.status, done.err) == (0, "")
    assert re.fullmatch(r"0::/system\.slice/rcon-\d+-\w+\.scope/rcon-\d+-\d+/work/cat-\d+/main\n", done.out)
    until(lambda: gone(scope_of(done.out)), "the scope goes with its last process")


def test_its_limits_hold() -> None:
    done = rcon("run", "--memory", "64M", "--swap", "0", "--", *GREEDY)
    assert (done.status, done.err) == (137, "rcon: memory limit 64 MiB reached (peak 64.0 MiB)\n")
    assert done.report["outcome"] == "memory"


def test_cgroups_of_a_killed_rcon_in_its_scope_are_removed(tmp_path: Path) -> None:
    out = tmp_path / "out"
    script = "sh -c 'echo $$; cat /proc/self/cgroup; exec sleep 1000' & wait"
    pid = os.fork()
    if pid == 0:
        become_rcon(["run", "--pids", "7", "--", "sh", "-c", script], [out, tmp_path / "err"])
    until(lambda: out.exists() and out.read_text().count("\n") == 2, "the command runs")
    left, scope = int(out.read_text().split()[0]), scope_of(out.read_text())
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert not gone(scope)
    assert rcon("gc").status == 0
    until(lambda: not Path("/proc", str(left)).exists(), "rcon gc ends it")
    until(lambda: gone(scope), "the scope goes with it")


def test_an_attached_process_is_moved_back_into_its_unit() -> None:
    with running(None, sleep_forever) as child:
        where = Path(f"/proc/{child.pid}/cgroup")
        before = where.read_text()
        done = rcon("attach", "--pids", "9", "--group", "held", str(child.pid))
        assert (done.status, done.err) == (0, "")
        scope = scope_of(where.read_text())
        assert "/attached/held\n" in where.read_text()
        assert rcon("attach", "--release", "held").status == 0
        assert where.read_text() == before
    until(lambda: gone(scope), "the scope goes with the watcher")


def test_a_block_and_a_server_of_roots() -> None:
    def act() -> tuple[str, list[str], str]:
        with confine(cpu="30%", pids=20):
            inside = Path("/proc/thread-self/cgroup").read_text()
        return inside, *a_server()

    assert jeepney.io.blocking  # imported here, as a user who can read it
    inside, endings, after = children.in_child(act, timeout=280)
    assert "/host/confine~1" in inside
    assert endings == ["ok", "memory"]
    assert after.startswith("/system.slice/rcon-")
    assert scope_of(inside) == scope_of(f"{after}/")
    until(lambda: gone(scope_of(inside)), "the scope goes with its last process")


def test_every_limit_can_be_set(capsys: pytest.CaptureFixture[str]) -> None:
    done = rcon("doctor", "--json")
    found = json.loads(done.out)
    names = {finding["name"]: finding for finding in found["findings"]}
    # The working directory is not on a block device here.
    assert {finding["name"] for finding in found["missing"]} <= {"io"}, found["missing"]
    assert re.fullmatch(r"/system\.slice/rcon-\S+\.scope", found["base"])
    assert found["systemd"] is True
    assert names["systemd"]["state"] == "there"


def test_a_scope_that_is_given() -> None:
    """docs/howto/delegation.md recommends this for users without jeepney."""
    words = ["systemd-run", "--scope", "--quiet", "-p", "Delegate=yes", "--unit=given"]
    words += [str(BIN / "rcon"), "run", "--pids", "20", "--", "cat", "/proc/self/cgroup"]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=280)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"0::/system\.slice/given\.scope/rcon-\d+-\d+/work/cat-\d+/main\n", done.stdout)


# -- an ordinary user, from a login


def become_user() -> None:
    os.environ.update(HOME="/tmp", XDG_RUNTIME_DIR=f"/run/user/{UID}")
    os.setgroups([])
    os.setresgid(GID, GID, GID)
    os.setresuid(UID, UID, UID)


@pytest.fixture(scope="module")
def login() -> Iterator[Path]:
    """Start the user's manager and a session beside it, both by systemd. Yield the session's cgroup."""
    systemctl("start", f"user@{UID}.service")
    words = ["systemd-run", "--scope", "--quiet", f"--slice=user-{UID}.slice", "--unit=session-1.scope"]
    leader = subprocess.Popen([*words, f"--uid={USER}", "sleep", "1000"])
    session = CGROUPS / f"user.slice/user-{UID}.slice/session-1.scope"
    try:
        until(lambda: session.exists() and session.joinpath("cgroup.procs").read_text(), "the session")
        yield session
    finally:
        leader.terminate()
        leader.wait()
        systemctl("stop", f"user@{UID}.service", f"user-runtime-dir@{UID}.service")


def in_session(session: Path, act: Callable[[], Any]) -> Any:
    def child() -> Any:
        session.joinpath("cgroup.procs").write_text("0")
        become_user()
        return act()

    return children.in_child(child, timeout=280)


def test_a_user_from_a_login_is_moved_with_the_help_of_the_system(login: Path) -> None:
    """The user's manager may not move a process out of a session. It requests that from PID 1."""
    base = in_session(login, lambda: find_base(Hierarchy.discover(), None, systemd.enter_scope))
    assert re.fullmatch(
        rf"/user\.slice/user-{UID}\.slice/user@{UID}\.service/app\.slice/rcon-\S+\.scope", base
    )
    until(lambda: not CGROUPS.joinpath(base[1:]).exists(), "the scope goes with its last process")


def test_a_command_of_a_users(login: Path, tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    streams = [tmp_path / "out", tmp_path / "err"]

    def act() -> int:
        child = os.fork()
        if child == 0:
            become_rcon(["run", "--memory", "64M", "--swap", "0", "--", *GREEDY], streams)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    let_others_read(tmp_path)
    tmp_path.chmod(0o777)
    assert in_session(login, act) == 137
    assert streams[1].read_text() == "rcon: memory limit 64 MiB reached (peak 64.0 MiB)\n"


# -- services


@pytest.fixture
def site() -> Path:
    """Return the directory that replaces /srv/site in the units. Every user can read it."""
    directory = Path(tempfile.mkdtemp(prefix="site-", dir="/tmp"))
    directory.chmod(0o755)
    return directory


@pytest.mark.parametrize("user", ["root", USER])
def test_a_service_to_which_its_cgroup_is_left(user: str) -> None:
    words = [str(BIN / "rcon"), "run", "--memory", "64M", "--", "cat", "/proc/self/cgroup"]
    done = as_service(*words, User=user, Delegate="cpu cpuset io memory pids")
    assert (done.returncode, done.stderr) == (0, "")
    assert re.fullmatch(r"0::/system\.slice/run-\w+\.service/rcon-\d+-\d+/work/cat-\d+/main\n", done.stdout)


def test_the_error_names_the_delegate_line_that_a_service_lacks() -> None:
    # This user has no manager of its own. The other user has one while it is logged in.
    done = as_service(str(BIN / "rcon"), "run", "--memory", "64M", "--", "true", User="daemon")
    assert done.returncode == 125
    unit = re.search(r"systemctl edit (run-\w+\.service): \[Service\] (Delegate=[a-z ]+)", done.stderr)
    assert unit, done.stderr
    assert unit[2] == DELEGATE


def test_a_service_of_roots_without_stays_in_its_slice() -> None:
    words = (str(BIN / "rcon"), "run", "--memory", "64M", "--", "cat", "/proc/self/cgroup")
    done = as_service(*words, Slice="held.slice")
    assert (done.returncode, done.stderr) == (0, "")
    assert re.fullmatch(r"0::/held\.slice/rcon-\S+\.scope/rcon-\d+-\d+/work/cat-\d+/main\n", done.stdout)


def test_a_root_service_does_not_escape_its_own_limits() -> None:
    done = as_service(str(BIN / "rcon"), "run", "--memory", "64M", "--", "true", MemoryMax="500M")
    assert done.returncode == 125
    assert "has limits, and a cgroup outside of the unit would escape them" in done.stderr
    assert re.search(rf"systemctl edit run-\w+\.service: \[Service\] {DELEGATE}", done.stderr)


def test_a_service_that_begins_in_a_subgroup(site: Path) -> None:
    """systemd 254 does this with DelegateSubgroup=. The subgroup may contain several processes."""
    script = site / "begin"
    script.write_text(
        "own=/sys/fs/cgroup$(cut -d: -f3 /proc/self/cgroup)\n"
        'mkdir "$own/server" && echo $$ >"$own/server/cgroup.procs"\n'
        f"sleep 1000 & {BIN}/rcon run --memory 64M -- cat /proc/self/cgroup; kill $!; cat /proc/self/cgroup\n"
    )
    done = as_service("sh", str(script), User=USER, Delegate="cpu cpuset io memory pids")
    assert (done.returncode, done.stderr) == (0, "")
    inside, after = done.stdout.splitlines()
    unit = after.removesuffix("/server")
    assert re.fullmatch(r"0::/system\.slice/run-\w+\.service", unit)
    assert re.fullmatch(rf"{re.escape(unit)}/rcon-\d+-\d+/work/cat-\d+/main", inside)


# -- the units of the examples


@contextlib.contextmanager
def started(name: str, site: Path, *changes: tuple[str, str]) -> Iterator[str]:
    """Start the unit of an example, with the paths of this machine. Yield the name of the service."""
    text = EXAMPLES.joinpath(f"{name}.service").read_text()
    for old, new in (("/srv/site/.venv/bin", str(BIN)), ("/srv/site", str(site)), *changes):
        assert old in text
        text = text.replace(old, new)
    unit = UNITS / f"site-{name}.service"
    unit.write_text(text)
    systemctl("daemon-reload")
    try:
        try:
            systemctl("start", unit.name)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{systemctl_status(unit.name)}") from None
        yield unit.name
        systemctl("stop", unit.name)
        assert systemctl("show", "--value", "--property=Result", unit.name) == "success\n"
        assert not CGROUPS.joinpath("system.slice", unit.name).exists()
    finally:
        with contextlib.suppress(AssertionError):
            systemctl("stop", unit.name)
        unit.unlink()
        systemctl("daemon-reload")


def systemctl_status(unit: str) -> str:
    done = subprocess.run(["systemctl", "status", unit], capture_output=True, text=True, check=False)
    return done.stdout


APP = """
import pathlib
def app(environ, start_response):
    if environ["PATH_INFO"] == "/hog":
        b"x" * (200 << 20)
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [pathlib.Path("/proc/self/cgroup").read_bytes()]
"""


def get(port: int, path: str = "/") -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=100) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def test_the_unit_of_gunicorn(site: Path) -> None:
    site.joinpath("app.py").write_text(APP)
    site.joinpath("rcon.toml").write_text(
        '[policy.default]\neach = { memory = "64M", swap = "0", timeout = "60s" }\n'
    )
    port = free_port()
    changes = (("/etc/rcon.toml", f"{site}/rcon.toml"), ("127.0.0.1:8000", f"127.0.0.1:{port}"))
    with started("gunicorn", site, *changes, ("--workers 2", "--workers 1")) as unit:
        # The unit has Type=notify, so it serves as soon as it is started.
        status, where = get(port)
        assert status == 200
        inside = rf"0::/system\.slice/{unit}/rcon-\d+-\d+/work/default/\S+"
        assert re.fullmatch(inside, where.strip())
        status, said = get(port, "/hog")
        assert (status, json.loads(said)["status"]) == (503, 503)
        main = systemctl("show", "--value", "--property=MainPID", unit).strip()
        assert Path(f"/proc/{main}").stat().st_uid == UID
        systemctl("reload", unit)
        until(lambda: get(port)[0] == 200, "it serves after a reload")
        assert systemctl("show", "--value", "--property=MainPID", unit).strip() == main
        assert re.fullmatch(inside, get(port)[1].strip())


TASKS = """
import pathlib
from celery import Celery
from celery.signals import worker_ready
from rcon_celery import confined, install
app = Celery("site", broker={url!r}, backend={url!r})
install(app)

@app.task
@confined(memory="64M", timeout="60s")
def hog(mebibytes):
    b"x" * (mebibytes << 20)
    return pathlib.Path("/proc/self/cgroup").read_text()

# Sent by the worker: the test would take long to import Celery and the client of Redis.
@worker_ready.connect
def send(**_):
    for mebibytes in (1, 200):
        hog.apply_async((mebibytes,), task_id=f"hog-{{mebibytes}}")
"""


def result_of(redis: RedisServer, task: str) -> dict[str, Any]:
    """Return what a worker has stored as the result of a task, in the first database."""
    deadline = time.monotonic() + 280
    with (
        socket.create_connection(("127.0.0.1", redis.port), timeout=100) as connection,
        connection.makefile("rb") as answers,
    ):
        while time.monotonic() < deadline:
            connection.sendall(f"GET celery-task-meta-{task}\r\n".encode())
            length = int(answers.readline().removeprefix(b"$"))
            stored = json.loads(answers.read(length + len("\r\n"))) if length > 0 else {}
            if stored.get("status") in ("SUCCESS", "FAILURE"):
                return dict(stored)
            time.sleep(0.1)
    raise TimeoutError(f"the task {task} has no result")


def test_the_unit_of_celery(site: Path, tmp_path: Path) -> None:
    with RedisServer(tmp_path) as redis:
        site.joinpath("tasks.py").write_text(TASKS.format(url=redis.database()))
        with started("celery", site, ("--concurrency 4", "--concurrency 1")) as unit:
            small = result_of(redis, "hog-1")
            assert small["status"] == "SUCCESS"
            inside = rf"0::/system\.slice/{unit}/rcon-\d+-\d+/work/\S+\n"
            assert re.fullmatch(inside, small["result"])
            large = result_of(redis, "hog-200")
            assert large["status"] == "FAILURE"
            assert large["result"]["exc_type"] == "MemoryLimitExceeded"
            assert "memory limit 64M reached" in str(large["result"]["exc_message"])
