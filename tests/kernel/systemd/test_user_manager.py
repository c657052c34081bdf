"""An ordinary user gets a cgroup from its own systemd: a real `systemd --user`, on a real bus."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jeepney.io.blocking
import pytest

from rcon_plugins import Manager, Work, confine
from rcon_plugins.cli.rcon import run_main
from rcon_plugins.confinement.admission import ProcessAdmission
from rcon_plugins.errors import DelegationError
from rcon_plugins.executors.channel import FIRST_SERVICE_KIND, Channel, ChannelClosed, Frame
from rcon_plugins.kernel.cgroup import Hierarchy, Resources
from rcon_plugins.settings.file import from_mapping
from rcon_plugins.tree import systemd
from rcon_plugins.tree.base import find_base
from rcon_plugins.tree.instance import Instance
from tests import children
from tests.commands import become_rcon
from tests.kernel.cgroup.helpers import DISK, eventually, running, settings_of, sleep_forever

pytestmark = [pytest.mark.kernel, pytest.mark.layout("v2")]

NOBODY = 65534
CGROUPS = Path("/sys/fs/cgroup")
SLICE = CGROUPS / "user.slice" / f"user-{NOBODY}.slice"
MANAGER = SLICE / f"user@{NOBODY}.service"
RUNTIME = Path(f"/run/user/{NOBODY}")
BOOTED = Path("/run/systemd/system")
#: How long the manager may take to start, before the first test. It is slow in an emulated machine.
START_SECONDS = 120


def give(directory: Path) -> None:
    """Delegate a cgroup to nobody, as systemd does for a user's manager."""
    for name in ("", "cgroup.procs", "cgroup.threads", "cgroup.subtree_control"):
        os.chown(directory / name, NOBODY, NOBODY)


def enter_and_become_nobody(directory: Path) -> None:
    directory.joinpath("cgroup.procs").write_text("0")
    os.environ.update(XDG_RUNTIME_DIR=str(RUNTIME), HOME=str(RUNTIME))
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)


@pytest.fixture(scope="module")
def manager() -> Iterator[Path]:
    """Run a `systemd --user` as nobody, with a bus, in a cgroup like the one that pid 1 would make for it.

    Yield the cgroup of a terminal in it.
    """
    assert jeepney.io.blocking  # imported here, as a user who can read it
    with contextlib.ExitStack() as stack:
        for directory in (BOOTED, RUNTIME):
            if not directory.exists():
                directory.mkdir(parents=True)
                stack.callback(shutil.rmtree, directory)
        RUNTIME.chmod(0o700)
        os.chown(RUNTIME, NOBODY, NOBODY)
        MANAGER.mkdir(parents=True)
        stack.callback(remove_slice)
        for above in (CGROUPS, CGROUPS / "user.slice", SLICE):
            above.joinpath("cgroup.subtree_control").write_text("+cpu +cpuset +io +memory +pids")
        give(MANAGER)
        stack.enter_context(
            started(
                "dbus-daemon", "--session", "--nofork", "--nopidfile", f"--address=unix:path={RUNTIME}/bus"
            )
        )
        eventually(lambda: RUNTIME.joinpath("bus").exists(), START_SECONDS)
        stack.enter_context(
            started("/lib/systemd/systemd", "--user", "--unit=basic.target", "--log-target=null")
        )
        eventually(lambda: RUNTIME.joinpath("systemd/private").exists(), START_SECONDS)
        eventually(lambda: MANAGER.joinpath("app.slice").exists(), START_SECONDS)
        terminal = MANAGER / "app.slice" / "terminal.scope"
        terminal.mkdir()
        give(terminal)
        yield terminal


