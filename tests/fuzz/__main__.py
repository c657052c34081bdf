"""Fuzz what reads text and bytes of others: ``python -m tests.fuzz [--inputs N] [--seed N] [TARGET...]``.

Each input is made from a seed of its own, so a failure can be repeated: ``--seed SEED --inputs 1 TARGET``.
"""

from __future__ import annotations

import argparse
import reprlib
import sys
import time
import traceback
from collections.abc import Callable
from random import Random

from tests.fuzz import routing, settings, wire

TARGETS: dict[str, Callable[[Random], bool]] = {
    "settings": lambda random: settings.check(settings.make(random)),
    "wire": wire.small,
    "routing": routing.run,
}
#: One input in so many is a large one, for the target ``decoding``.
_LARGE = 5000
_MOST_FAILURES = 5


def main() -> int:
    """Run the targets; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("targets", nargs="*", choices=[*TARGETS, "decoding", []], default=[])
    parser.add_argument("--inputs", type=int, default=1_050_000, help="inputs of all targets together")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    chosen = options.targets or [*TARGETS, "decoding"]
    plain = [name for name in chosen if name != "decoding"]
    failures = total = 0
    for name in plain:
        began, accepted, count = time.monotonic(), 0, options.inputs // len(plain)
        for seed in range(options.seed, options.seed + count):
            try:
                accepted += TARGETS[name](Random(seed))
            except Exception:
                failures += 1
                print(
                    f"{name}: --seed {seed}: {reprlib.repr(traceback.format_exc()[-600:])}", file=sys.stderr
                )
                if failures >= _MOST_FAILURES:
                    return 1
        total += count
        seconds = time.monotonic() - began
        print(f"{name}: {count} inputs, {accepted} accepted, {seconds:.0f} s", flush=True)
    if "decoding" in chosen:
        costs = wire.Costs()
        for seed in range(options.seed, options.seed + max(20, options.inputs // _LARGE)):
            costs.add(Random(seed))
        total += costs.count
        print(f"decoding: {costs}")
    print(f"{total} inputs, {failures} failures")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
