"""The example `examples/jobs`: `make demo-jobs`, with fewer jobs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

DEMO = Path(__file__).resolve().parents[2] / "examples" / "jobs" / "photos.py"
RESULTS = {"MemoryLimitExceeded", "PidsLimitExceeded", "TimeLimitExceeded", "ok"}


def test_each_job_ends_as_expected() -> None:
    done = subprocess.run(
        [sys.executable, DEMO, "--jobs", "40"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "every job ended as expected" in done.stdout
    assert "processes of the worker lost: 0; WorkerLostError: 0; left behind: nothing" in done.stdout
    assert {result for result in RESULTS if f" x {result}" in done.stdout} == RESULTS
