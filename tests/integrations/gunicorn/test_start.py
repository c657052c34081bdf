"""What is refused at start, in one line, and how hooks are put together."""

from __future__ import annotations

import os
import resource
import signal
import tempfile
from pathlib import Path
from typing import Any

import pytest

from rcon_gunicorn import Hooks, chain
from rcon_gunicorn.master import Boots
from rcon_gunicorn.workers import refusal, server_traits
from rcon_plugins.confinement.isolation import Server
from rcon_plugins.errors import ConfinementError, KernelError
from tests.integrations.gunicorn import template
from tests.integrations.gunicorn.server import HERE, Gunicorn
from tests.processes import instance_directories, until

FREE = '[policy.free]\nisolation = "process"\n[[route]]\npolicy = "free"\n'
PLAIN = '[policy.default]\nmemory = "64M"\n'


def start(directory: Path, settings: str | None, *arguments: str) -> tuple[int, str, int]:
    """Exit status, output and pid of a gunicorn that does not start."""
    file = directory / "rcon.toml"
    if settings is not None:
        file.write_text(settings)
    command = ["--chdir", str(HERE), "--no-control-socket", "--bind", "127.0.0.1:0"]
    command += ["--config", "python:rcon_gunicorn.conf", *arguments, "application:app"]
    environ = {**os.environ, "RCON_SETTINGS": str(file) if settings is not None else ""}
    with tempfile.TemporaryFile() as output:
        process = template.start(command, environ, output.fileno())
        status = process.wait(timeout=30)
        output.seek(0)
        text = output.read().decode()
    return status, text, process.pid


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        pytest.param('[policy.default]\nmemory = "64MB"\n', "policy.default.memory", id="unit"),
        pytest.param('[policy.default]\nmemry = "64M"\n', "memry", id="key"),
        pytest.param("[policy.default\n", "rcon.toml", id="syntax"),
        pytest.param('[policy.default]\ncpus = "4000"\n', "policy.default.cpus", id="not-enforceable"),
        pytest.param(PLAIN + 'plugins = ["absent"]\n', "absent", id="plugin"),
        pytest.param(None, "RCON_SETTINGS", id="no-file-named"),
    ],
)
def test_bad_settings_are_one_line_and_no_start(tmp_path: Path, settings: str | None, says: str) -> None:
    if settings is not None and "plugins" in settings:
        settings = 'plugins = ["absent"]\n' + PLAIN
    status, output, pid = start(tmp_path, settings)
    assert status == 1
    lines = [line for line in output.splitlines() if line.startswith("Error: ")]
    assert len(lines) == 1, output
    assert says in lines[0]
    assert "Traceback" not in output
    assert not instance_directories(pid)


CHECKED = [
    pytest.param('[policy.default]\nmemory = "64MB"\n', "rcon.toml: policy.default.memory", id="unit"),
    pytest.param('[policy.default]\nmemry = "64M"\n', "memry", id="key"),
    pytest.param("[policy.default\n", "rcon.toml", id="syntax"),
    pytest.param('[policy.default]\ncpus = "4000"\n', "policy.default.cpus", id="not-enforceable"),
    pytest.param('plugins = ["absent"]\n' + PLAIN, "absent", id="plugin"),
    pytest.param('executor_started = "application:absent"\n' + PLAIN, "executor_started", id="function"),
    pytest.param(None, "RCON_SETTINGS", id="no-file-named"),
]
SITE = """
from rcon_gunicorn import Hooks

workers = 2

def on_starting(server):
    raise RuntimeError("gunicorn calls no hook")

Hooks({settings}).install(globals())
"""


def site(directory: Path, settings: str | None) -> str:
    """A configuration file of a site, which names the policy file."""
    config = directory / "gunicorn.conf.py"
    config.write_text(SITE.format(settings="" if settings is None else repr(str(directory / "rcon.toml"))))
    return str(config)


