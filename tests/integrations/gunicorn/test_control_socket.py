"""gunicorn's control socket: the log names at the start the policies whose requests can reach it."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integrations.gunicorn.server import Gunicorn
from tests.processes import until

SETTINGS = """
[policy.free]
isolation = "process"
[policy.tenant]
user = 20001
group = 20001
[policy.owned]
user = 0
group = 0
allow_root = true
[[route]]
path = "/tenant"
policy = "tenant"
[[route]]
path = "/owned"
policy = "owned"
[[route]]
policy = "free"
"""
#: Connects as the user that is given, if the permissions allow it.
CONNECT = """
import os, socket, sys
os.setgroups([]); os.setgid(int(sys.argv[2])); os.setuid(int(sys.argv[2]))
socket.socket(socket.AF_UNIX).connect(sys.argv[1])
"""

pytestmark = pytest.mark.skipif(os.getuid() != 0, reason="changes users")


@pytest.fixture
def path() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as directory:
        Path(directory).chmod(0o755)
        yield Path(directory) / "control"


@pytest.mark.parametrize(
    ("arguments", "named", "users"),
    [
        ([], "policy free, policy owned", {0}),
        (["--control-socket-mode", "0o666"], "policy free, policy tenant, policy owned", {0, 20001}),
        (["--user", "20002", "--group", "20002"], "policy owned", {0}),
    ],
    ids=["root", "others", "another user"],
)
def test_who_can_reach_it_is_named(
    tmp_path: Path, path: Path, arguments: list[str], named: str, users: set[int]
) -> None:
    if "--user" in arguments:
        tmp_path.chmod(0o755)
    with Gunicorn(tmp_path, SETTINGS, *arguments, control=path) as server:
        until(path.exists)
        until(lambda: connects(path, 0))
        assert (
            f"requests of {named} can shut gunicorn down through its control socket {path}." in server.log()
        )
        assert {user for user in (0, 20001, 20002) if connects(path, user)} == users | (
            {20002} if 20001 in users else set()
        )


def test_without_one_nothing_is_said(tmp_path: Path) -> None:
    with Gunicorn(tmp_path, SETTINGS) as server:
        assert "control socket" not in server.log()


def connects(path: Path, user: int) -> bool:
    command = [sys.executable, "-c", CONNECT, str(path), str(user)]
    return subprocess.run(command, stderr=subprocess.DEVNULL, check=False).returncode == 0
