"""rcon doctor: it tries each feature on this machine, and prints the remedy for each that does not work."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
from typing import Any

import pytest

from rcon_plugins.cli.rcon import run_main
from rcon_plugins.kernel.cgroup import Cgroup, Hierarchy
from tests import children
from tests.kernel.cgroup.helpers import DISK, layout
from tests.kernel.command.harness import left_by

pytestmark = pytest.mark.each_layout

CLONE_NEWNS = 0x00020000
CLONE_NEWCGROUP = 0x02000000


@pytest.fixture(autouse=True)
def on_a_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Change to a directory on a disk: IO limits are tried on the device of the working directory."""
    monkeypatch.chdir(DISK)


def doctor(capsys: pytest.CaptureFixture[str], *options: str) -> tuple[int, str]:
    status = run_main(["doctor", *options])
    out, err = capsys.readouterr()
    assert err == ""
    return status, out


def by_name(found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {finding["name"]: finding for finding in found["findings"]}


@pytest.mark.smoke
def test_everything_works_for_root(capsys: pytest.CaptureFixture[str]) -> None:
    status, out = doctor(capsys, "--json")
    found = json.loads(out)
    assert found["missing"] == []
    assert (status, found["good"], found["layout"], found["user"]) == (0, True, layout(), 0)
    assert found["controllers"] == ["cpu", "cpuset", "io", "memory", "pids"]
    assert found["kernel"] == os.uname().release
    names = by_name(found)
    for limit in ("cgroup", "cpu, cpu_weight", "cpus", "memory", "io", "pids", "process", "inline", "attach"):
        assert names[limit]["state"] == "there", names[limit]
    assert names["memory_high"]["state"] == ("there" if layout() == "v2" else "absent")
    assert names["cgroup.kill"]["state"] == "there"
    assert all(finding["remedy"] for finding in found["findings"] if finding["state"] == "absent")
    assert left_by(os.getpid()) == []


def test_in_words(capsys: pytest.CaptureFixture[str]) -> None:
    status, out = doctor(capsys)
    assert status == 0
    first, *_, last = out.splitlines()
    assert first == f"Linux {os.uname().release}, cgroup {layout()}, as root (uid 0)"
    assert last == "every limit can be set here, below the cgroup /rcon"
    assert "  ok  memory: can be set" in out
    assert "  NO  " not in out


def test_another_user_and_what_root_has_to_do_for_it(capsys: pytest.CaptureFixture[str]) -> None:
    status, out = doctor(capsys, "--user", "nobody")
    assert status == 1
    assert ", as nobody (uid 65534)" in out
    assert "  NO  cgroup: no cgroup is delegated to this process" in out
    assert "chown nobody /sys/fs/cgroup" in out
    assert out.endswith("missing for limits: cgroup\n")
    found = json.loads(doctor(capsys, "--user", "nobody", "--json")[1])
    assert found["base"] is None
    assert found["capabilities"] == []


def read_only(capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.unshare(CLONE_NEWNS) == 0
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    for mount in Hierarchy.discover().mounts:
        subprocess.run(["mount", "-o", "remount,bind,ro", mount.path], check=True)
    return doctor(capsys)


def test_a_read_only_tree(capsys: pytest.CaptureFixture[str]) -> None:
    status, out = children.in_child(read_only, capsys)
    assert status == 1
    assert "  NO  cgroup: " in out
    assert "docker run --cgroupns=private --security-opt writable-cgroups=true" in out
    assert "mounted read-only" in out


def in_a_container(group: Cgroup, capsys: pytest.CaptureFixture[str], beside: bool) -> tuple[int, str]:
    group.enter_process()
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.unshare(CLONE_NEWNS | CLONE_NEWCGROUP) == 0
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    subprocess.run(["umount", "--lazy", "/sys/fs/cgroup"], check=True)
    subprocess.run(["mount", "-t", "cgroup2", "none", "/sys/fs/cgroup"], check=True)
    if beside:
        with subprocess.Popen(["sleep", "60"]) as shell:
            try:
                return doctor(capsys)
            finally:
                shell.kill()
    return doctor(capsys)


@pytest.mark.layout("v2")
def test_in_a_container_as_its_only_process(group: Cgroup, capsys: pytest.CaptureFixture[str]) -> None:
    status, out = children.in_child(in_a_container, group.child("c").create(), capsys, False)
    assert status == 0, out
    assert out.endswith("every limit can be set here, below the cgroup /\n")


@pytest.mark.layout("v2")
def test_in_a_container_with_a_shell(group: Cgroup, capsys: pytest.CaptureFixture[str]) -> None:
    """It is moved into a cgroup of its own: tests/kernel/tree/test_container_root.py."""
    status, out = children.in_child(in_a_container, group.child("c").create(), capsys, True)
    assert status == 0, out
    assert "every limit can be set here, below the cgroup /" in out


@pytest.mark.once
def test_an_unknown_user_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_main(["doctor", "--user", "no-such-user"]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert "no-such-user" in err


@pytest.mark.parametrize("by", ["option", "environment"])
def test_doctor_uses_the_named_cgroup(
    group: Cgroup, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, by: str
) -> None:
    options = ["--cgroup", group.path]
    if by == "environment":
        monkeypatch.setenv("RCON_CGROUP", group.path)
        options = []
    status, out = doctor(capsys, *options)
    assert status == 0
    assert out.endswith(f"every limit can be set here, below the cgroup {group.path}\n")
    status, out = doctor(capsys, *options, "--user", "nobody")
    assert status == 1
    assert "this process may not write /" in out


@pytest.mark.each_layout
def test_doctor_leaves_no_cgroup(capsys: pytest.CaptureFixture[str]) -> None:
    """Neither the one that is named nor one above it."""
    above = Hierarchy.discover().cgroup(f"/rcon-doctor-{os.getpid()}")
    status, out = doctor(capsys, "--cgroup", f"{above.path}/below")
    assert status == 0
    assert out.endswith(f"every limit can be set here, below the cgroup {above.path}/below\n")
    assert not any(map(os.path.exists, above.directories))
