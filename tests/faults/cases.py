"""Which call fails with which errno, in which order; run the cases in several workers; judge each."""

from __future__ import annotations

import contextlib
import copy
import errno
import json
import re
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from queue import Empty, Queue
from typing import Any

from tests.faults.sites import ROOT, all_sites

ERRNOS = (
    errno.EACCES, errno.EBUSY, errno.ENOENT, errno.ENOSPC, errno.EROFS, errno.EMFILE, errno.ENOMEM, errno.EIO,
    errno.EAGAIN,
)  # fmt: skip
#: The names of the scenarios. Those who only start workers do not import what the scenarios need, which is much.
SCENARIOS = ("process", "same_user", "thread", "inline", "changing", "request", "task", "command")
#: These errnos say that something is not for this process, or not there.
REFUSALS = (errno.EACCES, errno.EROFS, errno.ENOENT)
#: These errnos say that something is gone. It is not, so what is left is removed by the next start.
GONE = (errno.ENOENT,)


@dataclass(frozen=True)
class Case:
    """A touch point in a phase of a scenario, and how it fails."""

    scenario: str
    phase: str
    site: str
    role: str
    purpose: str
    errno: int
    persisting: bool = False
    #: Leave out the phases that neither lead to the failing call nor follow it.
    brief: bool = False

    def __str__(self) -> str:
        how = f"{errno.errorcode[self.errno]}{', for a while' if self.persisting else ''}"
        return f"{self.scenario}/{self.phase}: {self.site} ({self.purpose or '-'}) in the {self.role}: {how}"


@dataclass
class Verdict:
    """What became of a case."""

    case: Case
    result: dict[str, Any]
    wrong: list[str] = field(default_factory=list)

    @property
    def fired(self) -> bool:
        """Whether the call was made at all."""
        return bool(self.result["fired"])


class Pool:
    """Some workers, which start when there are cases for them and end with the ``with`` block."""

    def __init__(self, workers: int, log: str = "") -> None:
        self._workers = workers
        self._log = log
        self._idle: list[subprocess.Popen[str]] = []

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._idle:
            _end(worker)

    def run(self, cases: Iterable[tuple[Any, dict[str, Any]]]) -> Iterator[tuple[Any, dict[str, Any]]]:
        """Run cases, each with a name of any kind that comes with its result. Yield the results in any order."""
        waiting: Queue[tuple[Any, dict[str, Any]]] = Queue()
        for one in cases:
            waiting.put(one)
        count = waiting.qsize()
        done: Queue[tuple[Any, dict[str, Any]]] = Queue()
        threads = [
            threading.Thread(target=self._serve, args=(waiting, done), daemon=True)
            for _ in range(min(self._workers, count))
        ]
        for thread in threads:
            thread.start()
        for _ in range(count):
            yield done.get()
        for thread in threads:
            thread.join()

    def _serve(self, waiting: Queue[Any], done: Queue[Any]) -> None:
        worker: subprocess.Popen[str] | None = None
        try:
            while True:
                try:
                    name, case = waiting.get_nowait()
                except Empty:
                    return
                worker = worker or self._take()
                line = _ask(worker, {**case, "log": self._log})
                done.put((name, json.loads(line) if line else _died(case)))
                if not line:
                    _end(worker)
                    worker = None
        finally:
            if worker is not None:
                self._idle.append(worker)

    def _take(self) -> subprocess.Popen[str]:
        """Return a worker of an earlier run, or start one: it takes two seconds of CPU time to load its modules."""
        try:
            return self._idle.pop()
        except IndexError:
            return _start()


def _start() -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.faults.worker"]
    return subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def _end(worker: subprocess.Popen[str]) -> None:
    with contextlib.suppress(BrokenPipeError), worker:  # closes its pipes, and waits for its end
        pass


def _ask(worker: subprocess.Popen[str], case: dict[str, Any]) -> str:
    """Return the answer of a worker; an empty one if it died."""
    assert worker.stdin is not None
    assert worker.stdout is not None
    try:
        worker.stdin.write(json.dumps(case) + "\n")
        worker.stdin.flush()
        return worker.stdout.readline()
    except BrokenPipeError:
        return ""


def _died(case: dict[str, Any]) -> dict[str, Any]:
    return {
        "faults": [f"the worker died: {case}"], "answers": {}, "refusals": [], "said": False, "fired": 1, "seen": {},
        "seconds": 0, "left": {"processes": [], "cgroups": []},
    }  # fmt: skip


@dataclass
class Recording:
    """A run of one scenario in which nothing fails: its touch points by phase, and what the work said."""

    scenario: str
    points: list[tuple[str, str, str, str]]
    #: Those that only one of two runs met, as threads and processes come and go.
    uncertain: set[tuple[str, str, str, str]]
    answers: dict[str, Any]
    problems: list[str]


