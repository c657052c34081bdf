"""docs/explanation/sizing.md: its commands run, and its figures are those of a server."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from tests.integrations.gunicorn.server import Gunicorn
from tests.processes import children, until

PAGE = (Path(__file__).resolve().parents[3] / "docs" / "explanation" / "sizing.md").read_text()
SETTINGS = """
[policy.free]
per = "host"
memory = "256M"
isolation = "process"

[[route]]
policy = "free"
"""
#: Executor processes of the second measurement.
MANY = 17


def commands(word: str) -> list[str]:
    """The lines of the page's shell blocks that contain a word."""
    blocks = re.findall(r"^```sh\n(.*?)^```$", PAGE, re.M | re.S)
    return [line for block in blocks for line in block.splitlines() if word in line]


def run(command: str, pid: int) -> str:
    return subprocess.run(
        command.replace("PID", str(pid)), shell=True, check=True, stdout=subprocess.PIPE, text=True
    ).stdout


def figures(row: str) -> tuple[int, int]:
    """The figures of a process: open files, and those for each executor process."""
    found = re.search(rf"^\| {row} \| (\d+), and (\d+) for each", PAGE, re.M)
    assert found is not None
    return int(found[1]), int(found[2])


def test_open_files(tmp_path: Path) -> None:
    (count,) = commands("wc -l")
    with Gunicorn(tmp_path, SETTINGS, "--workers", "1") as server:
        (worker,) = server.workers()
        (fork_server,) = children(worker)

        def measure(executors: int) -> tuple[int, int]:
            for number in range(executors):
                assert server.get("/free/who", Host=f"h{number}.example").status == 200
            until(lambda: len(server.executors()) >= executors)
            return int(run(count, worker)), int(run(count, fork_server))

        few = measure(1)
        here = len(server.executors())
        many = measure(MANY)
        more = len(server.executors()) - here
        of_worker, of_fork_server = (b - a for a, b in zip(few, many, strict=True))
        assert of_worker / more <= figures("a worker of gunicorn")[1]
        assert of_fork_server / more <= figures("its fork server")[1]
        assert int(run(count, server.executors()[0])) <= 16
        (limits,) = commands("limits")
        assert "Max open files" in run(limits, worker)


def test_memory(tmp_path: Path) -> None:
    (command,) = commands("smaps_rollup")
    with Gunicorn(tmp_path, SETTINGS, "--workers", "1") as server:
        assert server.get("/free/who").status == 200
        found = run(command, server.executors()[0])
        sizes = {name: int(size) for name, size in re.findall(r"^(\w+): +(\d+) kB$", found, re.M)}
        assert {"Rss", "Pss", "Private_Clean", "Private_Dirty"} <= set(sizes)
        private = (sizes["Private_Clean"] + sizes["Private_Dirty"]) / 1024
        assert 1 < private < sizes["Rss"] / 1024