@pytest.mark.parametrize("own_file", [False, True], ids=["conf", "install"])
@pytest.mark.parametrize(("settings", "says"), CHECKED)
def test_check_config_finds_a_wrong_policy_file(
    tmp_path: Path, settings: str | None, says: str, own_file: bool
) -> None:
    config = ("--config", site(tmp_path, settings)) if own_file else ()
    status, output, pid = start(tmp_path, settings, "--check-config", *config)
    assert status == 1
    (line,) = output.strip().splitlines()
    assert line.startswith("Error: ")
    assert says in line
    assert not instance_directories(pid)


@pytest.mark.parametrize("own_file", [False, True], ids=["conf", "install"])
@pytest.mark.parametrize("arguments", [("--check-config",), ("--check-conf",), ()], ids=str)
def test_check_config_passes_a_right_policy_file_and_makes_nothing(
    tmp_path: Path, arguments: tuple[str, ...], own_file: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not arguments:
        monkeypatch.setenv("GUNICORN_CMD_ARGS", "--check-config")
    config = ("--config", site(tmp_path, PLAIN)) if own_file else ()
    started = 'executor_started = "application:who"\n'
    status, output, pid = start(tmp_path, started + PLAIN, *arguments, *config)
    assert (status, output) == (0, "")
    assert instance_directories(pid) == []


@pytest.mark.parametrize(
    ("settings", "arguments", "status"),
    [
        # a quota of CPU time fits a thread under sync, and gevent has no thread for it
        ('[policy.default]\nisolation = "inline"\npids = 400\n', ("-k", "sync"), 0),
        ('[policy.default]\nisolation = "inline"\npids = 400\n', ("-k", "gevent"), 1),
        (PLAIN, ("-k", "gunicorn.workers.gasgi.ASGIWorker"), 1),
    ],
    ids=["sync", "gevent", "asgi"],
)
def test_check_config_judges_for_the_worker_class_of_the_command_line(
    tmp_path: Path, settings: str, arguments: tuple[str, ...], status: int
) -> None:
    found, output, _ = start(tmp_path, settings, "--check-config", *arguments)
    assert found == status, output
    assert len(output.strip().splitlines()) == status


def test_check_config_looks_at_a_relative_path_from_the_directory_of_the_server(tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "rcon.toml").write_text("[policy.default\n")
    config = tmp_path / "config.py"
    config.write_text('from rcon_gunicorn import Hooks\nHooks("rcon.toml").install(globals())\n')
    below = str(tmp_path / "below")
    status, output, _ = start(tmp_path, PLAIN, "--check-config", "--config", str(config), "--chdir", below)
    assert status == 1
    assert f"Error: {below}/rcon.toml: " in output


def test_asgi_is_refused_with_the_reason(tmp_path: Path) -> None:
    status, output, pid = start(tmp_path, PLAIN, "--worker-class", "asgi")
    assert status == 1
    assert "ASGIWorker cannot be confined: it serves ASGI" in output
    assert "Traceback" not in output
    assert not instance_directories(pid)


def test_a_port_that_is_taken_leaves_nothing(tmp_path: Path) -> None:
    with Gunicorn(tmp_path, '[policy.default]\nmemory = "256M"\n') as first:
        status, _, pid = start(tmp_path, PLAIN, "--bind", f"127.0.0.1:{first.port}")
        assert status == 1
        assert not instance_directories(pid)


def class_named(name: str, *bases: type) -> type:
    module, _, short = name.rpartition(".")
    return type(short, bases, {"__module__": module})


def test_worker_classes() -> None:
    sync = class_named("gunicorn.workers.sync.SyncWorker")
    assert server_traits(sync) == Server(threads=False)
    assert server_traits(class_named("mine.Worker", sync)) == Server(threads=False)
    threads = class_named("gunicorn.workers.gthread.ThreadWorker")
    assert server_traits(threads) == Server(threads=True)
    gevent = class_named("gunicorn.workers.ggevent.GeventWorker")
    assert server_traits(class_named("gunicorn.workers.ggevent.GeventPyWSGIWorker", gevent)) == Server(
        threads=False, greenlets=True
    )


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("gunicorn.workers.gtornado.TornadoWorker", "coroutines"),
        ("gunicorn.workers.gasgi.ASGIWorker", "ASGI"),
        ("uvicorn_worker.UvicornWorker", "does not know how it calls"),
    ],
)
def test_worker_classes_refused(name: str, reason: str) -> None:
    cls = class_named(name)
    assert server_traits(cls) is None
    assert name in refusal(cls)
    assert reason in refusal(cls)
    assert "gthread" in refusal(cls)


