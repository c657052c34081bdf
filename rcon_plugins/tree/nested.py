"""Inside of a group that holds a process to limits: where its own groups may be. The inner can only narrow.

The tree recognised here is the one that :class:`~rcon_plugins.tree.instance.Instance` makes (docs/reference/kernel.md).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

from rcon_plugins.kernel import files
from rcon_plugins.kernel.cgroup import mounts
from rcon_plugins.kernel.cgroup.limits import read_limits
from rcon_plugins.kernel.cgroup.resources import Max, Resources
from rcon_plugins.tree.survey import INSTANCE_NAME

if TYPE_CHECKING:
    from rcon_plugins.kernel.cgroup.hierarchy import Hierarchy

#: In a group that is made to have others beside it: where its own processes are.
MAIN = "main"


class Place(NamedTuple):
    """What the path of a process inside of an instance says.

    ``base`` is where a tree of its own may be: None where that cannot be anywhere. ``boundary`` is the
    group whose limits hold for the process: nothing it makes may be outside. None: it has no limits.
    """

    base: str | None
    boundary: str | None


def place_of(path: str) -> Place | None:
    """The place of a process that is in the cgroup ``path``; None outside of any instance.

    - in ``host/``: the server's own, beside whose tree another may be
    - in ``work/<group>/main`` or ``taken/<group>/main``: the group, which has nothing in it but cgroups
    - in any other leaf, that of an executor too: that leaf, as its limits are its own
    - in ``host/<group>``: threads; a process that one of them started cannot have a tree there
    """
    parts = path.split("/")
    instances = [index for index, part in enumerate(parts) if INSTANCE_NAME.fullmatch(part)]
    if not instances:
        return None
    last = instances[-1]
    inside = parts[last + 1 :]
    if len(inside) <= 1:
        around = "/".join(parts[:last]) or "/"
        return Place(around, around if len(instances) > 1 else None)
    if inside[0] == "host":
        return Place(None, path)
    if len(inside) == 3 and inside[2] == MAIN:
        group = path.removesuffix(f"/{MAIN}")
        return Place(group, group)
    return Place(path, path)


def own_place(hierarchy: Hierarchy) -> Place | None:
    """The place of this process, by its paths in all hierarchies; None outside of any instance."""
    own = mounts.parse_membership(files.read_own("cgroup"))
    place = place_among(mounts.membership(mount, own) for mount in hierarchy.mounts)
    if place is None or place.base is None or place.base != place.boundary:
        return place
    main = f"{place.base}/{MAIN}"
    here = hierarchy.where(main)
    if here is not None and limits_something(read_limits(here.cgroup(main))):
        # The limits of a single command beside those of its group: they would not hold beside it.
        return Place(main, main)
    return place


def limits_something(resources: Resources, *, but_pids: bool = False) -> bool:
    """Whether these limits, read from a cgroup, hold anything back (``but_pids``: but the number of processes)."""
    numbers: list[float | Max | None] = [
        resources.cpu_quota, resources.memory_max, resources.memory_high, resources.swap_max
    ]  # fmt: skip
    if not but_pids:
        numbers.append(resources.pids_max)
    return bool(resources.cpus or resources.io) or any(isinstance(number, int | float) for number in numbers)


def place_among(paths: Iterable[str | None]) -> Place | None:
    """The place of a process that is in these cgroups, one for each hierarchy; None: it cannot be seen there.

    On v1 they may differ: for IO a group's own directory stands for those below it, and a thread enters
    only the hierarchies it has to. The deepest decides; where it is not inside of the group that another
    hierarchy names, there is no base.
    """
    places = {path: place for path in paths if path is not None and (place := place_of(path)) is not None}
    if not places:
        return None
    deepest = max(places, key=lambda path: (path.count("/"), path))
    base, boundary = places[deepest]
    around = [place.boundary for place in places.values() if place.boundary is not None]
    if base is not None and not all(is_within(base, group) for group in around):
        base = None
    return Place(base, boundary or max(around, key=len, default=None))


def is_within(path: str, group: str) -> bool:
    """Whether the cgroup ``path`` is ``group`` or below it."""
    return path == group or path.startswith(f"{group.rstrip('/')}/")
