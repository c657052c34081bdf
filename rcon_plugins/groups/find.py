"""Groups as commands see them: what is confined on this machine, by whom, within which limits, and what it uses.

A group is ``work/<name>``, ``host/<name>`` or ``attached/<name>`` of any instance in the visible cgroup tree: of a
server, of a command, of a program with ``with confine(…)``; nested ones too, and other users' as far as they can be
read. All of it is looked up when asked; nothing is kept.
"""

from __future__ import annotations

import difflib
import errno
import re
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

from rcon_plugins.errors import KernelError, UnknownGroup
from rcon_plugins.kernel import proc
from rcon_plugins.kernel.cgroup import Cgroup, Hierarchy, Reading, Resources, read_limits
from rcon_plugins.kernel.cgroup.statistics import (
    Pressure,
    Statistics,
    is_frozen,
    read_pressure,
    read_statistics,
    read_usage,
)
from rcon_plugins.kernel.proc import Process
from rcon_plugins.tree.survey import INSTANCE_NAME, survey

#: ``work``: processes that end with the instance. ``host``: threads of the server itself. ``attached``: processes that
#: ran before, and are moved back in the end.
Kind = Literal["work", "host", "attached"]

#: The leaf in which a command runs, beside which there may be instances within (see docs/reference/kernel.md).
MAIN = "main"

_WITH_KEY = re.compile(r"(?P<policy>[a-z][a-z0-9_-]{0,62})(?:\.[0-9]+)?(?P<hashed>~~?)(?P<key>.+)")


@dataclass(frozen=True)
class Owner:
    """The process that made an instance. ``pid`` as it is seen from here, else as the name of the instance has it.

    ``command`` and ``uid`` are None where it is dead, or cannot be seen.
    """

    pid: int
    alive: bool
    uid: int | None = None
    command: str | None = None


@dataclass(frozen=True, kw_only=True)
class Sample:
    """What one group has used at a moment: two of them make a rate.

    ``id`` tells groups apart from one sample to the next; ``when`` is in seconds, of a clock that only goes forward.
    ``node`` is the worker that told of it, where that was another.
    """

    id: str
    name: str
    owner: str
    when: float
    reading: Reading
    limits: Resources = field(default_factory=Resources)
    statistics: Statistics = field(default_factory=Statistics)
    pressure: Mapping[str, Pressure] = field(default_factory=dict)
    node: str | None = None


@dataclass(frozen=True)
class Group:
    """One group, and the way to it.

    ``label`` is the shortest that names it and no other; ``policy`` and ``key`` are None where the name does not tell
    them. Its methods raise KernelError; :func:`is_gone` says whether that is because the group has gone meanwhile.
    """

    name: str
    kind: Kind
    instance: str
    cgroup: Cgroup
    owner: Owner
    label: str
    policy: str | None = None
    key: str | None = None

    def limits(self) -> Resources:
        """Its own limits, as the kernel has them: see :func:`~rcon_plugins.kernel.cgroup.read_limits`."""
        return read_limits(self.cgroup)

    def usage(self) -> Reading:
        """What it has used until now, all below it counted in."""
        return read_usage(self.cgroup)

    def statistics(self) -> Statistics:
        """What the kernel counts beyond its usage."""
        return read_statistics(self.cgroup)

    def pressure(self) -> dict[str, Pressure]:
        """How long it waited for cpu, memory and io; empty where the kernel does not tell."""
        return read_pressure(self.cgroup)

    def is_frozen(self) -> bool:
        """Whether all of it has come to a stop."""
        return is_frozen(self.cgroup)

    def pids(self) -> list[int]:
        """The processes in it or below it; of a group of threads, those that they belong to."""
        if self.kind != "host":
            return self.cgroup.processes(subtree=True)
        owners = (proc.process_of(thread) for thread in self.cgroup.threads(subtree=True))
        return sorted({pid for pid in owners if pid is not None})

    def processes(self) -> list[Process]:
        """Those of :meth:`pids` that can be seen."""
        return [found for pid in self.pids() if (found := proc.read_process(pid)) is not None]

    def is_of_server(self) -> bool:
        """Whether a server, and not a command, made it: one that may write its limits again."""
        return self.kind == "host" or (self.kind == "work" and MAIN not in self.cgroup.children())

    def sample(self) -> Sample:
        """Its usage, limits, statistics and pressure, now."""
        return Sample(
            id=self.cgroup.path,
            name=self.label,
            owner=self.owner.command or "",
            when=time.monotonic(),
            reading=self.usage(),
            limits=self.limits(),
            statistics=self.statistics(),
            pressure=self.pressure(),
        )


