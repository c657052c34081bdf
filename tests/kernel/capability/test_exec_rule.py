"""Compare the execve rule with the kernel itself, on random states and files. No difference is allowed."""

from __future__ import annotations

import contextlib
import errno
import os
import pickle
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import pytest

from rcon_plugins.kernel.capability import SECBIT_NOROOT
from rcon_plugins.kernel.capability.exec_rule import Prediction, predict
from tests.kernel.capability.executions import Execution

ROOT = Path(__file__).resolve().parents[3]
COUNT = int(os.environ.get("RCON_TEST_EXECUTIONS", "2000"))
PROCESSES = 2


@pytest.fixture(scope="module")
def executions() -> list[Execution]:
    """Return the kernel's results on random states and files. The seed is printed, and can be given."""
    seed = int(os.environ.get("RCON_TEST_SEED", time.time_ns() % 10**9))
    print(f"RCON_TEST_SEED={seed}")
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as directory, contextlib.ExitStack() as running:
        Path(directory).chmod(0o755)  # so that every user may execute the files in it
        started = []
        for number in range(PROCESSES):
            folder = Path(directory, str(number))
            folder.mkdir(mode=0o755)
            command = [sys.executable, "-m", "tests.kernel.capability.executions"]
            arguments = [str(folder), str(seed + number), str(-(-COUNT // PROCESSES))]
            process = subprocess.Popen([*command, *arguments], cwd=ROOT, stdout=subprocess.PIPE)
            started.append(running.enter_context(process))
        answers = [process.communicate()[0] for process in started]
        assert [process.returncode for process in started] == [0] * PROCESSES
    found = [Execution(*one) for answer in answers for one in pickle.loads(answer)]
    print(f"{len(found)} executions in {time.monotonic() - began:.0f} s")
    return found


@pytest.mark.smoke
def test_the_rule_agrees_with_the_kernel(executions: list[Execution]) -> None:
    assert len(executions) >= 2000
    wrong = [text for one in executions if (text := disagreement(one))]
    met = kinds(executions)
    print(f"{len(wrong)} disagreements; {met}")
    assert wrong == []
    # The random cases must reach all parts of the rule, otherwise agreement proves little.
    assert min(met.values()) >= 10, met


def test_the_running_kernel_follows_the_rule_of_its_version(executions: list[Execution]) -> None:
    """Some cases differ between the two rules, and all of them follow the rule of the running kernel."""
    older, newer = (6, 16), (6, 17)
    telling = [
        one
        for one in executions
        if predict(one.before, one.file, kernel=older).state
        != predict(one.before, one.file, kernel=newer).state
    ]
    print(f"{len(telling)} executions tell the rules of 6.16 and 6.17 apart")
    assert len(telling) >= 10
    release = tuple(int(part) for part in os.uname().release.split(".")[:2])
    rule = newer if release >= newer else older
    assert [one for one in telling if predict(one.before, one.file, kernel=rule).state != one.after] == []


def disagreement(one: Execution) -> str:
    prediction = predict(one.before, one.file)
    if prediction.error != one.error:
        return f"errno {prediction.error} predicted, {one.error} found, of {one}"
    if one.after is None or prediction.state == one.after:
        return ""
    fields = [
        f"{name} {p} predicted, {a} found"
        for name, p, a in zip(one.after._fields, prediction.state, one.after, strict=True)
        if p != a
    ]
    return f"{'; '.join(fields)}, of {one}, by {prediction.steps}"


def kinds(found: list[Execution]) -> Counter[str]:
    """Return how often each interesting case occurred."""
    counted: Counter[str] = Counter()
    for one in found:
        before, file, after = one.before, one.file, one.after
        prediction = predict(before, file)
        counted.update(
            {
                "refused": one.error == errno.EPERM,
                "nosuid": file.nosuid and file.privileged,
                "script": bool(file.scripts),
                "script of a script": len(file.scripts) > 1,
                "file of another namespace": bool(file.capabilities and file.capabilities.rootid),
                "SECBIT_NOROOT": bool((before.securebits or 0) & SECBIT_NOROOT)
                and before.uids.effective == 0,
                "no_new_privs": said(prediction, "no_new_privs"),
                "mandatory locking": said(prediction, "mandatory locking"),
                "setuid root with capabilities": said(prediction, "set-user-ID-root programs"),
                "only the real uid is 0": said(prediction, "the real uid is 0"),
                "ambient kept": bool(after and after.ambient),
                "ambient lost": bool(before.ambient and after and not after.ambient),
                "gained": bool(after and after.permitted - before.permitted),
                "ids changed": bool(after and after.uids.effective != before.uids.effective),
            }
        )
    return counted


def said(prediction: Prediction, words: str) -> bool:
    return any(words in step.why for step in prediction.steps)


def test_each_change_has_a_step_with_a_reason(executions: list[Execution]) -> None:
    for one in executions:
        prediction = predict(one.before, one.file)
        assert all(step.what and step.why for step in prediction.steps)
        if one.before != prediction.state or prediction.error is not None:
            assert prediction.steps, one
