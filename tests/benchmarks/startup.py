"""Measure how long ``rcon run -- true`` takes, compared with only starting Python."""

from __future__ import annotations

import os
import shutil
import statistics
import sys
import time
from pathlib import Path

#: The aim: at most so many times as long as ``python3 -c pass``.
AIM = 4.0


def measure(rounds: int) -> dict[str, dict[str, float]]:
    """Return median wall and CPU time in seconds, and their multiples of ``python3 -c pass``, measured in turns."""
    script = Path(sys.executable).with_name("rcon")
    commands = {
        "python3 -c pass": [sys.executable, "-c", "pass"],
        "rcon run -- true": [str(script), "run", "--", "true"],
        "rcon run --group": [str(script), "run", "--group", f"bench-{os.getpid()}", "--", "true"],
        "rcon run --user": [str(script), "run", "--user", str(os.geteuid()), "--", "true"],
    }
    if Path("/run/systemd/system").is_dir() and (scope := shutil.which("systemd-run")):
        commands["systemd-run"] = [scope, "--scope", "--quiet", "true"]
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    os.waitpid(os.posix_spawn(script, commands["rcon run -- true"], variables), 0)  # now there is bytecode
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
    for _ in range(rounds):
        for name, words in commands.items():
            began = time.perf_counter()
            pid = os.posix_spawn(words[0], words, variables)
            _, _, used = os.wait4(pid, 0)
            taken[name].append((time.perf_counter() - began, used.ru_utime + used.ru_stime))
    found = {
        name: {"wall": statistics.median(w for w, _ in times), "cpu": statistics.median(c for _, c in times)}
        for name, times in taken.items()
    }
    for row in found.values():
        row["times"] = row["wall"] / found["python3 -c pass"]["wall"]
    return found
