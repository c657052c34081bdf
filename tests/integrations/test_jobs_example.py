"""The example `examples/jobs`: `make demo-jobs`, with fewer jobs."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

DEMO = Path(__file__).resolve().parents[2] / "examples" / "jobs" / "photos.py"
RESULTS = {"MemoryLimitExceeded", "PidsLimitExceeded", "TimeLimitExceeded", "ok"}


@pytest.mark.timeout(240)  # two halves
def test_each_job_ends_as_expected() -> None:
    done = subprocess.run(
        [sys.executable, DEMO, "--jobs", "40"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=220,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    first, _, second = done.stdout.partition("Without confinement")
    unconfined = re.search(r"^  (\d+) of (\d+) harmless jobs were done", second, re.MULTILINE)
    assert unconfined
    assert int(unconfined[1]) < int(unconfined[2])
    assert "not ended" in first
    assert "Exception ignored" not in done.stderr
    assert "every job ended as expected" in done.stdout
    assert "processes of the worker lost: 0; WorkerLostError: 0; left behind: nothing" in done.stdout
    assert {result for result in RESULTS if f" x {result}" in done.stdout} == RESULTS
