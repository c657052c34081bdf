"""Run two hundred jobs of a photo service, one in five of them harmful, on one Celery worker: ``make demo-jobs``.

First without confinement, with one limit around the whole worker; then with the limits of each task. Each time it
starts a redis-server and a worker, sends the jobs, and writes a table of how each kind ended and what it used. Exits
with 0 if every confined job ended as expected, with 1 if not, with 2 if the demonstration cannot start.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

sys.path.insert(0, str(Path(__file__).parent))

from inputs import Inputs, Job
from report import Row, say, write
from servers import PROCESSES, WHOLE, CannotStart, Redis, Worker

#: How long all jobs together may take, seconds.
PATIENCE = 180.0
#: Without confinement: when no job has ended for so long, all processes are stuck, seconds.
STUCK = 6.0


def main() -> int:
    """Run the demonstration."""
    parser = argparse.ArgumentParser(
        description="Two hundred jobs on one Celery worker, unconfined and confined."
    )
    parser.add_argument(
        "--jobs", type=int, default=200, help="about how many jobs to send (default: %(default)s)"
    )
    parser.add_argument("--only-confined", action="store_true", help="leave out the half without confinement")
    options = parser.parse_args()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupted)
    try:
        with contextlib.ExitStack() as stack:
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="photos-")))
            say("making pictures, starting a redis-server …")
            inputs = stack.enter_context(contextlib.closing(Inputs(directory)))
            jobs = inputs.jobs(options.jobs / 200)
            if not options.only_confined:
                show_unconfined(run(jobs, directory, confined=False))
            return show_confined(run(jobs, directory, confined=True))
    except CannotStart as error:
        say(str(error))
        return 2
    except KeyboardInterrupt:
        say("\ninterrupted")
        return 130


class Half(NamedTuple):
    """What one half of the demonstration measured."""

    rows: list[Row]
    seconds: float
    #: The processes of the worker's pool that ended meanwhile.
    replaced: int
    lost: int
    #: The processes and cgroups that the worker left; empty if none.
    left: str
    status: int


def run(jobs: list[Job], directory: Path, *, confined: bool) -> Half:
    """Send the jobs to a new worker, wait for them, and end it. Raises `CannotStart`."""
    with contextlib.ExitStack() as stack:
        redis = stack.enter_context(contextlib.closing(Redis(directory)))
        os.environ["PHOTOS_REDIS"] = redis.url
        say(f"starting a worker {'with' if confined else 'without'} confinement …")
        worker = Worker(directory, confined=confined)
        stack.callback(worker.stop)
        worker.wait_until_ready()
        from tasks import app  # it reads PHOTOS_REDIS

        stack.callback(app.close)
        children = worker.children()
        began = time.monotonic()
        sent = [(job, app.tasks[f"photos.{job.task}"].delay(*job.arguments)) for job in jobs]
        ended = wait([result for _, result in sent], PATIENCE if confined else STUCK)
        seconds = ended - began
        rows = [row for row in gather(sent) if row.count]
        sent.clear()  # Celery tells the server of each result that is no longer waited for
        replaced = len(set(children) - set(worker.children()))
        lost = worker.log().count("WorkerLostError")
        status = worker.stop()
        return Half(rows, seconds, replaced, lost, worker.left_behind(), status)


def show_unconfined(half: Half) -> None:
    """Write what became of the jobs without confinement."""
    write(half.rows, sys.stdout)
    harmless = [row for row in half.rows if row.expected == "ok"]
    done, all_of_them = sum(row.results["ok"] for row in harmless), sum(row.count for row in harmless)
    limits = ", ".join(f"{name} {value}" for name, value in WHOLE.items())
    print(f"\n  Without confinement, on one worker with {PROCESSES} processes, all of it within {limits}:")
    print(f"  {done} of {all_of_them} harmless jobs were done in {half.seconds:.0f} s")
    print(f"  processes of the worker lost: {half.replaced}; WorkerLostError: {half.lost}\n", flush=True)


def show_confined(half: Half) -> int:
    """Write what became of the confined jobs; return the exit status."""
    write(half.rows, sys.stdout)
    jobs = sum(row.count for row in half.rows)
    print(f"\n  Confined: {jobs} jobs in {half.seconds:.0f} s on one worker with {PROCESSES} processes")
    left = half.left or "nothing"
    print(
        f"  processes of the worker lost: {half.replaced}; WorkerLostError: {half.lost}; left behind: {left}"
    )
    expected = all(row.as_expected for row in half.rows)
    good = expected and not (half.replaced or half.lost or half.left or half.status)
    print("  every job ended as expected" if good else "  not as expected: see the lines with ✗", flush=True)
    return 0 if good else 1


def wait(results: list[Any], stuck: float) -> float:
    """Show the progress until all jobs ended, or none has for so many seconds. Return when the last one ended.

    On a terminal as a bar, else as a line for each quarter.
    """
    shown, last, moves = -1, 0, sys.stderr.isatty()
    end = began = time.monotonic()
    while last < len(results) and time.monotonic() < min(end + stuck, began + PATIENCE):
        ended = sum(result.ready() for result in results)
        if ended != last:
            last, end = ended, time.monotonic()
        steps = ended if moves else 4 * ended // len(results)
        if steps != shown:
            shown = steps
            line = f"  {'█' * (30 * ended // len(results)):30}  {ended} of {len(results)} jobs"
            print(f"\r{line}" if moves else line, end="" if moves else "\n", file=sys.stderr, flush=True)
        time.sleep(0.2)
    if moves:
        print(file=sys.stderr)
    return end


def gather(sent: list[tuple[Job, Any]]) -> list[Row]:
    """Return a row for each kind of job, harmless ones first."""
    from rcon_celery import outcome_of

    rows: dict[tuple[str, str, str], Row] = {}
    for job, result in sent:
        row = rows.setdefault((job.task, job.input, job.expected), Row(job.task, job.input, job.expected))
        outcome = outcome_of(result)
        ended = "ok" if result.state == "SUCCESS" else type(result.result).__name__
        row.add(ended if result.ready() else "not ended", outcome.usage if outcome is not None else None)
    return sorted(rows.values(), key=lambda row: (row.expected != "ok", row.task))


def _interrupted(*_: object) -> NoReturn:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
