"""Find where a process may make its own cgroups while the limits of a group hold for it.

Such a nested instance can only narrow these limits: everything it makes must be inside of the group. The functions
recognise the tree that :class:`~rcon_plugins.tree.instance.Instance` makes (docs/reference/kernel.md).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

from rcon_plugins.kernel import files
from rcon_plugins.kernel.cgroup import mounts
from rcon_plugins.kernel.cgroup.limits import read_limits
from rcon_plugins.kernel.cgroup.resources import Max, Resources
from rcon_plugins.tree.owner import INSTANCE_NAME

if TYPE_CHECKING:
    from rcon_plugins.kernel.cgroup.hierarchy import Hierarchy

#: The leaf for a group's own processes. Instances may be beside it.
MAIN = "main"


class Location(NamedTuple):
    """The location of a process in the cgroup tree.

    ``base`` is the cgroup in which the process may make its own instance; None if there is none. ``boundary`` is the
    group whose limits hold for the process, which may make nothing outside; None if no limits hold.
    """

    base: str | None
    boundary: str | None


def location_of(path: str) -> Location | None:
    """Return the location of a process in the cgroup ``path``; None outside of every instance.

    The base and boundary are:

    - in ``host/``: the base of the server; another instance may be beside the server's
    - in ``work/<group>/main`` or ``attached/<group>/main``: the group, which contains nothing but cgroups
    - in any other leaf, also of an executor process: that leaf, since it has limits of its own
    - in ``host/<group>``, a cgroup of threads: no base, since a process started there cannot make cgroups there
    """
    parts = path.split("/")
    instances = [index for index, part in enumerate(parts) if INSTANCE_NAME.fullmatch(part)]
    if not instances:
        return None
    last = instances[-1]
    inside = parts[last + 1 :]
    if len(inside) <= 1:
        around = "/".join(parts[:last]) or "/"
        return Location(around, around if len(instances) > 1 else None)
    if inside[0] == "host":
        return Location(None, path)
    if len(inside) == 3 and inside[2] == MAIN:
        group = path.removesuffix(f"/{MAIN}")
        return Location(group, group)
    return Location(path, path)


def own_location(hierarchy: Hierarchy) -> Location | None:
    """Return the location of this process, from its paths in all hierarchies; None outside of every instance."""
    own = mounts.parse_membership(files.read_own("cgroup"))
    location = combine_locations(mounts.membership(mount, own) for mount in hierarchy.mounts)
    if location is None or location.base is None or location.base != location.boundary:
        return location
    main = f"{location.base}/{MAIN}"
    here = hierarchy.where(main)
    if here is not None and limits_something(read_limits(here.cgroup(main))):
        # This is a single command with its own limits. They would not hold for a cgroup beside it.
        return Location(main, main)
    return location


def limits_something(resources: Resources, *, but_pids: bool = False) -> bool:
    """Return whether any of these limits, read from a cgroup, is set. ``but_pids``: ignore ``pids_max``."""
    numbers: list[float | Max | None] = [
        resources.cpu_quota, resources.memory_max, resources.memory_high, resources.swap_max
    ]  # fmt: skip
    if not but_pids:
        numbers.append(resources.pids_max)
    return bool(resources.cpus or resources.io) or any(isinstance(number, int | float) for number in numbers)


def combine_locations(paths: Iterable[str | None]) -> Location | None:
    """Return the location of a process from its ``paths``: its cgroup in each hierarchy, or None if invisible there.

    On v1 the paths may differ: for IO, processes below a group stay in the group's own directory, and a thread enters
    only the hierarchies that it needs. The deepest path decides. If it is not inside the group of another hierarchy,
    there is no base.
    """
    locations = {
        path: location for path in paths if path is not None and (location := location_of(path)) is not None
    }
    if not locations:
        return None
    deepest = max(locations, key=lambda path: (path.count("/"), path))
    base, boundary = locations[deepest]
    around = [location.boundary for location in locations.values() if location.boundary is not None]
    if base is not None and not all(is_within(base, group) for group in around):
        base = None
    return Location(base, boundary or max(around, key=len, default=None))


def is_within(path: str, group: str) -> bool:
    """Return whether the cgroup ``path`` is ``group`` or below it."""
    return path == group or path.startswith(f"{group.rstrip('/')}/")
