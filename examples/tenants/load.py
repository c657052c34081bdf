"""A small HTTP load generator: a few clients per tenant, each bounded in count and in time."""

from __future__ import annotations

import contextlib
import http.client
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

#: A request without an answer for so many seconds counts as "none".
PATIENCE = 25.0


@dataclass(frozen=True)
class Plan:
    """How to visit one tenant, with so many clients at once.

    ``pause`` is the time from the end of one request to the start of the next; with ``paced``, from start to start.
    """

    tenant: str
    clients: int
    pause: float
    paced: bool = False
    most: int = 1000


@dataclass
class Result:
    """The answers and latencies that the clients of one tenant saw."""

    tenant: str
    answers: Counter[str] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)

    @property
    def requests(self) -> int:
        """The number of requests."""
        return self.answers.total()

    def quantile(self, share: float) -> float | None:
        """Return the latency, in seconds, that this share of the requests did not exceed."""
        if not self.seconds:
            return None
        ordered = sorted(self.seconds)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def run(port: int, plans: list[Plan], seconds: float) -> dict[str, Result]:
    """Visit all tenants at once for so many seconds, and return when the last request is answered."""
    results = {plan.tenant: Result(plan.tenant) for plan in plans}
    lock = threading.Lock()
    deadline = time.monotonic() + seconds

    def client(plan: Plan, number: int) -> None:
        result = results[plan.tenant]
        time.sleep(number * plan.pause / plan.clients)
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
        for _ in range(plan.most):
            start = time.monotonic()
            if start >= deadline:
                break
            answer = ask(connection, plan.tenant)
            took = time.monotonic() - start
            with lock:
                result.answers[answer] += 1
                result.seconds.append(took)
            time.sleep(max(0.0, plan.pause - took) if plan.paced else plan.pause)
        connection.close()

    threads = [
        threading.Thread(target=client, args=(plan, number), daemon=True)
        for plan in plans
        for number in range(plan.clients)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def ask(connection: http.client.HTTPConnection, tenant: str) -> str:
    """Make one request; return its status, "cut" if the connection broke, or "none" without an answer in time."""
    try:
        connection.request("GET", "/", headers={"Host": f"{tenant}.example"})
        response = connection.getresponse()
        response.read()
    except TimeoutError:
        connection.close()
        return "none"
    except (OSError, http.client.HTTPException):
        connection.close()
        return "cut"
    return str(response.status)


def wait_until_served(port: int, tenant: str, seconds: float, running: Callable[[], bool]) -> bool:
    """Return whether the server answers this tenant with 200 within so many seconds."""
    deadline = time.monotonic() + seconds
    while running() and time.monotonic() < deadline:
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=5)) as connection:
            if ask(connection, tenant) == "200":
                return True
        time.sleep(0.05)
    return False