@contextlib.contextmanager
def started(*command: str) -> Iterator[None]:
    process = subprocess.Popen(
        command,
        preexec_fn=lambda: enter_and_become_nobody(MANAGER),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def remove_slice() -> None:
    """Kill processes that the manager has left, for example a bus that it activated, and remove the cgroups."""
    SLICE.joinpath("cgroup.kill").write_text("1")
    eventually(lambda: "populated 0" in SLICE.joinpath("cgroup.events").read_text())
    for directory, _, _ in os.walk(SLICE.parent, topdown=False):
        Path(directory).rmdir()


@pytest.fixture(autouse=True)
def on_a_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(DISK)


def in_a_terminal(terminal: Path, act: Callable[[], Any]) -> Any:
    """Return the result of ``act`` in a child that runs as nobody beside a shell."""

    def child() -> Any:
        enter_and_become_nobody(terminal)
        with running(None, sleep_forever):
            return act()

    return children.in_child(child, timeout=60)


def own() -> str:
    return Path("/proc/self/cgroup").read_text().strip().removeprefix("0::")


def a_tree() -> dict[str, Any]:
    begin = time.monotonic()
    base = find_base(Hierarchy.discover(), None, systemd.enter_scope)
    seconds = time.monotonic() - begin
    instance = Instance.create(Hierarchy.discover())
    instance.adopt()
    leaf = instance.executor_cgroup("g", "main").create()
    instance.policy_cgroup("g").configure(Resources(cpu_quota=0.5, cpus="0", memory_max=1 << 26, pids_max=9))
    with running(leaf, own) as child:
        inside = child.result()
    found = settings_of(instance.policy_cgroup("g"), "memory.max")
    assert instance.close()
    return {
        "pid": os.getpid(), "base": base, "again": instance.base, "inside": inside, "own": own(), "max": found,
        "seconds": seconds,
    }  # fmt: skip


def test_a_scope_of_our_own(manager: Path) -> None:
    found = in_a_terminal(manager, a_tree)
    print(f"asked and moved in {found['seconds'] * 1000:.0f} ms")
    prefix = str(MANAGER / "app.slice").removeprefix(str(CGROUPS))
    assert found["base"].startswith(f"{prefix}/rcon-{found['pid']}-")
    assert found["base"].endswith(".scope")
    assert found["again"] == found["base"] == found["own"]
    assert found["inside"].startswith(f"{found['base']}/rcon-{found['pid']}-")
    assert found["max"] == str(1 << 26)
    # The scope disappears with its last process.
    eventually(lambda: not CGROUPS.joinpath(found["base"][1:]).exists(), 30)


def test_every_limit_can_be_set(manager: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def act() -> tuple[int, str]:
        return run_main(["doctor", "--json"]), capsys.readouterr().out

    status, out = in_a_terminal(manager, act)
    found = json.loads(out)
    assert found["missing"] == []
    assert status == 0
    assert ".scope" in found["base"]
    (asked,) = [finding for finding in found["findings"] if finding["name"] == "systemd"]
    assert asked["state"] == "there"


def test_a_block_of_any_program(manager: Path) -> None:
    def act() -> tuple[str, str]:
        with confine(cpu="30%", pids=20):
            inside = Path("/proc/thread-self/cgroup").read_text()
        return inside, own()

    inside, after = in_a_terminal(manager, act)
    assert "/host/confine~1" in inside
    assert after.endswith(".scope")


def hold(channel: Channel, frame: Frame) -> None:
    held = bytearray(int(frame.payload) << 20)
    channel.send((FIRST_SERVICE_KIND + 1, str(len(held)).encode()))


def a_server() -> tuple[list[str], str]:
    server = Manager(
        from_mapping(
            {
                "policy": {"default": {"memory": "256M", "each": {"memory": "64M", "timeout": "60s"}}},
            }
        )
    ).start(hold)
    endings = []
    try:
        for mebibytes in (10, 200):
            admission = server.admit(Work("call", "hold", {}))
            assert isinstance(admission, ProcessAdmission)
            admission.channel.send((FIRST_SERVICE_KIND, str(mebibytes).encode()))
            try:
                admission.channel.receive()
            except ChannelClosed:
                endings.append(admission.died().ending)
            else:
                endings.append(admission.finish().ending)
    finally:
        server.close()
    return [str(ending) for ending in endings], own()


def test_a_server_with_executors(manager: Path) -> None:
    endings, after = in_a_terminal(manager, a_server)
    assert endings == ["ok", "memory"]
    assert after.endswith(".scope")


def test_a_command(manager: Path) -> None:
    streams = [RUNTIME / "out", RUNTIME / "err"]

    def act() -> int:
        child = os.fork()
        if child == 0:
            become_rcon(["run", "--memory", "64M", "--cpu", "50%", "--", "cat", "/proc/self/cgroup"], streams)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    assert in_a_terminal(manager, act) == 0
    assert streams[1].read_text() == ""
    assert re.fullmatch(
        r"0::\S+/app.slice/rcon-\S+\.scope/rcon-\S+/work/cat-\d+/main\n", streams[0].read_text()
    )


def test_commands_in_scopes_of_their_own_share_a_group(manager: Path) -> None:
    """The group is in the scope of the first command. It goes with the last one, and the scopes do."""
    streams = [[RUNTIME / f"out-{number}", RUNTIME / f"err-{number}"] for number in range(2)]
    ready, go = RUNTIME / "ready", RUNTIME / "go"
    limits = ["run", "--in", "build", "--pids", "40", "--"]

    def begin(command: list[str], number: int) -> int:
        child = os.fork()
        if child == 0:
            become_rcon([*limits, *command], streams[number])
        return child

    def act() -> list[int]:
        waits = f"touch {ready}; until [ -e {go} ]; do sleep 0.1; done"
        first = begin(["sh", "-c", waits], 0)
        eventually(ready.exists)
        second = begin(["cat", "/proc/self/cgroup"], 1)
        statuses = [os.waitstatus_to_exitcode(os.waitpid(second, 0)[1])]
        go.touch()
        return [*statuses, os.waitstatus_to_exitcode(os.waitpid(first, 0)[1])]

    statuses = in_a_terminal(manager, act)
    assert [err.read_text() for _, err in streams] == ["", ""]
    assert statuses == [0, 0]
    assert re.fullmatch(
        r"0::\S+/app.slice/rcon-\S+\.scope/rcon-in-build/rcon-\S+/work/cat-\d+/main\n",
        streams[1][0].read_text(),
    )
    eventually(lambda: not list(SLICE.rglob("rcon-*")))


def test_a_scope_that_the_manager_may_not_fill_is_refused(manager: Path) -> None:
    """Only pid 1 could move a process from outside into the manager's tree, and pid 1 is not systemd here."""
    session = SLICE / "session-1.scope"
    session.mkdir()

    def act() -> str:
        with pytest.raises(DelegationError) as caught:
            Instance.create(Hierarchy.discover())
        assert own() == str(session).removeprefix(str(CGROUPS))
        return str(caught.value)

    try:
        message = in_a_terminal(session, act)
    finally:
        eventually(lambda: not session.joinpath("cgroup.procs").read_text())
        session.rmdir()
    assert message.startswith("no cgroup is delegated to this process; the scope rcon-")
    assert "systemd-run --user --scope -p Delegate=yes COMMAND" in message
