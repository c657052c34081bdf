"""Find the groups on this machine, their owners and their limits.

A group is ``work/<name>``, ``host/<name>`` or ``attached/<name>`` of any instance in the visible cgroup tree. The
instance may belong to a server, a command, or a program with ``with confine(…)``. A group that commands share
(``rcon run --in``) has the instances of these commands in it. Nested instances are found, too, and
those of other users that this user may read. Each call reads the tree again; nothing is cached.
"""

from __future__ import annotations

import difflib
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Literal

from rcon_plugins.errors import KernelError, UnknownGroup
from rcon_plugins.groups.sample import Sample
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
from rcon_plugins.tally import reader
from rcon_plugins.tally.reader import Counts, TallyOfServer
from rcon_plugins.tree.group_names import cgroup_name, split_name, without_generation
from rcon_plugins.tree.nested import MAIN
from rcon_plugins.tree.owner import INSTANCE_NAME
from rcon_plugins.tree.owner import Owner as InstanceOwner
from rcon_plugins.tree.survey import survey

#: ``work``: processes that end with the instance. ``host``: threads of the server itself. ``attached``: processes that
#: ran before the instance, and are moved back at its end. ``shared``: the instances of commands that share limits.
Kind = Literal["work", "host", "attached", "shared"]
#: The kinds of groups in an instance.
_IN_INSTANCE: tuple[Kind, ...] = ("work", "host", "attached")


@dataclass(frozen=True)
class Owner:
    """The process that made an instance. ``pid`` is its pid here; if it cannot be seen, the pid in the instance's name.

    ``alive`` is None if the process is in a PID namespace that cannot be seen from here. ``command`` and ``uid`` are
    None if it is dead or this user may not see it.
    """

    pid: int
    alive: bool | None
    uid: int | None = None
    command: str | None = None


class Tallies:
    """The tallies of servers, by the name of the group that each record counts. Each server's is read once."""

    def __init__(self) -> None:
        self._by_instance: dict[str, tuple[TallyOfServer, dict[str, Counts]] | None] = {}

    def of(self, instance: str, name: str, owner: int | None) -> Counts | None:
        """Return the counts of the group ``name`` of an instance; None if they are unknown.

        ``owner`` is the uid of the server, if it is known.
        """
        found = self._read(instance, owner)
        if found is None:
            return None
        plain = without_generation(name)
        counts = found[1].get(plain)
        policy, _, key = plain.partition("~")
        if counts is None and (key.startswith("~") or found[0].may_hide(policy, key or None)):
            return None  # the hash of a key that is too long for a record does not lead to it
        return counts or Counts()

    def unroutable(self, instance: str, owner: int | None) -> int | None:
        """Return how many requests or tasks a server refused because no route names them; None if that is unknown."""
        found = self._read(instance, owner)
        return None if found is None else found[0].unroutable

    def _read(self, instance: str, owner: int | None) -> tuple[TallyOfServer, dict[str, Counts]] | None:
        if instance not in self._by_instance:
            tally = reader.read(instance, owner)
            self._by_instance[instance] = None if tally is None else (tally, _by_name(tally))
        return self._by_instance[instance]


def _by_name(tally: TallyOfServer) -> dict[str, Counts]:
    return {cgroup_name(one.policy, one.key): its for one, its in tally.counts.items() if one.kind != "other"}


