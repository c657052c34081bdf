"""Many requests of eight tenants at once in one worker, each under its tenant's uid."""

from __future__ import annotations

import contextlib
import http.client
import os
import random
import threading
import time
from collections import Counter
from pathlib import Path

import pytest

from tests.directories import let_others_read
from tests.integrations.gunicorn.server import Gunicorn
from tests.integrations.gunicorn.tenants import TENANTS, ids, is_right, settings
from tests.processes import PATIENCE

pytestmark = pytest.mark.each_layout

#: `make test-long` makes more; the emulated machine is slow (tests/vm.py).
REQUESTS = 10_000 if "RCON_TEST_LONG" in os.environ else 600 if "RCON_TEST_EMULATED" in os.environ else 2_000
CLIENTS = 8
#: At once; while others work; after a wait; from an iterable, piece by piece; with a body to read.
MIX = ("/state", "/state", "/state?spin=0.002", "/state?sleep=0.005", "/states?pieces=3", "/posted")


class Clients:
    """Clients that each ask as any of the tenants, for anything of the mix, over a connection of their own."""

    def __init__(self, port: int, requests: int) -> None:
        """``requests`` is how many they make together."""
        self.right: Counter[str] = Counter()
        self.asked: Counter[str] = Counter()
        self.wrong: Counter[str] = Counter()
        self._port = port
        self._each = requests // CLIENTS
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._run, args=(number,)) for number in range(CLIENTS)]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def at_work(self, seconds: float) -> bool:
        """Wait for so long; whether there is still somebody asking."""
        for thread in self._threads:
            thread.join(seconds)
            if thread.is_alive():
                return True
        return False

    def _run(self, number: int) -> None:
        choose = random.Random(number)
        right, wrong, asked = Counter[str](), Counter[str](), Counter[str]()
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=PATIENCE)
        try:
            for _ in range(self._each):
                name, path = choose.choice(list(TENANTS)), choose.choice(MIX)
                content = choose.randbytes(choose.randrange(100_000)) if path == "/posted" else None
                connection.request("POST" if content else "GET", path, content, {"Host": name})
                response = connection.getresponse()
                body = response.read()
                asked[path] += 1
                if response.status == 200 and is_right(body, TENANTS[name]):
                    right[name] += 1
                else:
                    wrong[f"{name} {path}: {response.status} {body[:200]!r}"] += 1
        except Exception as error:
            wrong[f"{type(error).__name__}: {error}"] += 1
        finally:
            connection.close()
        with self._lock:
            self.right += right
            self.wrong += wrong
            self.asked += asked


def look_at_threads(worker: int, seen: dict[str, set[str]]) -> None:
    """Add what each thread of the worker is at this moment."""
    for task in Path(f"/proc/{worker}/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it ended just now
            seen.setdefault(task.name, set()).add(ids(task))


def are_executors(states: set[str]) -> bool:
    """Whether these are the states of a thread that became a tenant's."""
    return any(f"Uid:\t{uid}\t" in state for state in states for uid in TENANTS.values())


@pytest.mark.parametrize(
    ("isolation", "user", "requests"),
    [
        ("thread", "root", REQUESTS),
        ("process", "root", REQUESTS // 5),
        pytest.param("thread", "www-data", REQUESTS // 5, marks=pytest.mark.once),
    ],
)
def test_eight_tenants_in_one_worker(
    tmp_path: Path, homes: Path, isolation: str, user: str, requests: int
) -> None:
    arguments = ["--worker-class", "gthread", "--workers", "1", "--threads", "8", "--keep-alive", "60"]
    if user != "root":
        let_others_read(tmp_path)
        arguments += ["--user", user, "--group", user]
    with Gunicorn(tmp_path, settings(homes, isolation), *arguments) as server:
        (worker,) = server.workers()
        before = ids(Path(f"/proc/{worker}"))
        clients = Clients(server.port, requests)
        clients.start()
        seen: dict[str, set[str]] = {}
        pause = 0.05
        while clients.at_work(pause):
            began = time.monotonic()
            look_at_threads(worker, seen)
            pause = max(0.05, 4 * (time.monotonic() - began))  # most of the CPU is for the requests
        assert clients.wrong == {}
        assert clients.right.total() == requests
        assert set(clients.right) == set(TENANTS)
        assert set(clients.asked) == set(MIX)
        # The worker's other threads never change: whenever looked at, they were what the worker was at first.
        look_at_threads(worker, seen)
        servers = {name: states for name, states in seen.items() if not are_executors(states)}
        assert len(servers) >= 9  # the main thread and the eight that serve
        assert set().union(*servers.values()) == {before}
        assert (len(servers) < len(seen)) is (isolation == "thread")
        if isolation == "thread":
            assert len(seen) - len(servers) >= len(TENANTS)
