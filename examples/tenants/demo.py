"""Four tenants on one gunicorn, first unconfined, then confined: ``python examples/tenants/demo.py``.

Exits with 0 if every limit held and `steady` was served without error, 1 if not, and 2 if nothing can be confined.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

import load
from app import BURN, MEBIBYTE
from load import Plan, Result
from measure import Confined, Unconfined, Used, Watch, tenant_cgroups
from server import THREADS, WORKERS, Server, why_not
from table import Row, Visit, say, write

#: How long each phase lasts, in seconds.
SECONDS = 9.0

PLANS = [
    Plan("steady", clients=4, pause=0.1, paced=True),
    Plan("cpu-hog", clients=2, pause=0.02),
    Plan("memory-hog", clients=1, pause=0.25),
    Plan("fork-bomb", clients=1, pause=0.25),
]


@dataclass(frozen=True)
class Phase:
    """What one phase measured."""

    results: dict[str, Result]
    cpu: float | None
    memory: int | None
    processes: int | None


def main() -> int:
    """Run the demonstration."""
    parser = argparse.ArgumentParser(description="Four tenants on one gunicorn, unconfined and confined.")
    parser.add_argument(
        "--serve", action="store_true", help="only start the confined server, and keep it running"
    )
    parser.add_argument("--port", type=int, default=0, help="the port to listen on (default: any free one)")
    parser.add_argument(
        "--seconds", type=float, default=SECONDS, help="how long each of the two phases lasts"
    )
    parser.add_argument(
        "--cgroup", help="a cgroup to work in that this user may write (default: the first usable)"
    )
    parser.add_argument("--json", action="store_true", help="write the result as JSON instead of a table")
    options = parser.parse_args()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupted)
    obstacle = why_not(options.cgroup)
    if obstacle is not None:
        say(f"Nothing can be confined here: {obstacle}")
        return 2
    try:
        if options.serve:
            return serve(options.port, options.cgroup)
        return demonstrate(options.port, options.seconds, options.cgroup, as_json=options.json)
    except KeyboardInterrupt:
        say("\ninterrupted")
        return 130


def demonstrate(port: int, seconds: float, cgroup: str | None, *, as_json: bool) -> int:
    """Run both phases and print the tables; return the exit status."""
    say(
        f"One gunicorn ({WORKERS} workers, {THREADS} threads each) serves four tenants. Three of them misbehave:"
    )
    say(
        "cpu-hog burns CPU, memory-hog allocates memory, fork-bomb starts processes; steady does ordinary work."
    )
    say(f"  1/2  unconfined, {seconds:.0f} s (the tenants stop before they hurt this machine) …")
    without = unconfined(port, seconds)
    say(f"  2/2  confined, {seconds:.0f} s …")
    rows = compare(without, confined(port, seconds, cgroup))
    good = all(row.held for row in rows)
    if as_json:
        print(json.dumps({"good": good, "rows": [row.as_dict() for row in rows]}, indent=2))
        return 0 if good else 1
    say("")
    write(rows, sys.stdout)
    failed = "A limit did not hold, or this machine was too busy to measure it: see ✗."
    verdict = "Every limit held, and steady was served without error." if good else failed
    print(f"\n  {verdict}", flush=True)
    return 0 if good else 1


def unconfined(port: int, seconds: float) -> Phase:
    """Put the load on the plain server. The CPU time is the sum of what the answers of cpu-hog report."""
    server = Server(confined=False, port=port)
    try:
        _ready(server)
        observer = Unconfined(server.mark)
        start = time.monotonic()
        with Watch(observer):
            results = load.run(server.port, PLANS, seconds)
        burnt = BURN * results["cpu-hog"].answers["200"] / (time.monotonic() - start)
        return Phase(results, burnt, observer.used.memory, observer.used.processes)
    finally:
        server.stop()


def confined(port: int, seconds: float, cgroup: str | None) -> Phase:
    """Put the same load on the confined server, and measure each tenant in its own cgroup."""
    server = Server(confined=True, port=port, cgroup=cgroup)
    try:
        _ready(server)
        observer = Confined(tenant_cgroups(server.pid, cgroup))
        start = time.monotonic()
        with Watch(observer):
            results = load.run(server.port, PLANS, seconds)
        observer.close()
        used: dict[str, Used] = observer.used
        return Phase(
            results,
            used["cpu-hog"].cpu_share(start, start + seconds),
            used["memory-hog"].memory,
            used["fork-bomb"].processes,
        )
    finally:
        server.stop()


def compare(without: Phase, confined: Phase) -> list[Row]:
    """Return a row for each tenant, and whether its limit held."""
    cpu, memory, processes = confined.cpu, confined.memory, confined.processes
    return [
        _row("steady", "no errors", without, confined, _errors, set(confined.results["steady"].answers) == {"200"}),
        # The quota holds per period of 100 ms, and the measurement begins and ends within a period.
        _row("cpu-hog", "20 % of a CPU", without, confined, _percent, cpu is not None and 0.05 < cpu <= 0.215),
        _row(
            "memory-hog", "64 MiB of memory", without, confined, _mebibytes,
            memory is not None and 0 < memory <= 64 * MEBIBYTE,
        ),
        _row(
            "fork-bomb", "16 processes", without, confined, _processes,
            processes is not None and 0 < processes <= 16,
        ),
    ]  # fmt: skip


def serve(port: int, cgroup: str | None) -> int:
    """Start the confined server, print how to visit it, and wait until it ends."""
    server = Server(confined=True, port=port, cgroup=cgroup)
    try:
        _ready(server)
        say(f"gunicorn (pid {server.pid}) serves four tenants, confined by examples/tenants/rcon.toml:")
        for plan in PLANS:
            say(f"  curl -i -H 'Host: {plan.tenant}.example' http://127.0.0.1:{server.port}/")
        say("Press Ctrl-C to stop it.")
        return server.wait()
    finally:
        server.stop()


def _row(
    tenant: str, limit: str, without: Phase, confined: Phase, measured: Callable[[Phase], str], held: bool
) -> Row:
    def visit(phase: Phase) -> Visit:
        result = phase.results[tenant]
        return Visit(measured(phase), result.answers, result.quantile(0.5), result.quantile(0.99))

    return Row(tenant, limit, visit(without), visit(confined), held)


def _errors(phase: Phase) -> str:
    answers = phase.results["steady"].answers
    return f"{answers.total() - answers['200']} errors"


def _percent(phase: Phase) -> str:
    return "-" if phase.cpu is None else f"{phase.cpu:.0%} of a CPU"


def _mebibytes(phase: Phase) -> str:
    return "-" if phase.memory is None else f"{phase.memory / MEBIBYTE:.0f} MiB"


def _processes(phase: Phase) -> str:
    return "-" if phase.processes is None else f"{phase.processes} processes"


def _ready(server: Server) -> None:
    if not load.wait_until_served(server.port, "steady", 20, server.running):
        raise SystemExit(f"the server did not start:\n{server.log()}")


def _interrupted(*_: object) -> NoReturn:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
