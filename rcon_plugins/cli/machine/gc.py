"""``rcon gc``: the lines it prints."""

from __future__ import annotations

import json

from rcon_plugins.cli.exit import BAD_USAGE, Refused
from rcon_plugins.kernel.cgroup import Hierarchy
from rcon_plugins.kernel.cgroup.branch import check_path
from rcon_plugins.tree import leftovers
from rcon_plugins.tree.dead import UNSEEN, taken_by
from rcon_plugins.tree.leftovers import Left


def gc(below: str, dry_run: bool, as_json: bool) -> tuple[str, bool]:
    """A line for each tree of a dead owner, or JSON, and whether none is left. Raises `KernelError`."""
    hierarchy = Hierarchy.discover()
    try:
        check_path(below)
    except ValueError as error:
        raise Refused(f"--below: {error} (below the mounts, such as /rcon)", BAD_USAGE) from error
    if dry_run:
        left = leftovers.find(hierarchy, below)
        told = [{**one._asdict(), "said": _would(one)} for one in left]
        good = not any(one.stays for one in left)
    else:
        done = leftovers.remove(hierarchy, below)
        told = [one._asdict() for one in done]
        good = all(one.removed for one in done)
    if as_json:
        return json.dumps({"good": good, "dry_run": dry_run, "trees": told}, indent=2), good
    return "\n".join(f"{one['path']}: {one['said']}" for one in told), good


def _would(left: Left) -> str:
    """What would be done, in words."""
    dead = f"its owner {left.pid} is dead"
    if left.unseen:
        return f"{dead}: would be {UNSEEN}"
    parts = []
    if left.work:
        parts.append(f"kill {_processes(left.work)}")
    if left.stranger is not None:
        parts.append(f"be {taken_by(left.stranger)}")
        return f"{dead}: would {', then '.join(parts)}"
    if left.taken:
        parts.append(f"put {_processes(left.taken)} back")
    if left.host:
        parts.append(f"leave it for its server's own {_processes(left.host)}")
    else:
        parts.append("remove it")
    return f"{dead}: would {', '.join(parts)}"


def _processes(pids: list[int]) -> str:
    return f"{'process' if len(pids) == 1 else 'processes'} {' '.join(map(str, pids))}"
