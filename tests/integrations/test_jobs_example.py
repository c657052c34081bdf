"""The example of a photo service: `make demo-jobs`, with fewer jobs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

DEMO = Path(__file__).resolve().parents[2] / "examples" / "jobs" / "photos.py"
ENDINGS = {"MemoryLimitExceeded", "PidsLimitExceeded", "TimeLimitExceeded", "ok"}


def test_each_job_ends_as_it_should() -> None:
    done = subprocess.run(
        [sys.executable, DEMO, "--jobs", "40"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "every job ended as it should" in done.stdout
    assert "pool processes replaced: 0; WorkerLostError: 0; left behind: nothing" in done.stdout
    assert {ending for ending in ENDINGS if f" x {ending}" in done.stdout} == ENDINGS