@dataclass(frozen=True)
class Group:
    """One group. ``label`` is its shortest name that no other group has.

    The ``instance`` and the ``owner`` of a shared group are those of the command in it that began first.
    ``policy`` and ``key`` are None if the name does not contain them. The methods raise KernelError.
    `rcon_plugins.kernel.files.gone` returns whether the reason is that the group was removed meanwhile.
    """

    name: str
    kind: Kind
    instance: str
    cgroup: Cgroup
    owner: Owner
    label: str
    policy: str | None = None
    key: str | None = None
    tallies: Tallies = field(default_factory=Tallies, compare=False, repr=False)

    def limits(self) -> Resources:
        """Return the group's own limits, read from the kernel: see :func:`~rcon_plugins.kernel.cgroup.read_limits`."""
        return read_limits(self.cgroup)

    def usage(self) -> Reading:
        """Return the usage of the group and everything below it, until now.

        For the requests and tasks of a server, the counts of limits that were reached and of OOM kills are those of its
        tally. Without one they are None on cgroup v1, where the kernel's own end with each executor process.
        """
        reading = read_usage(self.cgroup)
        counts = self.tally()
        if counts is not None:
            return reading._replace(
                oom_kills=counts.oom_kills,
                memory_limit_hits=counts.endings["memory"],
                pids_limit_hits=counts.endings["pids"] + counts.refusals["pids"],
            )
        if (
            self.kind == "work"
            and self.is_of_server()
            and any(one.version == 1 for one in self.cgroup.mounts)
        ):
            return reading._replace(oom_kills=None, memory_limit_hits=None, pids_limit_hits=None)
        return reading

    def tally(self) -> Counts | None:
        """Return what the server counted for this group; None if that is unknown, and for a group of no server.

        It covers all processes of the server since it began, also when the group has been made again meanwhile.
        """
        if self.kind in ("attached", "shared"):
            return None
        return self.tallies.of(self.instance, self.name, self.owner.uid)

    def unroutable(self) -> int | None:
        """Return how many requests or tasks the group's server refused because no route names them.

        None if that is unknown, and for a group of no server. They have no policy, so no group of their own.
        """
        return (
            None
            if self.kind in ("attached", "shared")
            else self.tallies.unroutable(self.instance, self.owner.uid)
        )

    def statistics(self) -> Statistics:
        """Return further counters of the kernel."""
        return read_statistics(self.cgroup)

    def pressure(self) -> dict[str, Pressure]:
        """Return how long the group waited for cpu, memory and io; empty if the kernel does not measure it."""
        return read_pressure(self.cgroup)

    def is_frozen(self) -> bool:
        """Return whether all processes of the group are frozen."""
        return is_frozen(self.cgroup)

    def pids(self) -> list[int]:
        """Return the pids of the processes in the group and below it; for a group of threads, those they belong to."""
        if self.kind != "host":
            return self.cgroup.processes(subtree=True)
        owners = (proc.process_of(thread) for thread in self.cgroup.threads(subtree=True))
        return sorted({pid for pid in owners if pid is not None})

    def processes(self) -> list[Process]:
        """Return the processes among :meth:`pids` that this user may see."""
        return [found for pid in self.pids() if (found := proc.read_process(pid)) is not None]

    def is_of_server(self) -> bool:
        """Return whether a server made the group, not a command. A server may write the limits of its groups again."""
        return self.kind == "host" or (self.kind == "work" and MAIN not in self.cgroup.children())

    def sample(self) -> Sample:
        """Return the current usage, limits, statistics and pressure."""
        return Sample(
            id=self.cgroup.path,
            name=self.label,
            owner=self.owner.command or "",
            when=time.monotonic(),
            reading=self.usage(),
            limits=self.limits(),
            statistics=self.statistics(),
            pressure=self.pressure(),
            tally=self.tally(),
        )


@dataclass(frozen=True)
class FoundServer:
    """A server, by the name of its instance. ``unroutable`` is as `Group.unroutable`."""

    instance: str
    owner: Owner
    unroutable: int | None


@dataclass(frozen=True)
class FoundGroups:
    """All ``groups``, sorted by name, and the directories that could not be read.

    ``owners`` are the owners of all instances, by the name of the instance. An instance may have no groups.
    """

    groups: list[Group]
    unreadable: list[str]
    owners: dict[str, Owner] = field(default_factory=dict)
    tallies: Tallies = field(default_factory=Tallies, compare=False, repr=False)

    def servers(self) -> list[FoundServer]:
        """Return each server that has a group, or whose tally this user can read. Reads the tallies."""
        with_groups = {group.instance for group in self.groups if group.is_of_server()}
        counted = [
            FoundServer(instance, owner, self.tallies.unroutable(instance, owner.uid))
            for instance, owner in self.owners.items()
        ]
        return [one for one in counted if one.unroutable is not None or one.instance in with_groups]


