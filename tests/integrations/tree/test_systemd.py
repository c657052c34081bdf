"""Asking for a scope on a real bus where nobody gives one; the units of the examples.

That one is given, by a real systemd, is tested on pure cgroup v2: tests/kernel/systemd.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jeepney.io.blocking
import pytest

from rcon_plugins.errors import DelegationError
from rcon_plugins.kernel.cgroup import mounts
from rcon_plugins.kernel.cgroup.resources import CONTROLLERS
from rcon_plugins.tree import systemd
from tests import children

ROOT = Path(__file__).resolve().parents[3]
UNITS = ROOT / "examples" / "systemd"
NOBODY = 65534


@pytest.fixture
def runtime(tmp_path: Path) -> Iterator[Path]:
    """What XDG_RUNTIME_DIR names: short, since the path of a socket is, and nobody's."""
    directory = Path("/tmp", f"rcon-{os.getpid()}-{tmp_path.name[-8:]}")
    directory.mkdir(mode=0o700)
    os.chown(directory, NOBODY, NOBODY)
    try:
        yield directory
    finally:
        shutil.rmtree(directory)


def as_nobody(runtime: Path | None, act: Callable[[], Any]) -> Any:
    assert jeepney.io.blocking  # imported by who can

    def child() -> Any:
        os.environ.pop("XDG_RUNTIME_DIR", None)
        if runtime is not None:
            os.environ["XDG_RUNTIME_DIR"] = str(runtime)
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
        return act()

    return children.in_child(child)


def refusal() -> tuple[str, str | None]:
    with pytest.raises(DelegationError) as caught:
        systemd.enter_scope()
    return caught.value.problem, caught.value.hint


def test_no_bus() -> None:
    problem, hint = as_nobody(None, refusal)
    assert problem == f"systemd --user does not run for uid {NOBODY}: there is no /run/user/{NOBODY}/bus"
    assert hint is not None
    assert f"loginctl enable-linger {NOBODY}" in hint


def test_a_bus_of_another_user_is_not_used(runtime: Path) -> None:
    runtime.joinpath("bus").touch()
    os.chown(runtime, 0, 0)
    runtime.chmod(0o755)
    assert as_nobody(runtime, refusal)[0].startswith("systemd --user does not run")


def test_a_bus_without_systemd(runtime: Path) -> None:
    """As in a session that dbus-launch began."""
    daemon = subprocess.Popen(
        ["dbus-daemon", "--session", "--nofork", "--nopidfile", f"--address=unix:path={runtime}/bus"],
        user=NOBODY,
        group=NOBODY,
        extra_groups=[],
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 30
        while not runtime.joinpath("bus").exists():
            assert time.monotonic() < deadline
            assert daemon.poll() is None
            time.sleep(0.01)
        problem, hint = as_nobody(runtime, refusal)
    finally:
        daemon.terminate()
        daemon.wait()
    assert problem.startswith("systemd --user refused: ")
    assert "org.freedesktop.systemd1" in problem
    assert hint is not None
    assert "journalctl --user" in hint


def test_a_bus_that_does_not_answer(runtime: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(systemd, "TIMEOUT_SECONDS", 0.2)
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(str(runtime / "bus"))
        silent.listen()
        os.chown(runtime / "bus", NOBODY, NOBODY)
        problem, _ = as_nobody(runtime, refusal)
    assert problem == "systemd did not answer within 0.2 s"


def test_a_bus_without_a_listener(runtime: Path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(runtime / "bus"))
    os.chown(runtime / "bus", NOBODY, NOBODY)
    problem, _ = as_nobody(runtime, refusal)
    assert problem.endswith("Connection refused")


def test_without_jeepney_the_extra_is_named(runtime: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime.joinpath("bus").touch()
    monkeypatch.setitem(sys.modules, "jeepney", None)
    problem, hint = as_nobody(runtime, refusal)
    assert "jeepney is not installed" in problem
    assert hint == "pip install 'rcon-plugins[systemd]'"


def test_the_error_tells_root_that_systemd_is_not_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mounts, "_BOOTED", str(tmp_path / "nothing"))
    assert not mounts.is_systemds()
    problem, _ = refusal()
    assert problem == "systemd is not the init of this machine"


@pytest.mark.parametrize(
    ("membership", "found"),
    [
        ("0::/system.slice/site.service\n", "system.slice"),
        (
            "1:name=systemd:/\n0::/machines.slice/machines-held.slice/site.service/inner\n",
            "machines-held.slice",
        ),
        ("0::/user.slice/user-0.slice/session-3.scope\n", None),
        ("0::/init.scope\n", None),
        ("0::/\n", None),
        ("4:memory:/system.slice/site.service\n", None),
    ],
)
def test_the_slice_of_roots_scope(membership: str, found: str | None) -> None:
    assert systemd.own_slice(membership) == found


@pytest.mark.parametrize(
    ("path", "found"),
    [
        ("user@65534.service/app.slice/app-held.slice/a.scope", "app-held.slice"),
        ("user@65534.service/init.scope", None),
        ("session-3.scope", None),
    ],
)
def test_the_slice_of_a_users_scope(path: str, found: str | None) -> None:
    membership = f"0::/user.slice/user-{NOBODY}.slice/{path}\n"
    assert as_nobody(None, lambda: systemd.own_slice(membership)) == found


@pytest.mark.parametrize("name", ["gunicorn", "celery"])
def test_units_are_as_systemd_reads_them(name: str, tmp_path: Path) -> None:
    text = UNITS.joinpath(f"{name}.service").read_text()
    unit = tmp_path / f"{name}.service"
    unit.write_text(text.replace("/srv/site/.venv/bin", str(Path(sys.executable).parent)))
    done = subprocess.run(
        ["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, check=False, timeout=60
    )
    # Of a directive that it does not know it only warns.
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    (delegated,) = [line.partition("=")[2] for line in text.splitlines() if line.startswith("Delegate=")]
    assert set(delegated.split()) == CONTROLLERS
    assert f"{name} " in text.partition("ExecStart=/srv/site/.venv/bin/")[2]