def record(pool: Pool, scenarios: Iterable[str]) -> dict[str, Recording]:
    """Run each scenario twice without a failure. A touch point counts if it is met in either run."""
    found: dict[str, Recording] = {}
    runs = [(name, {"scenario": name, "recording": True}) for name in scenarios for _ in range(2)]
    for name, result in pool.run(runs):
        points = [tuple(key.split("\t")) for key in result["seen"]]
        problems = [
            *result["refusals"],
            *result["faults"],
            *result["left"]["processes"],
            *result["left"]["cgroups"],
        ]
        if name not in found:
            found[name] = Recording(name, points, set(), result["answers"], problems)
            continue
        one = found[name]
        one.uncertain = {*one.points} ^ {*points}
        one.points = list(dict.fromkeys([*one.points, *points]))
        one.problems += problems
        if one.answers != result["answers"]:
            one.problems.append(f"answers differ: {difference(one.answers, result['answers'])}")
    return {name: found[name] for name in scenarios}


#: A touch point: the call, the kind of process, and for what.
Point = tuple[str, str, str]


def touch_points(recordings: dict[str, Recording]) -> dict[Point, list[tuple[str, str]]]:
    """Return each touch point, with the scenarios and phases that meet it: those that always do, if there are any."""
    always: dict[Point, list[tuple[str, str]]] = {}
    at_times: dict[Point, list[tuple[str, str]]] = {}
    for name, recording in recordings.items():
        for point in recording.points:
            found = at_times if point in recording.uncertain else always
            found.setdefault(point[1:], []).append((name, point[0]))
    return at_times | always


def every_case(
    recordings: dict[str, Recording], *, persisting: bool, seed: int = 0, errnos: int = len(ERRNOS)
) -> list[Case]:
    """Return each touch point with so many errnos. The scenarios and phases that meet it take turns."""
    found = []
    for index, (point, places) in enumerate(touch_points(recordings).items()):
        for turn in range(errnos):
            number = ERRNOS[(index + seed + turn) % len(ERRNOS)]
            place = places[(index + turn * 7 + seed + persisting) % len(places)]
            found.append(Case(*place, *point, number, persisting, brief=True))
    return found


def sample(recordings: dict[str, Recording], seed: int = 0) -> list[Case]:
    """Return one case for each call, with the errnos in turn.

    Which errno, which process, scenario, phase and purpose, and whether it persists, depend on the seed.
    """
    by_call: dict[str, list[Case]] = {}
    for point, places in touch_points(recordings).items():
        by_call.setdefault(point[0], []).extend(Case(*place, *point, 0) for place in places)
    found = []
    for index, cases in enumerate(by_call.values()):
        turn = index + seed
        number, persisting = ERRNOS[turn % len(ERRNOS)], turn // len(ERRNOS) % 8 == 7
        case = cases[(turn * 7919) % len(cases)]
        found.append(replace(case, errno=number, persisting=persisting, brief=not persisting))
    return found


def judge(case: Case, result: dict[str, Any], recordings: dict[str, Recording]) -> Verdict:
    """Return what is wrong with the result of a case."""
    verdict = Verdict(case, result, list(result["faults"]))
    known = copy.deepcopy(recordings[case.scenario].answers)
    known["old"] = known.get("spawn")  # a limit that could not be changed stays as it was
    if case.phase in ("deploy", "start") and case.errno == errno.EACCES and _of_namespaces(case):
        # The answer of a container's filter or of a security module, which counts for all executors. Landlock alone
        # then keeps them from writing to cgroups.
        known = {name: _without_namespaces(answer or {}) for name, answer in known.items()}
        result["answers"] = {name: _without_namespaces(answer) for name, answer in result["answers"].items()}
    if case.phase in ("deploy", "start") and case.errno in REFUSALS:
        # A server that cannot return to its own cgroups moves into its instance. Its threads enter the same ones there.
        known = {name: _without_own_cgroups(answer or {}) for name, answer in known.items()}
        result["answers"] = {name: _without_own_cgroups(answer) for name, answer in result["answers"].items()}
    if case.errno in REFUSALS:
        known = {name: _without_unlimited(answer or {}) for name, answer in known.items()}
        result["answers"] = {name: _without_unlimited(answer) for name, answer in result["answers"].items()}
    if case.errno in GONE and "memory.memsw." in case.purpose:
        # A kernel that does not account for swap, on a machine without any.
        known = {name: _without_swap(answer or {}) for name, answer in known.items()}
        result["answers"] = {name: _without_swap(answer) for name, answer in result["answers"].items()}
    for name, answer in result["answers"].items():
        expected = known.get(name)
        if name == "descriptors":
            more = {kind: n for kind, n in answer.items() if n > (expected or {}).get(kind, 0)}
            if more:
                verdict.wrong.append(f"LEFT descriptors {more}")
        elif answer != expected:
            verdict.wrong.append(f"UNCONFINED {name}: {difference(expected, answer)}")
    if case.site.startswith("kernel.process:open_again:"):
        # A file that cannot be opened again is closed.
        verdict.wrong = [text for text in verdict.wrong if "/read: None" not in text]
    left = result["left"]
    if left["processes"]:
        verdict.wrong.append(f"LEFT processes {left['processes']}")
    if left["cgroups"]:
        if left.get("after"):
            verdict.wrong.append(f"LEFT cgroups, also after the next start: {left['after']}")
        elif not (result["said"] or case.errno in GONE):
            verdict.wrong.append(f"LEFT cgroups, and nothing was said: {left['cgroups'][:3]}")
    return verdict