def test_chain_runs_both_even_if_the_first_raises() -> None:
    calls: list[str] = []

    def first(server: Any) -> None:
        calls.append(f"first {server}")
        raise ValueError("theirs")

    def second(server: Any) -> None:
        calls.append(f"second {server}")

    both = chain(first, second)
    with pytest.raises(ValueError, match="theirs"):
        both("x")
    assert calls == ["first x", "second x"]


def test_install_keeps_a_files_own_hooks() -> None:
    calls: list[str] = []

    def on_exit(server: Any) -> None:
        calls.append("theirs")

    config: dict[str, Any] = {"on_exit": on_exit, "workers": 3}
    hooks = Hooks("rcon.toml")
    hooks.install(config)
    assert config["workers"] == 3
    assert set(Hooks.NAMES) <= set(config)
    assert config["post_worker_init"] == hooks.post_worker_init
    config["on_exit"](object())
    assert calls == ["theirs"]


class FakeMaster:
    """Stands for gunicorn's master where a test needs no more."""

    cfg: Any = None
    log: Any = None

    def __init__(self, worker_class: type) -> None:
        self.worker_class = worker_class
        self.swept: list[int] = []
        self.rcon = self

    def sweep(self, worker: int, server: object) -> None:
        assert server is self
        self.swept.append(worker)


def test_a_worker_class_that_cannot_be_confined_ends_gunicorn_at_a_reload() -> None:
    from gunicorn.errors import HaltServer  # type: ignore[import-untyped]

    with pytest.raises(HaltServer) as raised:
        Hooks("rcon.toml").on_reload(FakeMaster(class_named("uvicorn_worker.UvicornWorker")))
    assert raised.value.exit_status == 1
    assert "uvicorn_worker.UvicornWorker cannot be confined" in raised.value.reason


def test_worker_exit_called_in_the_master_sweeps() -> None:
    """gunicorn does so for a worker that it wanted to signal and did not find."""
    server = FakeMaster(class_named("gunicorn.workers.sync.SyncWorker"))
    worker = type("Worker", (), {"pid": 1})()
    Hooks("rcon.toml").worker_exit(server, worker)
    assert server.swept == [1]


def test_a_worker_without_on_starting_does_not_serve() -> None:
    sync = class_named("gunicorn.workers.sync.SyncWorker")
    with pytest.raises(ConfinementError, match=r"assign all of them, or use Hooks\.install"):
        Hooks("rcon.toml").post_worker_init(sync())


def test_refusals_reach_the_error_log_of_a_daemon(tmp_path: Path) -> None:
    log = tmp_path / "error.log"
    status, output, _ = start(tmp_path, "[policy.default\n", "--error-logfile", str(log))
    assert status == 1
    assert "rcon.toml" in output
    assert "rcon.toml" in log.read_text()


def test_gunicorn_takes_the_hooks() -> None:
    from gunicorn.config import Config  # type: ignore[import-untyped]

    config = Config()
    mine: dict[str, Any] = {"on_exit": lambda server: None}
    Hooks("rcon.toml").install(mine)
    for name in Hooks.NAMES:
        config.set(name, mine[name])  # checks the number of parameters


CANNOT_REMOVE = """
import os
from rcon_gunicorn import Hooks

def on_exit(server):
    os.seteuid(65534)

Hooks().install(globals())
"""


def test_cgroups_that_cannot_be_removed_are_logged_and_the_next_start_removes_them(tmp_path: Path) -> None:
    config = tmp_path / "config.py"
    config.write_text(CANNOT_REMOVE)
    with Gunicorn(tmp_path, FREE, config=str(config)) as server:
        assert server.status("/free/who") == 200
    assert server.process.returncode == 0
    assert "rcon: cgroups of this server are left; the next start removes them: " in server.log()
    assert instance_directories(server.pid)
    with Gunicorn(tmp_path, FREE):
        assert not instance_directories(server.pid)


