"""Clients that ask a server for any act under any policy, and judge each answer."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import json
import socket
import threading
import time
from collections import Counter
from random import Random
from typing import Any

TENANT = 61021
HOSTS = [f"host{number}.example" for number in range(40)]
#: By policy: the part of the path, the acts, and the uid of the work.
PLAIN = ("report", "report", "report", "read", "stream", "burn", "say")
HARMFUL = ("child", "leave", "hog", "late", "die")
POLICIES: dict[str, tuple[tuple[str, ...], int]] = {
    "tenant": (PLAIN * 2 + HARMFUL, TENANT),
    "own": (PLAIN * 2 + HARMFUL, 0),
    "thread": (PLAIN, TENANT + 1),
    "inline": (PLAIN, 0),
}
#: How long an answer may take, seconds: the longest stop, the wait for an executor, the deadline.
LONGEST = 45.0
#: Answers that say that the work did not run, or ended early.
_REFUSALS = (429, 502, 503, 504, 507)

SETTINGS = f"""
processes = 8
confinements = 16
threads = 8

[policy.tenant]
per = "host"
isolation = "process"
user = {TENANT}
group = {TENANT}
groups = []
cpu = "150%"
memory = "128M"
pids = 48
concurrency = 8
max_uses = 50
each = {{ memory = "64M", pids = 16, timeout = "2s" }}

[policy.own]
isolation = "process"
memory = "256M"
pids = 64
max_uses = 3
each = {{ memory = "64M", timeout = "2s" }}

[policy.thread]
per = "host"
isolation = "thread"
user = {TENANT + 1}
group = {TENANT + 1}
groups = []
pids = 50

[policy.inline]
per = "host"
isolation = "inline"
pids = 100

[[route]]
path = "/tenant/**"
policy = "tenant"

[[route]]
path = "/thread/**"
policy = "thread"

[[route]]
path = "/inline/**"
policy = "inline"

[[route]]
policy = "own"
"""


class Load:
    """Some clients. `pause` waits until none of them has a request under way."""

    def __init__(self, port: int, seed: int, clients: int) -> None:
        #: By act: answers with 200 that are right, refusals, broken connections.
        self.right: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()
        self.cut = 0
        self.wrong: list[str] = []
        self._port = port
        self._goes_on = threading.Event()
        self._ending = threading.Event()
        self._busy = 0
        self._lock = threading.Lock()
        self._threads = [
            threading.Thread(target=self._run, args=(Random(seed * 1000 + number),), daemon=True)
            for number in range(clients)
        ]
        for thread in self._threads:
            thread.start()

    def go_on(self) -> None:
        """Begin, or begin again."""
        self._goes_on.set()

    def pause(self) -> None:
        """Send no requests for a while. Returns when all have ended."""
        self._goes_on.clear()
        deadline = time.monotonic() + LONGEST + 5
        while self._busy and time.monotonic() < deadline:
            time.sleep(0.02)

    def end(self) -> None:
        """End the clients."""
        self.pause()
        self._ending.set()
        for thread in self._threads:
            thread.join(LONGEST)

    def _run(self, random: Random) -> None:
        while not self._ending.is_set():
            if not self._goes_on.wait(0.2):
                continue
            with self._lock:
                self._busy += 1
            try:
                self._request(random)
            finally:
                with self._lock:
                    self._busy -= 1
            time.sleep(random.uniform(0.005, 0.08))

    def _request(self, random: Random) -> None:
        policy = random.choice(list(POLICIES))
        acts, uid = POLICIES[policy]
        act, host, nonce = random.choice(acts), random.choice(HOSTS), f"{random.getrandbits(64):x}"
        body = random.randbytes(random.randrange(200_000)) if act == "read" else None
        began = time.monotonic()
        try:
            status, text = self._ask(f"/{policy}/{act}?nonce={nonce}", host, body)
        except TimeoutError:
            self._say(f"{policy}/{act}: no answer in {LONGEST:g} s")
            return
        except (OSError, http.client.HTTPException):
            self.cut += 1
            time.sleep(0.05)
            return
        if time.monotonic() - began > LONGEST:
            self._say(f"{policy}/{act}: took {time.monotonic() - began:.0f} s")
        if status in _REFUSALS:
            self.refused[f"{policy}/{act}"] += 1
        elif status != 200:
            self._say(f"{policy}/{act}: status {status}: {text[:200]!r}")
        elif act in ("hog", "late", "die"):
            self._say(f"{policy}/{act}: answered")
        else:
            expected = hashlib.sha256(body).hexdigest() if body is not None else nonce
            name = policy if policy == "own" else f"{policy}~{host}"
            isolation = policy if policy in ("thread", "inline") else "process"
            why = why_wrong(json.loads(text), name, isolation, uid, expected)
            if why:
                self._say(f"{policy}/{act} of {host}: {why}")
            else:
                self.right[f"{policy}/{act}"] += 1

    def _ask(self, path: str, host: str, body: bytes | None) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=LONGEST)
        with contextlib.closing(connection):
            headers = {"Host": host, "Connection": "close"}
            connection.request("POST" if body is not None else "GET", path, body, headers)
            response = connection.getresponse()
            return response.status, response.read()

    def _say(self, text: str) -> None:
        self.wrong.append(text)
        print(f"  wrong: {text}", flush=True)


def why_wrong(answer: dict[str, Any], name: str, isolation: str, uid: int, nonce: str) -> str:
    """Return what is wrong with an answer from the confinement ``name``; an empty text if nothing is."""
    if answer["nonce"] != nonce:
        return f"the answer of another request: {answer['nonce']}, not {nonce}"
    paths = {path for _, path in answer["cgroups"]}
    part = f"/work/{name}/" if isolation == "process" else f"/host/{name}"
    if not any(part in f"{path}/" for path in paths):
        return f"UNCONFINED: not in a cgroup of {name}: {sorted(paths)}"
    limited = {"memory", "pids"} if isolation == "process" else {"pids"}
    outside = [
        controllers
        for controllers, path in answer["cgroups"]
        if limited & set(controllers.split(",")) and part not in f"{path}/"
    ]
    if outside:
        return f"UNCONFINED: outside of its cgroup in {outside}"
    if answer["Uid"] != [str(uid)] * 4:
        return f"UNCONFINED: the uids are {answer['Uid']}"
    if isolation != "inline" and (answer["NoNewPrivs"] != ["1"] or int(answer["CapPrm"][0], 16)):
        return f"UNCONFINED: privileges {answer['NoNewPrivs']}, {answer['CapPrm']}"
    if isolation == "process" and answer["Seccomp"] != ["2"]:
        return "UNCONFINED: no seccomp filter"
    return ""


def answers(port: int) -> bool:
    """Return whether a server accepts connections."""
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return False
