"""Measure what confinement costs, and how it protects other tenants: ``python tests/benchmarks``.

Print figures and assert nothing; docs/explanation/benchmarks.md explains them. The servers compared run side by side on
this machine, in turns within the same minute. So the ratios are meaningful even if the absolute figures are not.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import celery_tasks
import events
import startup
from under_test import Gunicorn
from wire import Connection, Crowd

AIMS = {"inline": 0.85, "thread": 0.80, "process": 0.75}
AIM_ADDED = 250e-6

PARTS = ("throughput", "latency", "neighbours", "events", "startup", "tasks")
MODES = ("plain", "inline", "thread", "process")
#: Two servers that make a thread or process for each request and discard it. Only their throughput is measured.
EACH_ANEW = ("new thread", "new process")
EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "tenants"


def main() -> int:
    """Run the benchmarks that the arguments name."""
    parser = argparse.ArgumentParser(prog="tests/benchmarks", description="What confinement costs.")
    parser.add_argument("--only", action="append", choices=PARTS, help="one part; may be given again")
    parser.add_argument("--rounds", type=int, default=15, help="how often the servers take turns")
    parser.add_argument("--seconds", type=float, default=0.5, help="how long each turn is")
    parser.add_argument("--json", action="store_true", help="write JSON")
    options = parser.parse_args()
    what = options.only or PARTS
    found: dict[str, Any] = {}
    if "throughput" in what or "latency" in what:
        servers = {}
        try:
            for mode in MODES + (EACH_ANEW if "throughput" in what else ()):
                servers[mode] = Gunicorn(mode)
            if "throughput" in what:
                for connections in (1, 8):
                    say(f"throughput, {connections} connection(s) …")
                    name = f"throughput_{connections}"
                    found[name] = throughput(servers, connections, options.rounds, options.seconds)
            if "latency" in what:
                say("latency at 10 requests a second …")
                found["latency"] = latency(servers, 60)
        finally:
            for server in servers.values():
                server.stop()
    if "neighbours" in what:
        say("steady's latency alone, and beside three tenants that misbehave …")
        found["neighbours"] = neighbours(options.rounds // 3 or 1, 6.0)
    if "events" in what:
        say("from event to callback …")
        found["events"] = events.latency(25)
    if "startup" in what:
        say("how long rcon run takes to start …")
        found["startup"] = startup.measure(20)
    if "tasks" in what:
        say("tasks of Celery …")
        found["tasks"] = celery_tasks.rates(options.rounds // 3 or 1)
    if options.json:
        print(json.dumps(found, indent=2))
    else:
        report(found)
    return 0


def throughput(
    servers: dict[str, Gunicorn], connections: int, rounds: int, seconds: float
) -> dict[str, dict[str, float]]:
    """Return the requests per second of each server, as the median of the rounds, and the ratio to the plain server."""
    crowds = {mode: Crowd(server.port, connections) for mode, server in servers.items()}
    rates: dict[str, list[float]] = {mode: [] for mode in servers}
    for crowd in crowds.values():
        crowd.throughput(0.5)  # warm
    for number in range(rounds):
        for mode in _rotated(number, *servers):
            rates[mode].append(crowds[mode].throughput(seconds))
    plain = rates["plain"]
    return {
        mode: {
            "requests_per_second": statistics.median(mine),
            # the median of the ratios within each round: other load on the machine affects both servers of a round
            "ratio": statistics.median(rate / other for rate, other in zip(mine, plain, strict=True)),
            "ratio_of_best": max(mine) / max(plain),
        }
        for mode, mine in rates.items()
    }


def latency(servers: dict[str, Gunicorn], count: int) -> dict[str, dict[str, float]]:
    """Return the seconds from request to response, at ten requests a second to each server."""
    connections = {mode: Connection(servers[mode].port) for mode in MODES}
    taken: dict[str, list[float]] = {mode: [] for mode in MODES}
    pause = 0.1 / len(connections)
    for number in range(count):
        for mode in _rotated(number, *MODES):
            time.sleep(pause)
            start = time.perf_counter()
            connections[mode].ask()
            connections[mode].answer()
            taken[mode].append(time.perf_counter() - start)
    for connection in connections.values():
        connection.close()
    plain = statistics.median(taken["plain"])
    return {
        mode: {"median": statistics.median(all_), "added": statistics.median(all_) - plain}
        for mode, all_ in taken.items()
    }


def neighbours(rounds: int, seconds: float) -> dict[str, dict[str, float | int]]:
    """Return the latency of the example's tenant `steady`, alone and while the other three misbehave, in turns."""
    sys.path.insert(0, str(EXAMPLE))
    import demo
    import load
    from server import Server

    found: dict[str, dict[str, float | int]] = {}
    steady, *hogs = demo.PLANS
    for confined in (False, True):
        server = Server(confined=confined)
        try:
            if not load.wait_until_served(server.port, "steady", 20, server.running):
                raise RuntimeError(f"the example did not start:\n{server.log()}")
            load.run(server.port, demo.PLANS, 2.0)  # warm
            sums = {"alone": load.Result("steady"), "with hogs": load.Result("steady")}
            for _ in range(rounds):
                for name, plans in (("alone", [steady]), ("with hogs", [steady, *hogs])):
                    result = load.run(server.port, plans, seconds)["steady"]
                    sums[name].answers += result.answers
                    sums[name].seconds += result.seconds
            for name, result in sums.items():
                found[f"{name}, {'confined' if confined else 'unconfined'}"] = {
                    "requests": result.requests,
                    "errors": result.requests - result.answers["200"],
                    "p50": result.quantile(0.5) or 0.0,
                    "p99": result.quantile(0.99) or 0.0,
                    "p99_ratio": (result.quantile(0.99) or 0.0) / (sums["alone"].quantile(0.99) or 1.0),
                }
        finally:
            server.stop()
    return found