def test_a_master_without_descriptors_says_so(in_child: Any) -> None:
    """What the workers share is made before the cgroups. Its error is one that refuses the start in one line."""

    def program() -> str:
        resource.setrlimit(resource.RLIMIT_NOFILE, (0, 0))
        with pytest.raises(KernelError) as raised:
            Boots()
        return str(raised.value)

    assert in_child(program) == (
        "memfd_create(2): Too many open files (raise the limit on open files of this process: RLIMIT_NOFILE, "
        "`ulimit -n`, LimitNOFILE= of a unit)"
    )


BREAKABLE = """
import resource
from pathlib import Path
from rcon_gunicorn import Hooks

BROKEN = Path({flag!r})

def post_worker_init(worker):
    if BROKEN.exists():
        lowest = max(int(entry.name) for entry in Path("/proc/self/fd").iterdir()) + 1
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, lowest))

Hooks().install(globals())
"""


def test_a_replacement_that_cannot_start_fails_alone_and_is_made_again_later(tmp_path: Path) -> None:
    flag, config = tmp_path / "broken", tmp_path / "config.py"
    config.write_text(BREAKABLE.format(flag=str(flag)))
    with Gunicorn(tmp_path, FREE, "--workers", "2", config=str(config)) as server:
        until(lambda: len(server.workers()) == 2 and server.is_booted())
        flag.touch()
        killed, other = server.workers()
        os.kill(killed, signal.SIGKILL)
        until(lambda: "gunicorn makes another in 0.5 s" in server.log())
        until(lambda: "gunicorn makes another in 1 s" in server.log())
        until(lambda: "gunicorn makes another in 2 s" in server.log())
        assert server.process.poll() is None
        assert other in server.workers()
        assert server.status("/free/who") == 200
        flag.unlink()
        until(lambda: len(server.workers()) == 2 and server.is_booted())
        assert server.process.poll() is None
        assert "Traceback" not in server.log()  # the line has the reason


def test_a_first_worker_that_cannot_start_ends_gunicorn(tmp_path: Path) -> None:
    """One worker: the end of a second one, while gunicorn halts, would change its status."""
    flag, config = tmp_path / "broken", tmp_path / "config.py"
    config.write_text(BREAKABLE.format(flag=str(flag)))
    flag.touch()
    server = Gunicorn(tmp_path, FREE, "--workers", "1", config=str(config))
    try:
        until(lambda: server.process.poll() is not None)
        assert server.process.returncode == 3
        assert "gunicorn makes another" not in server.log()
    finally:
        server.stop()


SHORT_OF_DESCRIPTORS = """
import os
import resource
from rcon_gunicorn import Hooks

Hooks().install(globals())
start = on_starting

def on_starting(server):
    used = {{int(name) for name in os.listdir("/proc/self/fd")}}
    lowest = [number for number in range(1024) if number not in used][{free}]
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, before[1]))
    try:
        start(server)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
"""


def test_a_master_that_is_short_of_descriptors_says_which_limit_to_raise(tmp_path: Path) -> None:
    """With none free, with one, and so on until it starts. Whichever call fails first: one line, no traceback."""
    config = tmp_path / "config.py"
    for free in range(20):
        config.write_text(SHORT_OF_DESCRIPTORS.format(free=free))
        (tmp_path / "log").unlink(missing_ok=True)
        server = Gunicorn(tmp_path, FREE, "--workers", "1", config=str(config))
        try:
            until(lambda: server.process.poll() is not None or server.status("/free/who") == 200)  # noqa: B023
            if server.process.returncode is None:
                break
        finally:
            server.stop()
        assert server.process.returncode == 1
        assert "Traceback" not in server.log()
        last = server.log().strip().splitlines()[-1]
        assert last.startswith("Error: ")
        assert ("Too many open files (" in last, "`ulimit -n`" in last) == (True, True), last
    assert 0 < free < 19
