"""The example of customers under users of their own: what it tells, how it exits, and that it leaves nothing."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import rcon_plugins
from tests.children import in_child

SHOW = Path(rcon_plugins.__file__).parent.parent / "examples" / "customers" / "show.py"


@pytest.fixture
def room() -> Iterator[Path]:
    """A directory for temporary files that any user may pass; those of pytest are root's alone."""
    made = Path(tempfile.mkdtemp(prefix="room-"))
    made.chmod(0o755)
    yield made
    shutil.rmtree(made)


def start(room: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(SHOW), *arguments],
        env={**os.environ, "TMPDIR": str(room)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def module() -> ModuleType:
    spec = importlib.util.spec_from_file_location("customers_show", SHOW)
    assert spec is not None
    assert spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = found  # where dataclasses look for it
    spec.loader.exec_module(found)
    return found


def test_every_customer_is_itself_and_the_kernel_keeps_them_apart(room: Path) -> None:
    process = start(room, "--json")
    out, progress = process.communicate(timeout=100)
    assert process.returncode == 0, out + progress
    assert "1/3" in progress
    told: dict[str, Any] = json.loads(out)
    assert told["good"] is True
    rows = {(row["isolation"], row["customer"]): row for row in told["rows"]}
    customers = ("anna.example", "berta.example", "clara.example")
    assert set(rows) == {(how, who) for how in ("none", "thread", "process") for who in customers}
    assert len({row["uid"] for row in told["rows"]}) == len(customers)
    for (isolation, _), row in rows.items():
        unconfined = isolation == "none"  # root, for whom the bug of the application opens everything
        uid = 0 if unconfined else row["uid"]
        assert row["uids"] == row["gids"] == [uid]
        assert row["own"] == ["yes"]
        assert row["neighbour"] == row["shadow"] == (["yes"] if unconfined else ["EACCES"])
        assert row["owners"] == {f"{uid}:{uid} {644 if unconfined else 640}": row["wrote"]}
        assert row["wrote"] > 0
        assert row["requests"] >= 100
        assert row["wrong"] == {}
        assert row["good"] is (None if unconfined else True)
        assert unconfined or row["capabilities"] == ["none"]
    refused = {(one["isolation"], one["host"]): one["status"] for one in told["refused"]}
    hosts = ("nobody.example", "root.example", "low.example")
    assert refused == {(how, host): "403" for how in ("thread", "process") for host in hosts}
    assert list(room.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_and_nothing_is_left(room: Path, number: signal.Signals) -> None:
    process = start(room)
    assert process.stderr is not None
    for line in process.stderr:
        if "2/3" in line:
            break
    process.send_signal(number)
    process.send_signal(number)  # an impatient person
    out, rest = process.communicate(timeout=60)
    assert process.returncode == 130, rest
    assert out == ""
    assert "Traceback" not in rest
    assert list(room.iterdir()) == []


def test_without_root_the_remedy_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    def program() -> int:
        show = module()
        os.setgroups([])
        os.setgid(61001)
        os.setuid(61001)
        status: int = show.main([])
        return status

    assert in_child(program) == 2
    assert "sudo make demo-customers" in capfd.readouterr().err


def test_a_closed_directory_is_refused(room: Path) -> None:
    closed = room / "closed"
    closed.mkdir(mode=0o700)
    process = start(closed)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 2
    assert f"customers cannot enter {closed}" in told
    assert list(closed.iterdir()) == []


def test_a_wrong_observation_fails_the_row() -> None:
    show = module()
    row = show.Row("anna.example", "thread", 61001)
    row.uids, row.gids, row.capabilities = {61001}, {61001}, {"none"}
    row.own, row.neighbour, row.shadow = {"yes"}, {"EACCES"}, {"EACCES"}
    row.wrote, row.owners = 2, {"61001:61001 640": 2}
    assert row.good is True
    show.note(row, "/read?of=berta.example/secret.txt", "200", {"bytes": 5})
    assert row.good is False
    row.neighbour = {"EACCES"}
    show.note(row, "/whoami", "503", {"title": "Service Unavailable"})
    assert row.good is False
    assert row.wrong == {"/whoami: 503": 1}
