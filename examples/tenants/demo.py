"""Four tenants on one gunicorn, first unconfined, then confined: ``python examples/tenants/demo.py``.

Exits with 0 if every limit held and `steady` was served without error, 1 if not, and 2 where it cannot run.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NoReturn

import load
from app import BURN, MEBIBYTE
from load import Plan, Result
from measure import Confined, Unconfined, Used, Watch, tenant_cgroups
from server import THREADS, WORKERS, Server, why_not
from table import Row, say, write

#: How long each phase lasts, seconds.
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
        "--serve", action="store_true", help="only start the confined server, and leave it running"
    )
    parser.add_argument("--port", type=int, default=0, help="the port to listen on (default: any free one)")
    parser.add_argument(
        "--seconds", type=float, default=SECONDS, help="how long each of the two phases lasts"
    )
    parser.add_argument(
        "--cgroup", help="a part of the cgroup tree that is ours (default: what can be found)"
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
    """Both phases, and the table."""
    say(f"gunicorn, {WORKERS} workers with {THREADS} threads each; four tenants, twice {seconds:.0f} s")
    say("  1/2  without confinement (the hogs stop by themselves before they hurt this machine) …")
    without = unconfined(port, seconds)
    say("  2/2  with confinement …")
    within = confined(port, seconds, cgroup)
    rows = list(compare(without, within))
    good = all(row.held is not False for row in rows)
    if as_json:
        print(json.dumps({"good": good, "rows": [row.as_dict() for row in rows]}, indent=2))
        return 0 if good else 1
    say("")
    write(rows, sys.stdout)
    verdict = (
        "every limit held, and steady was served without error" if good else "not everything held: see ✗"
    )
    print(f"\n  {verdict}", flush=True)
    return 0 if good else 1


def unconfined(port: int, seconds: float) -> Phase:
    """The load against the plain server. The CPU time is what the cpu-hog's own answers tell."""
    server = Server(confined=False, port=port)
    try:
        _ready(server)
        eye = Unconfined(server.mark)
        start = time.monotonic()
        with Watch(eye):
            results = load.run(server.port, PLANS, seconds)
        burnt = BURN * results["cpu-hog"].answers["200"] / (time.monotonic() - start)
        return Phase(results, burnt, eye.used.memory, eye.used.processes)
    finally:
        server.stop()


def confined(port: int, seconds: float, cgroup: str | None) -> Phase:
    """The same load against the confined server, each tenant measured in its own cgroup."""
    server = Server(confined=True, port=port, cgroup=cgroup)
    try:
        _ready(server)
        eye = Confined(tenant_cgroups(server.pid, cgroup))
        start = time.monotonic()
        with Watch(eye):
            results = load.run(server.port, PLANS, seconds)
        eye.close()
        used: dict[str, Used] = eye.used
        return Phase(
            results,
            used["cpu-hog"].cpu_share(start, start + seconds),
            used["memory-hog"].memory,
            used["fork-bomb"].processes,
        )
    finally:
        server.stop()


def compare(without: Phase, within: Phase) -> Iterable[Row]:
    """Two rows for each tenant, and whether each limit held."""
    only_200 = set(within.results["steady"].answers) == {"200"}
    yield _row("steady", "no errors", without, False, _errors(without), None)
    yield _row("steady", "no errors", within, True, _errors(within), only_200)
    yield _row("cpu-hog", "cpu 20%", without, False, _percent(without.cpu), None)
    # a quota holds per period of 100 ms: what was measured begins and ends anywhere in one
    held = within.cpu is not None and 0.05 < within.cpu <= 0.215
    yield _row("cpu-hog", "cpu 20%", within, True, _percent(within.cpu), held)
    yield _row("memory-hog", "memory 64 MiB", without, False, _mebibytes(without.memory), None)
    held = within.memory is not None and 0 < within.memory <= 64 * MEBIBYTE
    yield _row("memory-hog", "memory 64 MiB", within, True, _mebibytes(within.memory), held)
    yield _row("fork-bomb", "16 processes", without, False, _processes(without.processes), None)
    held = within.processes is not None and 0 < within.processes <= 16
    yield _row("fork-bomb", "16 processes", within, True, _processes(within.processes), held)


def serve(port: int, cgroup: str | None) -> int:
    """Start the confined server, say how to visit it, and stay until it ends."""
    server = Server(confined=True, port=port, cgroup=cgroup)
    try:
        _ready(server)
        say(f"gunicorn (pid {server.pid}) serves four tenants, each confined by examples/tenants/rcon.toml:")
        for plan in PLANS:
            say(f"  curl -i -H 'Host: {plan.tenant}.example' http://127.0.0.1:{server.port}/")
        say("Ctrl-C ends it.")
        return server.wait()
    finally:
        server.stop()


def _row(tenant: str, limit: str, phase: Phase, confined: bool, measured: str, held: bool | None) -> Row:
    result = phase.results[tenant]
    return Row(
        tenant, limit, confined, measured, result.answers, result.quantile(0.5), result.quantile(0.99), held
    )


def _errors(phase: Phase) -> str:
    answers = phase.results["steady"].answers
    return f"{answers.total() - answers['200']} errors"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"cpu {share:.1%}"


def _mebibytes(size: int | None) -> str:
    return "-" if size is None else f"{size / MEBIBYTE:.0f} MiB"


def _processes(count: int | None) -> str:
    return "-" if count is None else f"{count} processes"


def _ready(server: Server) -> None:
    if not load.wait_until_served(server.port, "steady", 20, server.running):
        raise SystemExit(f"the server did not start:\n{server.log()}")


def _interrupted(*_: object) -> NoReturn:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
