"""Eight tenants, each with a uid of its own: what the tests of identity have in common."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

TENANTS = {f"tenant{number}": 61001 + number for number in range(8)}
NOTHING = {"CapInh": 0, "CapPrm": 0, "CapEff": 0, "CapBnd": 0, "CapAmb": 0}

_SETTINGS = """
[policy.free]
pids = 64
isolation = "process"

[policy.tenant]
per = "host"
user = "owner:{homes}/{{host}}"
isolation = "{isolation}"
pids = 64

[[route]]
path = "/free/**"
policy = "free"

[[route]]
policy = "tenant"
"""


def settings(homes: Path, isolation: str) -> str:
    """A policy for the tenants, by the owner of their directories, and one without identity below ``/free``."""
    return _SETTINGS.format(homes=homes, isolation=isolation)


def ids(task: Path) -> str:
    """Who a process or thread is, and what it may do, in the kernel's own words."""
    lines = (task / "status").read_text().splitlines()
    wanted = ("Uid", "Gid", "Groups", "Cap", "NoNewPrivs")
    return "\n".join(line for line in lines if line.startswith(wanted))


def is_right(body: bytes, uid: int) -> bool:
    """Whether each line of an answer tells that it was written as this tenant, without any capability."""
    expected = {"uids": [uid] * 4, "gids": [uid] * 4, "groups": [], "no_new_privs": True, **NOTHING}
    told: list[dict[str, Any]] = [json.loads(line) for line in body.splitlines()]
    return bool(told) and all(state == expected for state in told)
