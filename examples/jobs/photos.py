"""Run two hundred jobs of a photo service, one in five of them harmful, on one confined worker: ``make demo-jobs``.

Starts a redis-server and a Celery worker, sends the jobs, and writes a table of how each kind ended and what it used.
Exits with 0 if every job ended as expected, with 1 if not, with 2 if the demonstration cannot start.
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
from typing import TYPE_CHECKING, Any, NoReturn

sys.path.insert(0, str(Path(__file__).parent))

from inputs import Inputs, Job
from report import Row, say, write
from servers import PROCESSES, CannotStart, Redis, Worker

if TYPE_CHECKING:
    from celery import Celery

#: How long all jobs together may take, seconds.
PATIENCE = 180.0


def main() -> int:
    """Run the demonstration."""
    parser = argparse.ArgumentParser(description="Two hundred jobs on one confined Celery worker.")
    parser.add_argument(
        "--jobs", type=int, default=200, help="about how many jobs to send (default: %(default)s)"
    )
    options = parser.parse_args()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupted)
    try:
        with contextlib.ExitStack() as stack:
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="photos-")))
            say("making pictures, starting a redis-server and a worker …")
            inputs = stack.enter_context(contextlib.closing(Inputs(directory)))
            redis = stack.enter_context(contextlib.closing(Redis(directory)))
            os.environ["PHOTOS_REDIS"] = redis.url
            worker = Worker(directory)
            stack.callback(worker.stop)
            worker.wait_until_ready()
            from tasks import app  # it reads PHOTOS_REDIS

            stack.callback(app.close)
            return demonstrate(app, inputs.jobs(options.jobs / 200), worker)
    except CannotStart as error:
        say(str(error))
        return 2
    except KeyboardInterrupt:
        say("\ninterrupted")
        return 130


def demonstrate(app: Celery, jobs: list[Job], worker: Worker) -> int:
    """Send the jobs, wait for them, and write the table; return the exit status."""
    children = worker.children()
    began = time.monotonic()
    sent = [(job, app.tasks[f"photos.{job.task}"].delay(*job.arguments)) for job in jobs]
    wait([result for _, result in sent], began)
    seconds = time.monotonic() - began
    rows = [row for row in gather(sent) if row.count]
    replaced = len(set(children) - set(worker.children()))
    lost = worker.log().count("WorkerLostError")
    status = worker.stop()
    left = worker.left_behind()
    write(rows, sys.stdout)
    print(f"\n  {len(jobs)} jobs in {seconds:.0f} s on one worker with {PROCESSES} processes", flush=True)
    print(
        f"  processes of the worker lost: {replaced}; WorkerLostError: {lost}; left behind: {left or 'nothing'}"
    )
    good = all(row.as_expected for row in rows) and not replaced and not lost and not left and status == 0
    print("  every job ended as expected" if good else "  not as expected: see the lines with ✗", flush=True)
    return 0 if good else 1


def wait(results: list[Any], began: float) -> None:
    """Show the progress until all jobs ended: as a bar on a terminal, else as a line for each quarter."""
    shown, moves = -1, sys.stderr.isatty()
    while time.monotonic() - began < PATIENCE:
        ended = sum(result.ready() for result in results)
        steps = ended if moves else 4 * ended // len(results)
        if steps != shown:
            shown = steps
            line = f"  {'█' * (30 * ended // len(results)):30}  {ended} of {len(results)} jobs"
            print(f"\r{line}" if moves else line, end="" if moves else "\n", file=sys.stderr, flush=True)
        if ended == len(results):
            break
        time.sleep(0.2)
    if moves:
        print(file=sys.stderr)


def gather(sent: list[tuple[Job, Any]]) -> list[Row]:
    """Return a row for each kind of job, harmless ones first."""
    from rcon_celery import outcome_of

    rows: dict[tuple[str, str, str], Row] = {}
    for job, result in sent:
        row = rows.setdefault((job.task, job.input, job.expected), Row(job.task, job.input, job.expected))
        outcome = outcome_of(result)
        ended = "ok" if result.state == "SUCCESS" else type(result.result).__name__
        row.add(ended if result.ready() else "still running", outcome.usage if outcome is not None else None)
    return sorted(rows.values(), key=lambda row: (row.expected != "ok", row.task))


def _interrupted(*_: object) -> NoReturn:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