def report(found: dict[str, Any]) -> None:
    """Print the tables."""
    for connections in (1, 8):
        rates = found.get(f"throughput_{connections}")
        if rates:
            print(
                f"\nThroughput, hello world, gthread with 8 threads, {connections} connection(s) kept alive"
            )
            print(f"  {'':12}{'requests/s':>12}{'ratio':>9}{'of best':>9}{'aim':>9}")
            for mode, row in rates.items():
                aim = f">= {AIMS[mode]:.2f}" if mode in AIMS and connections == 1 else ""
                rate, ratio, best = row["requests_per_second"], row["ratio"], row["ratio_of_best"]
                print(f"  {mode:12}{rate:12,.0f}{ratio:9.2f}{best:9.2f}{aim:>9}")
    if "tasks" in found:
        celery_tasks.report(found["tasks"])
    if "latency" in found:
        print("\nLatency at 10 requests a second, one connection")
        print(f"  {'':12}{'median':>12}{'added':>12}{'aim':>12}")
        for mode, row in found["latency"].items():
            aim = f"<= {AIM_ADDED * 1e6:.0f} us" if mode != "plain" else ""
            print(f"  {mode:12}{row['median'] * 1e6:9,.0f} us{row['added'] * 1e6:+9,.0f} us{aim:>12}")
    if "neighbours" in found:
        print("\nsteady, 40 requests a second, two gthread workers with 8 threads (aim: p99 at most twice)")
        print(f"  {'':24}{'requests':>9}{'errors':>8}{'p50':>12}{'p99':>12}{'of alone':>10}")
        for name, row in found["neighbours"].items():
            p50, p99 = (f"{row[key] * 1000:,.1f} ms" for key in ("p50", "p99"))
            print(
                f"  {name:24}{row['requests']:9}{row['errors']:8}{p50:>12}{p99:>12}{row['p99_ratio']:10.2f}"
            )

    if "events" in found:
        print("\nFrom event to callback (aim on cgroup v2: median <= 2 ms for limit and kill)")
        print(f"  {'':16}{'median':>12}{'p90':>12}{'events':>9}{'bare poll':>12}{'p90':>12}{'times':>8}")
        for kind, row in found["events"].items():
            bare = "  the kernel tells it no other way than the limit"
            if "times" in row:
                bare = (
                    f"{row['bare_median'] * 1e3:9,.2f} ms{row['bare_p90'] * 1e3:9,.2f} ms{row['times']:8.2f}"
                )
            print(
                f"  {kind:16}{row['median'] * 1e3:9,.2f} ms{row['p90'] * 1e3:9,.2f} ms{row['count']:9}{bare}"
            )
    if "startup" in found:
        print(f"\nStart-up (aim for rcon run -- true: at most {startup.AIM:g} times python3 -c pass)")
        print(f"  {'':20}{'median':>12}{'CPU':>12}{'times':>9}")
        for name, row in found["startup"].items():
            print(f"  {name:20}{row['wall'] * 1e3:9,.1f} ms{row['cpu'] * 1e3:9,.1f} ms{row['times']:9.1f}")


def say(text: str) -> None:
    """Print a line of progress."""
    print(text, file=sys.stderr, flush=True)


def _rotated(number: int, *modes: str) -> tuple[str, ...]:
    turn = number % len(modes)
    return modes[turn:] + modes[:turn]


if __name__ == "__main__":
    sys.exit(main())
