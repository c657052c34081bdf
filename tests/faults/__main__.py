"""Let kernel calls fail, and print what became of the work: ``python -m tests.faults [--all] [SCENARIO...]``."""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter

from tests.faults import cases
from tests.faults.cases import SCENARIOS

#: Print a line after so many cases.
PROGRESS = 500


def main() -> int:
    """Run cases; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("scenarios", nargs="*", choices=[*SCENARIOS, []], default=[])
    parser.add_argument("--all", action="store_true", help="each touch point with each errno")
    parser.add_argument(
        "--persisting", action="store_true", help="with --all: the call fails for three seconds, not once"
    )
    parser.add_argument(
        "--errnos", type=int, default=len(cases.ERRNOS), help="with --all: so many errnos in turn"
    )
    parser.add_argument("--seed", type=int, default=0, help="another sample")
    parser.add_argument("--workers", type=int, default=6)
    parser.add_argument("--only", default="", help="touch points whose text contains this")
    parser.add_argument(
        "--points", action="store_true", help="print the touch points, and the calls that none meets"
    )
    parser.add_argument("--log", default="", help="a file for what the servers write")
    options = parser.parse_args()
    with cases.Pool(options.workers, options.log) as pool:
        return run(pool, options)


def run(pool: cases.Pool, options: argparse.Namespace) -> int:
    """Run the cases that the options name, and print what is wrong."""
    recordings = cases.record(pool, options.scenarios or SCENARIOS)
    for recording in recordings.values():
        if recording.problems:
            print(f"{recording.scenario}, nothing failing: {recording.problems}")
    points = cases.touch_points(recordings)
    print(f"{len({site for site, _, _ in points})} calls, {len(points)} touch points", flush=True)
    if options.points:
        for recording in recordings.values():
            print(*("\t".join((recording.scenario, *point)) for point in recording.points), sep="\n")
        print("never met:", *cases.untouched(recordings), sep="\n  ")
        return 0
    chosen = cases.sample(recordings, options.seed)
    if options.all:
        chosen = cases.every_case(
            recordings, persisting=options.persisting, seed=options.seed, errnos=options.errnos
        )
    chosen = [case for case in chosen if options.only in str(case)]
    began = time.monotonic()
    kinds: Counter[str] = Counter()
    judged = 0

    def tell(verdict: cases.Verdict) -> None:
        nonlocal judged
        judged += 1
        if judged % PROGRESS == 0:
            print(f"{judged} of {len(chosen)} cases, {time.monotonic() - began:.0f} s", flush=True)
        if verdict.wrong:
            print(f"{verdict.case}\n    {verdict.wrong}\n    {verdict.result['refusals']}", flush=True)

    verdicts = cases.run(pool, chosen, recordings, tell)
    kinds.update(verdict.case.scenario for verdict in verdicts)
    print(", ".join(f"{name} {number}" for name, number in kinds.items()))
    print(f"{cases.figures(verdicts)}; {time.monotonic() - began:.0f} s")
    return 1 if any(verdict.wrong for verdict in verdicts) else 0


if __name__ == "__main__":
    sys.exit(main())
