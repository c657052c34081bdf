"""A producer that sends tasks of any kind under any policy to a Celery worker, and judges each result."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections import Counter
from random import Random
from typing import Any, NamedTuple

import celery
import redis

from tests.soak.load import HARMFUL, TENANT, why_wrong

_PLAIN = ("report", "report", "burn", "say", "read", "large", "fail")
#: By policy: the acts, and the uid of the task. The task ``kept`` is acknowledged late.
POLICIES: dict[str, tuple[tuple[str, ...], int]] = {
    "tenant": (_PLAIN * 2 + HARMFUL, TENANT),
    "own": (_PLAIN * 2 + HARMFUL + ("kept", "kept"), 0),
    "inline": (("report", "burn", "say", "read", "large", "fail"), 0),
}
#: How often the nonce is repeated in a large result.
FILLER = 100_000
#: How long a result may take, seconds: Celery waits 10 for that of a process that was killed, a task that is delivered
#: again waits 10 for the end of its first run, as often as it may die; stops, the wait for other tasks, the deadline.
LONGEST = 120.0
#: How a task ends that did not run, or that ended early.
_REFUSALS = {
    "Killed", "ConfinementError", "KernelError", "TimeLimitExceeded", "MemoryLimitExceeded", "PidsLimitExceeded",
    "ConcurrencyLimitExceeded",
}  # fmt: skip
_LOST = {"WorkerLostError"}

SETTINGS = f"""
processes = 8

[policy.tenant]
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
max_deaths = 4
each = {{ memory = "64M", timeout = "2s" }}

[policy.inline]
isolation = "inline"
pids = 100

[[route]]
task = "tenant.*"
policy = "tenant"

[[route]]
task = "inline.*"
policy = "inline"

[[route]]
policy = "own"
"""


class _Sent(NamedTuple):
    """A task whose result is awaited."""

    policy: str
    act: str
    nonce: str
    text: str
    began: float


class TaskLoad:
    """A thread that keeps some tasks under way. `pause` waits until all of them have ended."""

    def __init__(self, url: str, seed: int, clients: int) -> None:
        #: By task: results that are right, refusals; and tasks whose pool process was killed.
        self.right: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()
        self.cut = 0
        self.wrong: list[str] = []
        self._random = Random(seed)
        self._most = clients
        # It has no result backend: Celery's would subscribe to each result.
        self._app = celery.Celery("soak-producer", broker=url, set_as_current=False)
        self._redis = redis.Redis.from_url(url)
        self._sent: dict[str, _Sent] = {}
        self._goes_on = threading.Event()
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def go_on(self) -> None:
        """Begin, or begin again."""
        self._goes_on.set()

    def pause(self) -> None:
        """Send no tasks for a while. Returns when all have ended."""
        self._goes_on.clear()
        deadline = time.monotonic() + LONGEST + 5
        while self._sent and time.monotonic() < deadline:
            time.sleep(0.02)

    def end(self) -> None:
        """End the thread, and close the connections."""
        self.pause()
        self._ending.set()
        self._thread.join(LONGEST)
        self._redis.close()
        self._app.close()

    def _run(self) -> None:
        while not self._ending.is_set():
            if self._goes_on.is_set() and len(self._sent) < self._most:
                self._send()
            for number, sent in list(self._sent.items()):
                data: Any = self._redis.getdel(f"celery-task-meta-{number}")
                meta = json.loads(data) if data else {}
                if meta.get("status") in ("SUCCESS", "FAILURE"):
                    del self._sent[number]
                    self._judge(sent, meta)
                elif time.monotonic() - sent.began > LONGEST:
                    del self._sent[number]
                    self._say(sent, f"no result in {LONGEST:g} s; its state is {meta.get('status')}")
            time.sleep(self._random.uniform(0.005, 0.03))

    def _send(self) -> None:
        random = self._random
        policy = random.choice(list(POLICIES))
        act, nonce = random.choice(POLICIES[policy][0]), f"{random.getrandbits(64):016x}"
        text = random.randbytes(random.randrange(100_000)).hex() if act == "read" else ""
        number = f"{nonce}-{act}"
        self._sent[number] = _Sent(policy, act, nonce, text, time.monotonic())
        self._app.send_task(f"{policy}.{act}", (nonce, text), task_id=number)

    def _judge(self, sent: _Sent, meta: dict[str, Any]) -> None:
        policy, act, name = sent.policy, sent.act, f"{sent.policy}.{sent.act}"
        result = meta["result"]
        if meta["status"] == "FAILURE":
            kind, message = result["exc_type"], result["exc_message"]
            if kind in _LOST:
                self.cut += 1
            elif kind in _REFUSALS:
                self.refused[name] += 1
            elif act == "fail" and kind == "ValueError" and list(message) == [sent.nonce]:
                self.right[name] += 1
            else:
                self._say(sent, f"failed with {kind}: {str(message)[:200]}")
            return
        if act in ("hog", "late", "die", "fail"):
            self._say(sent, "has a result")
            return
        isolation = "inline" if policy == "inline" else "process"
        why = why_wrong(json.loads(result[0]), policy, isolation, POLICIES[policy][1], sent.nonce)
        if not why and result[1] != (sent.nonce * FILLER if act == "large" else text_of(sent.text)):
            why = f"another text of {len(result[1])} characters"
        if why:
            self._say(sent, why)
        else:
            self.right[name] += 1

    def _say(self, sent: _Sent, why: str) -> None:
        text = f"{sent.policy}.{sent.act} {sent.nonce}: {why}"
        self.wrong.append(text)
        print(f"  wrong: {text}", flush=True)


def text_of(text: str) -> str:
    """Return what a task returns for the text that it got."""
    return hashlib.sha256(text.encode()).hexdigest()