def _of_namespaces(case: Case) -> bool:
    """Return whether a call makes namespaces or mounts."""
    return any(name in f"{case.site} {case.purpose}" for name in ("unshare", "mount"))


def _without_namespaces(answer: dict[str, Any]) -> dict[str, Any]:
    """Leave out the namespaces, and with which error the kernel refuses to write to cgroups."""
    if "ways" not in answer:
        return answer
    ways = {name: "EACCES" if way == "EROFS" else way for name, way in answer["ways"].items()}
    return {**{key: value for key, value in answer.items() if key != "namespaces"}, "ways": ways}


def _without_own_cgroups(answer: dict[str, Any]) -> dict[str, Any]:
    """Leave out the cgroups of a thread that are those of the server, where the policy has no limit."""
    if "cgroups" not in answer:
        return answer
    kept = {name: path for name, path in answer["cgroups"].items() if re.search("/(work|host)/", path)}
    return {
        **answer,
        "cgroups": kept,
        "limits": {name: text for name, text in answer["limits"].items() if name.partition(" ")[0] in kept},
        "ways": {name: way for name, way in answer["ways"].items() if name.partition(":")[0] in kept},
    }


def _without_unlimited(answer: dict[str, Any]) -> dict[str, Any]:
    """Leave out the hierarchies without limits, which a server may be refused: the v2 side of a hybrid, and cpuacct."""
    cgroups = answer.get("cgroups", {})
    unlimited = {"", "cpuacct"} & cgroups.keys()
    if len(cgroups) <= len(unlimited):
        return answer
    ways = {
        name: way for name, way in answer.get("ways", {}).items() if name.partition(":")[0] not in unlimited
    }
    kept = {name: path for name, path in cgroups.items() if name not in unlimited}
    return {**answer, "cgroups": kept, "ways": ways}


def _without_swap(answer: dict[str, Any]) -> dict[str, Any]:
    """Leave out the limits of memory and swap together."""
    if "limits" not in answer:
        return answer
    return {
        **answer,
        "limits": {name: text for name, text in answer["limits"].items() if "memory.memsw." not in name},
    }


def difference(expected: Any, found: Any) -> str:
    """Return where two answers differ."""
    if isinstance(expected, dict) and isinstance(found, dict):
        parts = [
            f"{key}: {difference(expected.get(key), found.get(key))}"
            for key in sorted({*expected, *found})
            if expected.get(key) != found.get(key)
        ]
        return "{" + ", ".join(parts) + "}"
    return f"{found!r}, not {expected!r}"


def run(
    pool: Pool,
    cases: list[Case],
    recordings: dict[str, Recording],
    tell: Callable[[Verdict], None] = lambda _: None,
) -> list[Verdict]:
    """Run and judge cases."""
    verdicts = []
    for case, result in pool.run([(case, vars(case).copy()) for case in cases]):
        verdict = judge(case, result, recordings)
        tell(verdict)
        verdicts.append(verdict)
    return verdicts


def untouched(recordings: dict[str, Recording]) -> list[str]:
    """Return the calls in the source that no scenario meets."""
    met = {point[1] for recording in recordings.values() for point in recording.points}
    return [str(site) for site in all_sites() if str(site) not in met]


def figures(verdicts: list[Verdict]) -> str:
    """Return a line of figures."""
    wrong = [text for verdict in verdicts for text in verdict.wrong]
    kinds = Counter(
        "unconfined"
        if "UNCONFINED" in text
        else "left"
        if "LEFT" in text
        else "hangs"
        if "hang" in text
        else "other"
        for text in wrong
    )
    fired = sum(verdict.fired for verdict in verdicts)
    refused = sum(bool(verdict.result["refusals"]) for verdict in verdicts)
    return (
        f"{len(verdicts)} cases, {fired} failed a call, {refused} with a refusal; "
        f"{kinds['unconfined']} unconfined, {kinds['hangs']} hangs, {kinds['left']} leftovers, {kinds['other']} other"
    )
