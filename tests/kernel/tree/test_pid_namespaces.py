"""Servers in PID namespaces of their own, as in containers, that share a base: none judges an owner it cannot see."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from rcon_plugins.cli.rcon import run_main
from rcon_plugins.groups.find import find_groups
from rcon_plugins.kernel import proc
from rcon_plugins.kernel.cgroup import Cgroup, Hierarchy
from rcon_plugins.kernel.syscalls import mount, unshare
from rcon_plugins.tree.instance import Instance
from rcon_plugins.tree.owner import Owner
from tests import children
from tests.kernel.cgroup.helpers import eventually
from tests.kernel.command.harness import rcon

pytestmark = pytest.mark.each_layout

#: A server that has an empty cgroup of a policy and no process in its tree. It serves one line of standard input.
SERVER = """
import sys
from rcon_plugins.kernel.cgroup import Hierarchy
from rcon_plugins.tree.instance import Instance
instance = Instance.create(Hierarchy.discover(), sys.argv[1])
instance.executor_cgroup("tenant", "1").create()
print(instance.path, flush=True)
if sys.stdin.readline():
    instance.close()
"""
NEWNS, NEWPID = 0x00020000, 0x20000000
REC, PRIVATE = 16384, 1 << 18


def isolated(code: str, *arguments: str) -> list[str]:
    """Return the command that runs code as process 1 of a PID namespace with a /proc of its own."""
    return [
        "unshare",
        "--pid",
        "--fork",
        "--kill-child",
        "--mount-proc",
        sys.executable,
        "-c",
        code,
        *arguments,
    ]


@contextlib.contextmanager
def server(base: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """Run a server in a PID namespace of its own. Yield the path of its instance."""
    process = subprocess.Popen(
        isolated(SERVER, base), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdin is not None and process.stdout is not None  # noqa: PT018
    try:
        yield process.stdout.readline().strip(), process
    finally:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


def rcon_elsewhere(*arguments: str) -> tuple[int, str]:
    """Run rcon as process 1 of a PID namespace. Return its exit status and its output."""
    done = rcon(*arguments, before=isolate)
    assert done.err == ""
    return done.status, done.out


def isolate() -> None:
    """Go on as process 1 of a PID namespace with a /proc of its own. The calling process ends as that one does."""
    unshare(NEWNS | NEWPID)
    if first := os.fork():
        os._exit(os.waitstatus_to_exitcode(os.waitpid(first, 0)[1]))
    mount(None, "/", None, REC | PRIVATE)
    mount("proc", "/proc", "proc", 0)


def there(path: str) -> bool:
    return any(Path(directory).exists() for directory in Hierarchy.discover().cgroup(path).directories)


@pytest.mark.smoke
def test_a_server_leaves_the_tree_of_a_server_in_another_namespace(group: Cgroup) -> None:
    """Before, the second one took the first for dead: its pid and start time exist in no /proc that it sees."""
    with server(group.path) as (first, _):
        name = first.rpartition("/")[2]
        assert name.startswith("rcon-1-")
        assert "." in name
        with server(group.path) as (second, _):
            assert second != first
            assert there(f"{first}/work/tenant")
        outside = Instance.create(Hierarchy.discover(), group.path)
        try:
            assert outside.path.rpartition("/")[2] == f"rcon-{os.getpid()}-{proc.start_time(os.getpid())}"
            assert there(f"{first}/work/tenant")
            with server(group.path):
                assert there(outside.path)
        finally:
            outside.close()


def test_the_initial_namespace_judges_all_owners(group: Cgroup, capsys: pytest.CaptureFixture[str]) -> None:
    with server(group.path) as (path, process):
        owner = Owner.of(path.rpartition("/")[2])
        assert owner is not None
        assert owner.is_alive() is True
        assert owner.visible_pid() not in (None, 1)
        seen = {found.cgroup.path: found.owner for found in find_groups().groups}[f"{path}/work/tenant"]
        assert (seen.pid, seen.alive, seen.uid) == (owner.visible_pid(), True, 0)
        assert run_main(["gc", "--below", group.path]) == 0
        assert capsys.readouterr().out == ""
        process.kill()
        process.wait()
        eventually(lambda: owner.is_alive() is False)
    assert run_main(["gc", "--below", group.path]) == 0
    assert capsys.readouterr().out == f"{path}: removed\n"
    assert not there(path)


@pytest.mark.once
def test_from_another_namespace_an_owner_is_unknown(group: Cgroup) -> None:
    instance = Instance.create(Hierarchy.discover(), group.path)
    try:
        instance.executor_cgroup("tenant", "1").create()
        status, out = rcon_elsewhere("ls", "--json")
        rows = {row["cgroup"]: row for row in json.loads(out)}
        assert status == 0
        assert rows[f"{instance.path}/work/tenant"]["owner"] == {
            "pid": os.getpid(), "alive": None, "uid": None, "command": None,
        }  # fmt: skip
        assert "(unknown)" in rcon_elsewhere("ls")[1]
        status, out = rcon_elsewhere("stat", f"{instance.path}/work/tenant")
        assert f"{os.getpid()} (unknown: it is in a PID namespace that cannot be seen from here)" in out
    finally:
        instance.close()


def left_behind(base: str) -> str:
    """Make a tree without processes and die. Call it in a child."""
    instance = Instance.create(Hierarchy.discover(), base)
    instance.executor_cgroup("tenant", "1").create()
    return instance.path


@pytest.mark.once
def test_only_the_option_removes_the_tree_of_an_unknown_owner(group: Cgroup) -> None:
    path = children.in_child(left_behind, group.path)
    kept = f"{path}: kept: its owner is in a PID namespace that cannot be seen from here: "
    status, out = rcon_elsewhere("gc", "--below", group.path)
    assert (status, out.startswith(kept)) == (0, True)
    assert there(path)
    status, out = rcon_elsewhere("gc", "--below", group.path, "--unknown", "--dry-run")
    assert out == f"{path}: it is unknown whether its owner lives, and it has no process: would remove it\n"
    assert there(path)
    assert rcon_elsewhere("gc", "--below", group.path, "--unknown") == (0, f"{path}: removed\n")
    assert not there(path)


@pytest.mark.once
def test_the_option_leaves_trees_with_processes(group: Cgroup) -> None:
    instance = Instance.create(Hierarchy.discover(), group.path)
    sleeper = subprocess.Popen(["sleep", "60"])
    try:
        leaf = instance.executor_cgroup("tenant", "1").create()
        leaf.attach(sleeper.pid)
        status, out = rcon_elsewhere("gc", "--below", group.path, "--unknown", "--json")
        assert (status, [tree["state"] for tree in json.loads(out)["trees"]]) == (1, ["unseen"])
        assert sleeper.poll() is None
        assert there(leaf.path)
    finally:
        sleeper.kill()
        sleeper.wait()
        instance.close()


#: A process that another `rcon attach` limits in the same namespace, and its pid there. Ends with its standard input.
ATTACHED = """
import subprocess, sys
from rcon_plugins.cli.rcon import run_main
sleeper = subprocess.Popen(["sleep", "60"])
options = ["--pids", "9", "--cgroup", sys.argv[1]]
print(run_main(["attach", "--group", sys.argv[2], *options, str(sleeper.pid)]), flush=True)
for line in sys.stdin:
    print(run_main(line.replace("PID", str(sleeper.pid)).split()), flush=True)
"""


@pytest.mark.parametrize("words", ["attach --release", "attach --release {}"])
@pytest.mark.parametrize("here", [False, pytest.param(True, marks=pytest.mark.once)])
def test_a_watcher_in_another_namespace_releases(group: Cgroup, words: str, here: bool) -> None:
    """Its instance is named after that namespace, and its pid is another one outside."""
    name = f"released-{os.getpid()}"
    process = subprocess.Popen(
        isolated(ATTACHED, group.path, name), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdin is not None and process.stdout is not None  # noqa: PT018
    try:
        assert process.stdout.readline() == f"{name}: 1 process\n"
        assert process.stdout.readline() == "0\n"
        (found,) = [one for one in find_groups().groups if one.name == name]
        (pid,) = found.pids()
        if here:
            assert run_main([*words.format(name).split(), *([] if "{}" in words else [str(pid)])]) == 0
        else:
            process.stdin.write(words.format(name) + ("\n" if "{}" in words else " PID\n"))
            process.stdin.flush()
            assert process.stdout.readline() == "0\n"
        eventually(lambda: not there(found.cgroup.path))
        assert f"/{name}" not in Path(f"/proc/{pid}/cgroup").read_text()
    finally:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()
