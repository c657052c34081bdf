"""Run the soak: ``python -m tests.soak [--minutes N] [--seed N]``. Print what grows; fail on growth, wrong answers.

A gunicorn with two gthread workers on loopback serves all isolations. Executors, fork servers and workers are killed
and stopped at random. At intervals load and harm pause, and the figures of the quiet server are printed.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import tempfile
import threading
import time
from pathlib import Path
from random import Random

from tests import leftovers
from tests.integrations.gunicorn.server import Gunicorn
from tests.processes import instance_directories
from tests.soak.harm import Harm
from tests.soak.load import SETTINGS, Load
from tests.soak.measure import BOUNDS, SHARE, Figures, grown, measure, own_processes

ROOT = Path(__file__).resolve().parents[2]
#: How long a server needs until it is quiet: executors that end, workers that are made again.
QUIET_SECONDS = 6.0
_COLUMNS = ("minutes", "right", "refused", "cut", "harm", *Figures._fields)


def main() -> int:
    """Run; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=int(time.time()) % 1_000_000)
    parser.add_argument("--clients", type=int, default=6)
    parser.add_argument("--interval", type=float, default=60.0, help="seconds between two measurements")
    options = parser.parse_args()
    print(f"seed {options.seed}, {options.minutes:g} minutes, {options.clients} clients", flush=True)
    print(f"each figure may grow by {SHARE:.0%} and {BOUNDS}", flush=True)
    leftovers.become_subreaper()
    threading.Thread(target=_reap_orphans, daemon=True).start()
    with tempfile.TemporaryDirectory(prefix="rcon-soak-") as folder:
        problems = _soak(Path(folder), options)
    for problem in problems:
        print(problem)
    print("passed" if not problems else f"FAILED: {len(problems)} problems")
    return 1 if problems else 0


def _reap_orphans() -> None:
    """Reap what killed fork servers leave, as process 1 does: a zombie keeps the keyring of its user, which are few."""
    while True:
        for pid, parent in leftovers.zombies().items():
            if parent == os.getpid() and pid not in _own:
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(pid, os.WNOHANG)
        time.sleep(0.2)


#: Children of this program, which it waits for itself.
_own: set[int] = set()


def _soak(folder: Path, options: argparse.Namespace) -> list[str]:
    server = Gunicorn(
        folder, SETTINGS, "-k", "gthread", "--threads", "4", "--workers", "2", "--timeout", "30",
        app="tests.soak.application:app", environ={"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    pid = server.pid
    _own.add(pid)
    problems: list[str] = []
    with server:
        load = Load(server.port, options.seed, options.clients)
        harm = Harm(server, Random(options.seed))
        try:
            problems += _rounds(server, load, harm, options)
        finally:
            harm.end()
            load.end()
        problems += load.wrong
        print(f"right: {dict(sorted(load.right.items()))}")
        print(f"refused: {dict(sorted(load.refused.items()))}")
        print(f"harm: {dict(sorted(harm.done.items()))}")
    if server.process.returncode != 0:
        problems.append(f"the server ended with status {server.process.returncode}")
    # What the killed fork servers had forked is adopted here, and ends soon.
    deadline = time.monotonic() + 10
    while leftovers.descendants(os.getpid()) and time.monotonic() < deadline:
        time.sleep(0.1)
    problems += [f"left a process: {one}" for one in leftovers.descendants(os.getpid()).values()]
    leftovers.kill_descendants()
    problems += [f"left a cgroup: {one}" for one in instance_directories(pid)]
    tracebacks = [line for line in server.log().splitlines() if line.startswith("Traceback")]
    print(f"log: {len(server.log()) >> 10} KiB, {len(tracebacks)} tracebacks")
    Path("build").mkdir(exist_ok=True)
    Path("build/soak.log").write_text(server.log())
    print("the server's log: build/soak.log")
    return problems


def _rounds(server: Gunicorn, load: Load, harm: Harm, options: argparse.Namespace) -> list[str]:
    print(" ".join(f"{name:>11}" for name in _COLUMNS), flush=True)
    began = time.monotonic()
    end = began + options.minutes * 60
    first: Figures | None = None
    last: list[str] = []
    while time.monotonic() < end:
        load.go_on()
        harm.go_on()
        time.sleep(min(options.interval, max(1.0, end - time.monotonic())))
        harm.pause()
        load.pause()
        now = _quiet(server)
        counts = (load.right.total(), load.refused.total(), load.cut, harm.done.total())
        print(
            f"{(time.monotonic() - began) / 60:>11.1f} "
            + " ".join(f"{count:>11}" for count in counts)
            + " "
            + " ".join(f"{figure:>11.0f}" for figure in now),
            flush=True,
        )
        first = first or now
        last = grown(first, now)
        if server.process.poll() is not None:
            return ["the server ended"]
    return last


def _quiet(server: Gunicorn) -> Figures:
    """Wait until the figures no longer fall, and return them."""
    deadline = time.monotonic() + 4 * QUIET_SECONDS
    time.sleep(QUIET_SECONDS)
    best = measure(server)
    while len(own_processes(server)) < 5 and time.monotonic() < deadline:
        time.sleep(0.5)
        best = measure(server)
    return best


if __name__ == "__main__":
    sys.exit(main())
