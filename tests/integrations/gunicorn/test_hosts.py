"""Many distinct hosts through one server with default settings: what each leaves is bounded."""

from __future__ import annotations

import http.client
import os
import statistics
import time
from pathlib import Path

import pytest

from rcon_plugins.executors.pool import most_ending
from rcon_plugins.settings.file import Settings
from tests.integrations.gunicorn.server import Gunicorn
from tests.processes import children

pytestmark = pytest.mark.each_layout

LONG = "RCON_TEST_LONG" in os.environ
#: `make test-long` asks as more hosts, with the default settings; otherwise both are smaller.
HOSTS = 20_000 if LONG else 240
PART = HOSTS // 20
SETTINGS = Settings() if LONG else Settings(confinements=16, processes=8)
POLICY = f"""
confinements = {SETTINGS.confinements}
processes = {SETTINGS.processes}
[policy.default]
per = "host"
pids = 50
each = {{ timeout = "60s", memory = "100M" }}
"""
SHUTDOWN_SECONDS = 5.0


def cgroups(server: Gunicorn) -> tuple[int, int]:
    """The most confinements and executors that one hierarchy has directories of."""
    confinements = executors = 0
    for instance in server.cgroups():
        names = directories(instance / "work")
        confinements = max(confinements, len(names))
        executors = max(executors, sum(len(directories(name)) for name in names))
    return confinements, executors


def directories(path: Path) -> list[Path]:
    """The directories in one that may be removed meanwhile."""
    try:
        return [Path(entry) for entry in os.scandir(path) if entry.is_dir()]
    except FileNotFoundError:
        return []


def memory_cgroups() -> int | None:
    """How many memory cgroups the kernel has; None where it does not tell."""
    for line in Path("/proc/cgroups").read_text().splitlines():
        name, _, number, *_ = line.split()
        if name == "memory":
            return int(number)
    return None


def slab() -> int:
    """Kernel memory that cannot be reclaimed, in KiB, of the whole machine."""
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return int(fields["SUnreclaim"].split()[0]) + int(fields.get("Percpu", "0 kB").split()[0])


def resident(pid: int) -> int:
    """The resident memory of a process, in KiB."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS"))


def descriptors(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


def ask_as(server: Gunicorn, numbers: range) -> list[float]:
    """One request for each host; how long each took."""
    seconds = []
    for number in numbers:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
        began = time.monotonic()
        connection.request("GET", "/who", headers={"Host": f"h{number}.example", "Connection": "close"})
        response = connection.getresponse()
        response.read()
        seconds.append(time.monotonic() - began)
        connection.close()
        assert response.status == 200
    return seconds


@pytest.mark.timeout(3 * 3600 if LONG else 300)
def test_what_many_hosts_leave_is_bounded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = memory_cgroups(), slab()
    with Gunicorn(tmp_path, POLICY, "--workers", "1") as server:
        (worker,) = server.workers()
        first = ask_as(server, range(PART))
        early = resident(worker), descriptors(worker)
        most = 0, 0
        for begin in range(PART, HOSTS - PART, PART):
            ask_as(server, range(begin, begin + PART))
            now = cgroups(server)
            most = max(most[0], now[0]), max(most[1], now[1])
        last = ask_as(server, range(HOSTS - PART, HOSTS))
        late = resident(worker), descriptors(worker)
        during = memory_cgroups(), slab()
        began = time.monotonic()
        server.stop()
        shutdown = time.monotonic() - began
    middle = statistics.median(first), statistics.median(last)
    quarter = statistics.quantiles(first)[0], statistics.quantiles(last)[0]
    with capsys.disabled():
        print(
            f"\n{HOSTS} hosts: at most {most[0]} confinements and {most[1]} executors in the tree; memory cgroups "
            f"{before[0]} -> {during[0]} -> {memory_cgroups()}; unreclaimable kernel memory {before[1]} -> {during[1]} "
            f"-> {slab()} KiB; worker {early[0]} -> {late[0]} KiB, {early[1]} -> {late[1]} descriptors; first {PART} "
            f"{middle[0] * 1e3:.1f} ms, last {middle[1] * 1e3:.1f} ms; shutdown {shutdown:.1f} s"
        )
    assert most[0] <= SETTINGS.confinements + SETTINGS.processes
    assert most[1] <= SETTINGS.processes + most_ending(SETTINGS.processes)
    assert late[1] <= early[1] + 16 * SETTINGS.processes
    assert late[0] - early[0] < 32 * 1024
    assert shutdown < SHUTDOWN_SECONDS
    if LONG:
        # The quarter that other load on the machine delayed least.
        assert quarter[1] < 1.25 * quarter[0]


@pytest.mark.parametrize("worker", ["sync", "gevent"])
def test_a_fork_server_keeps_no_descriptor_for_an_executor(tmp_path: Path, worker: str) -> None:
    """The fork server makes its Landlock rules anew at times, with a descriptor for each directory."""
    policy = "confinements = 4\nprocesses = 2\n[policy.default]\nper = 'host'\neach = { timeout = '60s' }\n"
    with Gunicorn(tmp_path, policy, "--workers", "1", "--worker-class", worker) as server:
        ask_as(server, range(10))
        (fork_server,) = children(server.workers()[0])
        before = descriptors(fork_server)
        ask_as(server, range(10, 90))
        assert children(server.workers()[0]) == [fork_server]
        assert descriptors(fork_server) <= before + 2 * most_ending(2)