def find_groups(hierarchy: Hierarchy | None = None) -> FoundGroups:
    """Return every group of every instance in the visible tree. Raises KernelError if no cgroups are mounted."""
    hierarchy = Hierarchy.discover() if hierarchy is None else hierarchy
    found = survey(hierarchy)
    groups: list[Group] = []
    owners: dict[str, Owner] = {}
    tallies = Tallies()
    unreadable = list(found.unreadable)
    for path in found.instances:
        instance = path.rpartition("/")[2]
        owner = owners[instance] = _owner(instance)
        for kind in _IN_INSTANCE:
            for name in hierarchy.cgroup(f"{path}/{kind}").children():
                try:
                    cgroup = _existing(hierarchy, f"{path}/{kind}/{name}", kind)
                except KernelError as error:
                    unreadable.append(error.path or path)
                    continue
                if cgroup is not None and not INSTANCE_NAME.fullmatch(name):
                    policy, key = split_name(name)
                    groups.append(Group(name, kind, instance, cgroup, owner, "", policy, key, tallies))
    for path, name in found.shared.items():
        inside = [one for one in found.instances if one.rpartition("/")[0] == path]
        try:
            cgroup = _existing(hierarchy, path, "shared")
        except KernelError as error:
            unreadable.append(error.path or path)
            continue
        if cgroup is not None and inside:
            instance = min((one.rpartition("/")[2] for one in inside), key=lambda one: _age(owners, one))
            groups.append(Group(name, "shared", instance, cgroup, owners[instance], "", tallies=tallies))
    return FoundGroups(with_labels(groups), unreadable, owners, tallies)


def _age(owners: dict[str, Owner], instance: str) -> tuple[bool, int]:
    """Return the key by which the oldest living owner comes first."""
    owner = InstanceOwner.of(instance)
    return owners[instance].alive is False, 0 if owner is None else owner.started


def find_group(name: str, groups: Iterable[Group] | None = None) -> Group:
    """Return the group of this name, among all groups or among ``groups``.

    ``name`` is the group's own name if no other group has it; otherwise ``rcon-<pid>-<start>/<name>``, or the same with
    ``work``, ``host`` or ``attached`` in between. Raises `UnknownGroup`, also if several groups have the name.
    """
    known = list(find_groups().groups if groups is None else groups)
    matching = [group for group in known if name in _names(group)]
    if len(matching) == 1:
        return matching[0]
    if matching:
        labels = ", ".join(sorted(group.label for group in matching))
        raise UnknownGroup(f"{name!r} names {len(matching)} groups", hint=f"one of: {labels}")
    near = difflib.get_close_matches(name, [one for group in known for one in (group.name, group.label)], n=1)
    hint = f"did you mean {near[0]}?" if near else "rcon ls lists all groups"
    raise UnknownGroup(f"there is no group {name!r}", hint=hint)


def _existing(hierarchy: Hierarchy, path: str, kind: Kind) -> Cgroup | None:
    """Return the cgroup with its controllers; None if it is gone."""
    here = hierarchy.where(path)
    if here is None:
        return None
    cgroup = here.cgroup(path)
    if kind == "host":
        cgroup.become_threaded()
    return cgroup


def _owner(instance: str) -> Owner:
    owner = InstanceOwner.of(instance)
    if owner is None:
        raise ValueError(f"{instance!r} is not the name of an instance")
    pid = owner.visible_pid()
    process = None if pid is None else proc.read_process(pid)
    if pid is None or process is None:
        return Owner(owner.pid, alive=owner.is_alive())
    return Owner(pid, alive=True, uid=process.uid, command=process.command)


def _names(group: Group) -> tuple[str, ...]:
    """Return all names of a group, the shortest first."""
    return (
        group.name,
        f"{group.instance}/{group.name}",
        f"{group.instance}/{group.kind}/{group.name}",
        group.cgroup.path,
    )


def with_labels(groups: Iterable[Group]) -> list[Group]:
    """Return the groups sorted by name, each with the shortest label that no other has."""
    groups = list(groups)
    counts = Counter(name for group in groups for name in _names(group))
    found = [
        replace(group, label=next(name for name in _names(group) if counts[name] == 1)) for group in groups
    ]
    return sorted(found, key=lambda group: (group.name, group.cgroup.path))
