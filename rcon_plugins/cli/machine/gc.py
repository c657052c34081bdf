"""``rcon gc``: remove the cgroups of dead owners."""

from __future__ import annotations

import json

from rcon_plugins.cli.exit import BadUsage
from rcon_plugins.errors import on_one_line
from rcon_plugins.kernel.cgroup import Hierarchy
from rcon_plugins.kernel.cgroup.branch import check_path
from rcon_plugins.tree import runtime
from rcon_plugins.tree.garbage import Collected, Garbage, collect_garbage, find_garbage


def gc(below: str, dry_run: bool, as_json: bool, *, unknown: bool = False) -> tuple[str, bool]:
    """Return a line for each tree of a dead or unknown owner, or JSON, and whether no dead owner's is left.

    ``unknown``: remove also the trees of unknown owners, if they have no process. Raises `KernelError`.
    """
    hierarchy = Hierarchy.discover()
    try:
        check_path(below)
    except ValueError as error:
        raise BadUsage(f"--below: {error} (for example /rcon)") from error
    if dry_run:
        garbage = find_garbage(hierarchy, below)
        trees = [{**tree._asdict(), "message": _plan(tree, unknown=unknown)} for tree in garbage]
        good = not any(tree.stays for tree in garbage)
    else:
        runtime.collect()
        done = collect_garbage(hierarchy, below, unknown=unknown)
        trees = [
            {"path": one.path, "removed": one.removed, "state": one.state, "message": one.message}
            for one in done
        ]
        good = all(one.removed or one.state == "unknown_owner" for one in done)
    if as_json:
        return json.dumps({"good": good, "dry_run": dry_run, "trees": trees}, indent=2), good
    # The user of a group chooses the names of the cgroups below it.
    return "\n".join(on_one_line(f"{tree['path']}: {tree['message']}") for tree in trees), good


def _plan(tree: Garbage, *, unknown: bool) -> str:
    """Return what `collect_garbage` would do, in words."""
    if not tree.known:
        if not unknown:
            return f"would be {Collected(tree.path, 'unknown_owner').message}"
        if tree.unseen:
            return f"would be {Collected(tree.path, 'unseen').message}"
        if tree.in_use:
            return f"would be {Collected(tree.path, 'in_use', tuple(tree.in_use)).message}"
        return "it is unknown whether its owner lives, and it has no process: would remove it"
    dead = f"its owner {tree.pid} is dead"
    if tree.unseen:
        return f"{dead}; would be {Collected(tree.path, 'unseen').message}"
    steps = []
    if tree.work:
        steps.append(f"kill {_processes(tree.work)}")
    if tree.other_uid is not None:
        kept = f"would be {Collected(tree.path, 'other_user', uid=tree.other_uid).message}"
        return "; ".join([dead, *(f"would {step}" for step in steps), kept])
    if tree.attached:
        steps.append(f"move {_processes(tree.attached)} back")
    if tree.host:
        steps.append(f"keep it for its server's own {_processes(tree.host)}")
    else:
        steps.append("remove it")
    return f"{dead}: would {', '.join(steps)}"


def _processes(pids: list[int]) -> str:
    return f"{'process' if len(pids) == 1 else 'processes'} {' '.join(map(str, pids))}"
