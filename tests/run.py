"""Run the tiers of the suite: in lanes side by side, then, alone, emulated machines and the tier that measures.

`make check`, `make test`, `make test-long` and `make coverage` call `python -m tests.run check|test|long|coverage`.
Each tier is one process whose output goes to `build/tests/<tier>.log`.

- Tiers of one lane run one after another, in the order of `plans`; the lanes run side by side. None of their tests
  measures CPU time or IO of this machine.
- Tiers of the lane `ALONE` start when all other lanes are done, one after another: no emulator and no other test takes
  the CPU from a test that measures.
- A tier that runs no test fails. In CI a skipped test fails as well (tests/conftest.py).
- At the end it prints the failures, the time of each tier, and the sum of all counts in pytest's own form.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

from tests.conftest import FEW
from tests.machine import NEXT_RUN

ROOT = Path(__file__).resolve().parent.parent
LOGS = ROOT / "build" / "tests"
ALONE = "alone"
#: The lane that takes longest. It gets the CPU before the others, so that it does not end long after them.
LONGEST = "emulator"
#: The number of tests of all tiers that may need a second attempt; tests/conftest.py bounds those of one tier.
RERUNS = 8
BEAT = 60.0  # seconds between two lines of progress
STOP_SECONDS = 20.0  # how long a tier may take to end after an interrupt

_SUMMARY = re.compile(r"^=* ?(\d+ [a-z]+(?:, \d+ [a-z]+)*) in [\d.]+s", re.MULTILINE)
_PERCENT = re.compile(r"\[ *(\d+)%\]")
_SECTIONS = re.compile(r"^=+ (?:ERRORS|FAILURES|run again, as they failed) =+$", re.MULTILINE)


@dataclass
class Tier:
    """One process of the suite. After it has run: its exit status, seconds, seconds of CPU time, and counts."""

    name: str
    lane: str
    command: tuple[str, ...]
    tests: bool = True
    environment: dict[str, str] = field(default_factory=dict)
    status: int | None = None
    seconds: float = 0.0
    cpu: float = 0.0
    counts: Counter[str] = field(default_factory=Counter)

    @property
    def log(self) -> Path:
        return LOGS / f"{self.name}.log"

    @property
    def failure(self) -> str:
        """The reason why this tier failed; empty if it passed."""
        if self.status is None:
            return "not run"
        if self.status:
            return f"FAILED (exit status {self.status})"
        if self.tests and not self.counts["passed"]:
            return "FAILED: ran no test"
        if self.counts["rerun"] > FEW:  # an emulated machine runs pytest twice, and each run has this bound
            return f"FAILED: {self.counts['rerun']} tests needed a second attempt; {FEW} may"
        return ""


def pytest(name: str, lane: str, *arguments: str, **environment: str) -> Tier:
    return Tier(name, lane, (*PYTHON, "pytest", *arguments, *SLOWEST), environment=environment)


def machine(name: str, lane: str, module: str) -> Tier:
    return Tier(name, lane, (*PYTHON, module, *SLOWEST))


PYTHON = (sys.executable, "-m")
COVERAGE = (*PYTHON, "coverage", "run", "--rcfile=tests/coverage.ini", "-m")
LINT = Tier("lint", "free", ("make", "--no-print-directory", "lint"), tests=False)
DOCS = ("make", "--no-print-directory", "docs")
QUIET = "not measures"
#: Each log names its slowest tests: where to look when a tier takes longer than it did.
SLOWEST = ("--durations=20", "--durations-min=1")
CELERY = "tests/integrations/celery"
#: With Celery loaded each fork of pytest takes a third longer, and the kernel tier makes thousands.
KERNEL_CELERY = "tests/kernel/celery"
HOST = ("--reruns", "1")


def plans() -> dict[str, list[Tier]]:
    """Return the tiers of each target."""
    unit = pytest("unit", "free", "tests/unit")
    integrations = pytest(
        "integrations", "host", "tests/integrations", f"--ignore={CELERY}", "-m", QUIET, *HOST
    )
    kernel = pytest("kernel", "host", "tests/kernel", f"--ignore={KERNEL_CELERY}", "-m", QUIET, *HOST)
    # These tests mostly wait, so three processes run them.
    parallel = ("-n", "3", "--dist", "loadfile")
    celery = pytest("celery", "free", CELERY, KERNEL_CELERY, "-m", QUIET, *parallel, *HOST)
    measures = pytest("measures", ALONE, "tests/integrations", "tests/kernel", "-m", "measures", *HOST)
    return {
        "check": [
            unit,
            pytest("contract", "host", "tests/contract"),
            pytest("kernel-smoke", "host", "tests/kernel", "-m", "smoke", *HOST),
            Tier("lint", "lint", LINT.command, tests=False),
            Tier("docs", "lint", DOCS, tests=False),
        ],
        "test": [
            machine("v2", LONGEST, "tests.vm"),
            integrations,
            kernel,
            LINT,
            Tier("docs", "free", DOCS, tests=False),
            unit,
            pytest("contract", "free", "tests/contract"),
            celery,
            machine("systemd", "free", "tests.vm_systemd"),
            measures,
        ],
        "coverage": [
            replace(tier, command=COVERAGE + tier.command[len(PYTHON) :])
            for tier in (
                integrations,
                kernel,
                unit,
                pytest("contract", "free", "tests/contract"),
                celery,
                measures,
            )
        ],
        "long": [
            replace(measures, environment={"RCON_TEST_LONG": "1"}),
            pytest("faults", ALONE, "tests/kernel/faults", RCON_TEST_LONG="1"),
            pytest("tenants", ALONE, "tests/integrations/gunicorn/test_tenants.py", RCON_TEST_LONG="1"),
            pytest("hosts", ALONE, "tests/integrations/gunicorn/test_hosts.py", RCON_TEST_LONG="1"),
            Tier("celery-suite", ALONE, (*PYTHON, "tests.celery_suite"), tests=False),
        ],
    }


class Suite:
    """The tiers of one run. `run()` returns the exit status."""

    def __init__(self, title: str, tiers: list[Tier]) -> None:
        self._title = title
        self._tiers = tiers
        self._began = time.monotonic()
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self._lock = threading.Lock()
        self._stopped = False

    def run(self) -> int:
        LOGS.mkdir(parents=True, exist_ok=True)
        for tier in self._tiers:
            tier.log.unlink(missing_ok=True)
        lanes: dict[str, list[Tier]] = {}
        for tier in self._tiers:
            lanes.setdefault(tier.lane, []).append(tier)
        alone = lanes.pop(ALONE, [])
        try:
            self._together(lanes.values())
            self._together([alone])
        finally:
            self._stop()
        return self._report()

    def _together(self, lanes: Iterable[list[Tier]]) -> None:
        threads = [threading.Thread(target=self._one_after_another, args=(lane,)) for lane in lanes]
        for thread in threads:
            thread.start()
        beat = time.monotonic() + BEAT
        for thread in threads:
            while thread.is_alive():
                thread.join(1.0)
                if time.monotonic() >= beat:
                    beat += BEAT
                    self._say(", ".join(f"{name} {self._percent(name)}" for name in sorted(self._running)))

    def _one_after_another(self, tiers: list[Tier]) -> None:
        for tier in tiers:
            self._run_tier(tier)

    def _run_tier(self, tier: Tier) -> None:
        with self._lock:
            if self._stopped:
                return
            self._say(f"{tier.name} starts")
            with tier.log.open("wb") as log:
                process = subprocess.Popen(
                    tier.command,
                    cwd=ROOT,
                    env={**os.environ, **tier.environment},
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,  # Ctrl-C ends it through `_stop`, once
                )
            self._running[tier.name] = process
        if tier.lane == LONGEST:
            go_first(process.pid)
        began = time.monotonic()
        # wait4(2) tells the CPU time of the process and of all its descendants that somebody below it has waited for.
        _, waited, usage = os.wait4(process.pid, 0)
        status = process.returncode = os.waitstatus_to_exitcode(waited)
        tier.seconds = time.monotonic() - began
        tier.cpu = usage.ru_utime + usage.ru_stime
        tier.counts = count(tier.log.read_text(errors="replace"))
        tier.status = status
        with self._lock:
            del self._running[tier.name]
        self._say(f"{tier.name} {tier.failure or 'passed'}: {tier.seconds:.0f} s")

    def _stop(self) -> None:
        """End the running tiers after an interrupt. Each tier removes what it has made, then ends."""
        with self._lock:
            self._stopped = True
            for process in self._running.values():
                with contextlib.suppress(ProcessLookupError):
                    # `send_signal` would reap it, and `wait4` does.
                    os.kill(process.pid, signal.SIGTERM)
        deadline = time.monotonic() + STOP_SECONDS
        while running := list(self._running.values()):
            if time.monotonic() > deadline:
                for process in running:
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(process.pid, signal.SIGKILL)
            time.sleep(0.05)

    def _percent(self, name: str) -> str:
        found = _PERCENT.findall(LOGS.joinpath(f"{name}.log").read_text(errors="replace"))
        return f"{found[-1]} %" if found else "runs"

    def _say(self, text: str) -> None:
        minutes, seconds = divmod(int(time.monotonic() - self._began), 60)
        print(f"{minutes:3}:{seconds:02}  {text}", flush=True)

    def _report(self) -> int:
        """Print failures, second attempts and times. The last line has the form of pytest's last line."""
        counts = sum((tier.counts for tier in self._tiers), Counter[str]())
        failed = [tier for tier in self._tiers if tier.failure]
        for tier in self._tiers:
            text = tier.log.read_text(errors="replace") if tier.log.exists() else ""
            if tier.failure or tier.counts["rerun"]:
                print(f"\n== {tier.name}: {tier.failure or 'passed, with second attempts'} ({tier.log})")
                print(failures(text))
        print(f"\n{'tier':<16}{'seconds':>9}{'CPU':>7}  result")
        for tier in self._tiers:
            shown = ", ".join(
                f"{number} {name}" for name, number in tier.counts.items() if name != "deselected"
            )
            result = f"{tier.failure or 'passed'}{shown and f'  ({shown})'}"
            print(f"{tier.name:<16}{tier.seconds:>9.0f}{tier.cpu:>7.0f}  {result}")
        too_many = counts["rerun"] > RERUNS
        if too_many:
            print(f"{counts['rerun']} tests needed a second attempt; {RERUNS} may")
        seconds = time.monotonic() - self._began
        print(f"make {self._title}: {seconds:.0f} s in all; {'FAILED' if failed or too_many else 'passed'}")
        order = ("failed", "passed", "skipped", "xfailed", "xpassed", "error", "rerun")
        counts["failed"] += 0
        line = ", ".join(
            f"{counts[name]} {name}" for name in order if counts[name] or name in ("failed", "passed")
        )
        print(f"===== {line} in {seconds:.2f}s =====", flush=True)
        return 1 if failed or too_many else 0