@dataclass(frozen=True)
class Found:
    """All ``groups``, by name, and the directories that could not be looked into."""

    groups: list[Group]
    unreadable: list[str]


def find_groups(hierarchy: Hierarchy | None = None) -> Found:
    """Every group of every instance in the visible tree. Raises KernelError where no cgroups are mounted."""
    hierarchy = Hierarchy.discover() if hierarchy is None else hierarchy
    found = survey(hierarchy)
    groups: list[Group] = []
    unreadable = list(found.unreadable)
    for path in found.instances:
        instance = path.rpartition("/")[2]
        made_by = _owner(instance)
        for kind in get_args(Kind):
            for name in hierarchy.cgroup(f"{path}/{kind}").children():
                try:
                    cgroup = _existing(hierarchy, f"{path}/{kind}/{name}", kind)
                except KernelError as error:
                    unreadable.append(error.path or path)
                    continue
                if cgroup is not None and not INSTANCE_NAME.fullmatch(name):
                    groups.append(Group(name, kind, instance, cgroup, made_by, "", *split_name(name)))
    return Found(labelled(groups), unreadable)


def find_group(name: str, groups: Iterable[Group] | None = None) -> Group:
    """The group of this name, among all or among ``groups``.

    ``name`` is that of the group where it is the only one, else ``rcon-<pid>-<start>/<name>``, or with ``work``,
    ``host`` or ``attached`` between the two. Raises `UnknownGroup`, also where it names several.
    """
    known = list(find_groups().groups if groups is None else groups)
    matching = [group for group in known if name in _names(group)]
    if len(matching) == 1:
        return matching[0]
    if matching:
        labels = ", ".join(sorted(group.label for group in matching))
        raise UnknownGroup(f"{name!r} names {len(matching)} groups", hint=f"one of: {labels}")
    near = difflib.get_close_matches(name, [one for group in known for one in (group.name, group.label)], n=1)
    hint = f"did you mean {near[0]}?" if near else "rcon ls lists those there are"
    raise UnknownGroup(f"there is no group {name!r}", hint=hint)


def is_gone(error: KernelError) -> bool:
    """Whether it says that what was asked about has gone meanwhile."""
    return error.errno in (errno.ENOENT, errno.ENODEV, errno.ESRCH)


def split_name(name: str) -> tuple[str | None, str | None]:
    """The policy and the key of a group with a key; of one whose key is kept as a hash, the policy alone.

    The inverse of :func:`rcon_plugins.confinement.confinement.cgroup_name`, as far as there is one.
    """
    parts = _WITH_KEY.fullmatch(name)
    if parts is None:
        return None, None
    return parts["policy"], None if parts["hashed"] == "~~" else parts["key"]


def _existing(hierarchy: Hierarchy, path: str, kind: Kind) -> Cgroup | None:
    """The cgroup of a group with what it really has; None where it has gone meanwhile."""
    here = hierarchy.where(path)
    if here is None:
        return None
    cgroup = here.cgroup(path)
    if kind == "host":
        cgroup.become_threaded()
    return cgroup


def _owner(instance: str) -> Owner:
    match = INSTANCE_NAME.fullmatch(instance)
    if match is None:
        raise ValueError(f"not the name of an instance: {instance!r}")
    named = int(match[1])
    pid = proc.visible_pid(named, int(match[2]))
    process = None if pid is None else proc.read_process(pid)
    if pid is None or process is None:
        return Owner(named, alive=pid is not None)
    return Owner(pid, alive=True, uid=process.uid, command=process.command)


def _names(group: Group) -> tuple[str, ...]:
    """All that name it, the shortest first."""
    return (
        group.name,
        f"{group.instance}/{group.name}",
        f"{group.instance}/{group.kind}/{group.name}",
        group.cgroup.path,
    )


def labelled(groups: Iterable[Group]) -> list[Group]:
    """The same by name, each with the shortest label that no other of them has."""
    groups = list(groups)
    counts = Counter(name for group in groups for name in _names(group))
    labelled = [
        replace(group, label=next(name for name in _names(group) if counts[name] == 1)) for group in groups
    ]
    return sorted(labelled, key=lambda group: (group.name, group.cgroup.path))