def go_first(leader: int) -> None:
    """Raise the scheduling priority of a session above that of all others.

    The kernel shares CPUs between sessions before it looks at `nice` (sched(7), autogroup). A kernel without autogroups
    has no such file; without CAP_SYS_NICE the session stays an equal of the others.
    """
    with contextlib.suppress(FileNotFoundError, PermissionError):
        Path(f"/proc/{leader}/autogroup").write_text("-5")


def count(log: str) -> Counter[str]:
    """Return the counts in pytest's last line, by outcome; their sum if the log is of several runs."""
    counts = Counter[str]()
    for run in log.split(NEXT_RUN):
        found = _SUMMARY.findall(run)
        for part in found[-1].split(", ") if found else []:
            number, name = part.split()
            counts[name.removesuffix("s") if name == "errors" else name] += int(number)
    return counts


def failures(log: str) -> str:
    """Return pytest's report of failures, or the end of the log if there is none."""
    found = _SECTIONS.search(log)
    return log[found.start() :].rstrip() if found else "\n".join(log.splitlines()[-60:])


def main() -> int:
    every = plans()
    parser = argparse.ArgumentParser(prog="python -m tests.run", description="Run tiers of the suite.")
    parser.add_argument("target", choices=every)
    parser.add_argument("tiers", nargs="*", metavar="tier", help="run these tiers only")
    options = parser.parse_args()
    tiers = every[options.target]
    unknown = [name for name in options.tiers if name not in {tier.name for tier in tiers}]
    if unknown:
        parser.error(f"no tier {unknown[0]!r} in {options.target}: {', '.join(tier.name for tier in tiers)}")
    if options.tiers and "CI" in os.environ:
        parser.error("in CI every tier is run")
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _frame: sys.exit(128 + number))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    title = "test-long" if options.target == "long" else options.target
    try:
        return Suite(title, [tier for tier in tiers if not options.tiers or tier.name in options.tiers]).run()
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    raise SystemExit(main())
