"""Examine which limits and features work on this machine for this process, and give a remedy for each missing one."""

from __future__ import annotations

import os
import posix
from collections.abc import Callable, Iterator
from functools import partial
from typing import Literal, NamedTuple

from rcon_plugins.errors import KernelError
from rcon_plugins.kernel import descriptors, features, process, seccomp
from rcon_plugins.kernel.capability import CAP_SETGID, CAP_SETUID, Capabilities, read_state
from rcon_plugins.kernel.cgroup import Cgroup, Hierarchy, IoMax, Resources, device_of, mounts, swap, v1
from rcon_plugins.kernel.cgroup.branch import check_path
from rcon_plugins.kernel.cgroup.resources import CONTROLLERS
from rcon_plugins.tree import container_root, previous_cgroups, systemd
from rcon_plugins.tree.base import left_as_it_was, look_for_base
from rcon_plugins.tree.instance import Instance

#: ``there``: present, or works. ``missing``: not there, and some limit needs it. ``absent``: not there, but no limit
#: needs it.
State = Literal["there", "missing", "absent"]

_BIG = 1 << 40
#: The names of the limits of each controller, and limits so high that they restrict nothing.
_LIMITS: dict[str, tuple[str, Resources]] = {
    "cpu": ("cpu, cpu_weight", Resources(cpu_quota=64.0, cpu_weight=100)),
    "cpuset": ("cpus", Resources(cpus="0")),
    "memory": ("memory", Resources(memory_max=_BIG)),
    "io": ("io", Resources()),
    "pids": ("pids", Resources(pids_max=4000)),
}


class Finding(NamedTuple):
    """The result of one check. ``remedy`` is None if nothing needs one, or no remedy is known."""

    area: str
    name: str
    state: State
    text: str
    remedy: str | None = None


class Report(NamedTuple):
    """All findings for one user on one machine. ``base`` is the cgroup in which others can be made, or None."""

    user: int
    kernel: str
    layout: str | None
    controllers: list[str]
    base: str | None
    capabilities: list[str]
    landlock: int
    container: str | None
    systemd: bool
    findings: list[Finding]

    @property
    def missing(self) -> list[Finding]:
        """The findings that keep a limit from working."""
        return [finding for finding in self.findings if finding.state == "missing"]


def examine(base: str | None = None) -> Report:
    """Examine this machine: make cgroups in ``base``, or a base that is found, try each limit there, and remove them.

    ``base`` is made if it is missing, and removed then, too.

    May move this process into a scope of systemd, like all functions that make a tree, and no other process. Call it in
    a process with one thread.
    """
    findings: list[Finding] = []
    hierarchy = None
    try:
        hierarchy = Hierarchy.discover()
    except KernelError as error:
        findings.append(Finding("machine", "cgroups", "missing", error.problem, error.hint))
    else:
        findings += _mounts(hierarchy)
        with left_as_it_was(hierarchy, check_path(base or "/")):
            base, found = _try(hierarchy, base)
        findings += found
    findings += [*_machine(), *_process()]
    return Report(
        user=os.geteuid(),
        kernel=os.uname().release,
        layout=hierarchy.layout if hierarchy else None,
        controllers=sorted(hierarchy.controllers) if hierarchy else [],
        base=base if hierarchy else None,
        capabilities=list(read_state().effective.names()),
        landlock=features.landlock_brings()[0],
        container=features.container(),
        systemd=mounts.is_systemds(),
        findings=findings,
    )


def _mounts(hierarchy: Hierarchy) -> Iterator[Finding]:
    for mount in hierarchy.mounts:
        names = " ".join(sorted(mount.controllers)) or "no controllers"
        limiting = mount in hierarchy.limit_mounts
        if mount.read_only:
            state: State = "missing" if limiting else "absent"
            yield Finding(
                "machine", mount.path, state, f"cgroup v{mount.version}, mounted read-only: {names}"
            )
        else:
            yield Finding("machine", mount.path, "there", f"cgroup v{mount.version}: {names}")
    off = mounts.switched_off()
    for name in sorted(CONTROLLERS - hierarchy.controllers):
        if v1.KERNEL_NAMES[name] in off:
            yield Finding("machine", name, "missing", *mounts.refusal_of_boot(v1.KERNEL_NAMES[name]))


def _try(hierarchy: Hierarchy, base: str | None) -> tuple[str | None, list[Finding]]:
    """Make a cgroup tree as a server does, and try everything in it. Return the base and the findings.

    Where a server would move other processes to make room, only look.
    """
    try:
        if container_root.would_move(hierarchy):
            prospect = look_for_base(hierarchy, base, systemd.enter_scope)
            if prospect.first is not None:
                return prospect.base, list(_untried(prospect.base, prospect.hierarchy, prospect.first))
        instance = Instance.create(hierarchy, base)
    except KernelError as error:
        return None, [Finding("limits", "cgroup", "missing", error.problem, error.hint)]
    findings = [Finding("limits", "cgroup", "there", f"cgroups can be made in {instance.base}")]
    try:
        if instance.threads_need_adoption():
            instance.adopt()
        leaf = instance.executor_cgroup("doctor", "main").create()
        findings += _limits(instance.hierarchy, leaf.configure)
        findings += _ways_in(instance, leaf)
        findings += _features(instance.hierarchy, leaf.path)
    except KernelError as error:
        findings.append(Finding("limits", "cgroup", "missing", error.problem, error.hint))
    finally:
        instance.close()
    return instance.base, findings


def _untried(base: str, hierarchy: Hierarchy, first: str) -> Iterator[Finding]:
    """Judge by the controllers of the root alone. Nothing can be tried before its processes have moved."""
    yield Finding("limits", "cgroup", "there", f"cgroups can be made in {base}; {first}")
    yield from _limits(hierarchy, None)
    yield Finding(
        "works", "process, inline, attach", "absent", "not tried: processes of this container would have to move",
        "rcon run -- true moves them, as the start of a server does; and try again",
    )  # fmt: skip
    yield from _features(hierarchy, "/")


def _limits(hierarchy: Hierarchy, configure: Callable[[Resources], object] | None) -> Iterator[Finding]:
    """Try each limit with ``configure``; without it, say whether there is what the limit needs."""
    for controller, (names, resources) in _LIMITS.items():
        if controller == "io":
            try:
                device = device_of(".")
            except KernelError as error:
                if "io" in hierarchy.controllers:
                    yield Finding("limits", names, "absent", f"not tried: {error.problem}", error.hint)
                    continue
                device = None
            resources = Resources(io={device: IoMax(wbps=_BIG)} if device else {})
        elif controller == "cpuset":
            resources = Resources(cpus=",".join(map(str, sorted(os.sched_getaffinity(0)))))
        if controller not in hierarchy.controllers:
            wanted = resources if controller != "io" or resources.io else Resources(io={})
            refused = hierarchy.refusals(wanted)
            reason = refused[0].reason if refused else f"there is no {controller} controller here"
            yield Finding("limits", names, "missing", reason, refused[0].remedy if refused else None)
            continue
        yield _limit(names, configure, resources)
    yield from _swap(hierarchy, configure)
    high = hierarchy.refusals(Resources(memory_high=_BIG))
    if "memory" in hierarchy.controllers:
        if high:
            yield Finding("limits", "memory_high", "absent", high[0].reason, high[0].remedy)
        else:
            yield _limit("memory_high", configure, Resources(memory_high=_BIG))


def _swap(hierarchy: Hierarchy, configure: Callable[[Resources], object] | None) -> Iterator[Finding]:
    if "memory" not in hierarchy.controllers:
        return
    wanted = Resources(memory_max=_BIG, swap_max=_BIG)
    refused = hierarchy.refusals(wanted)
    if not refused:
        machine = "this machine has swap" if swap.present() else "this machine has no swap"
        text = f"accounted, so a memory limit allows no swap unless swap is set; {machine}"
        yield _limit("swap", configure, wanted, text)
    elif swap.present():
        reason = f"{refused[0].reason}, so memory limits do not bound swap"
        yield Finding("limits", "swap", "missing", reason, refused[0].remedy)
    else:
        yield Finding(
            "limits", "swap", "absent", f"{refused[0].reason}; this machine has no swap", refused[0].remedy
        )


def _limit(
    name: str,
    configure: Callable[[Resources], object] | None,
    resources: Resources,
    text: str | None = None,
) -> Finding:
    if configure is None:
        return Finding("limits", name, "there", text or "not tried; what it needs is there")
    return _attempt("limits", name, partial(configure, resources), text or "can be set")


def _attempt(area: str, name: str, act: Callable[[], object], text: str) -> Finding:
    try:
        act()
    except KernelError as error:
        return Finding(area, name, "missing", error.problem, error.hint)
    return Finding(area, name, "there", text)


def _ways_in(instance: Instance, leaf: Cgroup) -> Iterator[Finding]:
    """Try each way under limits: for a new process, for a thread, and for a running process."""
    yield _attempt(
        "works", "process", lambda: _in_a_child(leaf.enter_process), "rcon run, isolation = process"
    )
    yield _attempt("works", "inline", lambda: _inline(instance), "isolation = inline and thread, confine()")
    try:
        previous_cgroups.check_writable()
    except KernelError as error:
        yield Finding("works", "attach", "absent", f"rcon attach: {error.problem}", error.hint)
    else:
        yield _attempt("works", "attach", lambda: _attach(leaf), "rcon attach, " + _whose(instance))


def _whose(instance: Instance) -> str:
    if os.geteuid() == 0:
        return "any process"
    if instance.hierarchy.unified is None:
        return "all processes of this user"
    return f"processes of this user below {instance.base}; root can attach any process"


def _inline(instance: Instance) -> None:
    cgroup = instance.threaded("doctor").create()
    try:
        with instance.exit() as leave, cgroup.entrance() as entrance:
            try:
                entrance.enter()
            finally:
                leave.enter()
    finally:
        cgroup.delete()


def _attach(leaf: Cgroup) -> None:
    """Fork a waiting child, attach it to ``leaf``, and end it."""
    reading, writing = descriptors.pipe()
    child = descriptors.fork_beside(reading, writing)
    if child == 0:
        posix.close(writing)
        os.read(reading, 1)
        os._exit(0)
    posix.close(reading)
    try:
        leaf.attach(child)
    finally:
        posix.close(writing)
        os.waitpid(child, 0)


def _in_a_child(act: Callable[[], None]) -> None:
    """Call ``act`` in a child. Raise the KernelError that it raised."""
    reading, writing = descriptors.pipe()
    child = descriptors.fork_beside(reading, writing)
    if child == 0:
        try:
            posix.close(reading)
            act()
        except KernelError as error:
            os.write(writing, f"{error.errno} {error}".encode())
        finally:
            os._exit(0)
    posix.close(writing)
    said = os.read(reading, 65536).decode()
    posix.close(reading)
    process.reap(child)
    if said:
        number, _, problem = said.partition(" ")
        raise KernelError(problem, errno=int(number))


def _features(hierarchy: Hierarchy, path: str) -> Iterator[Finding]:
    """Look for the features of v2 at the cgroup ``path``."""
    unified = hierarchy.unified
    if unified is None:
        yield Finding(
            "kernel", "cgroup v2", "absent", "killing a whole group at once, and the pressure of each group",
            "mount -t cgroup2 none /sys/fs/cgroup/unified, or boot with systemd.unified_cgroup_hierarchy=1",
        )  # fmt: skip
        return
    for feature in features.features_of(unified.directory(path)):
        yield _feature(feature)


def _feature(feature: features.Feature, remedy: str | None = None) -> Finding:
    text = f"{feature.brings} (Linux {feature.since})"
    if feature.there:
        return Finding("kernel", feature.name, "there", text)
    return Finding("kernel", feature.name, "absent", text, remedy or f"Linux {feature.since} or newer")


def _machine() -> Iterator[Finding]:
    yield _feature(features.pressure(), "Linux 4.20 or newer, booted with psi=1")
    if not features.has_pidfds():
        yield Finding(
            "kernel", "pidfd_open", "missing", "killing a process without a race", "Linux 5.3 or newer"
        )
    abi, lacking = features.landlock_brings()
    more = "; ".join(f"{brings} from Linux {since}" for since, brings in lacking)
    if abi:
        yield Finding("kernel", "Landlock", "there", f"ABI {abi}" + (f" ({more})" if more else ""))
    else:
        yield Finding(
            "kernel", "Landlock", "absent", "rules for files: capcon run --read-only, --write",
            "Linux 5.13 or newer with CONFIG_SECURITY_LANDLOCK, and landlock in the boot parameter lsm=",
        )  # fmt: skip
    if seccomp.is_available():
        yield Finding("kernel", "seccomp", "there", "no process leaves its cgroup by clone3")
    else:
        yield Finding(
            "kernel", "seccomp", "absent",
            "confined code with the server's own user can leave its cgroup v2 by clone3", seccomp.REMEDY,
        )  # fmt: skip
    container = features.container()
    yield Finding("machine", "container", "there", f"in one of {container}" if container else "in none")
    yield _systemd()


def _systemd() -> Finding:
    refused = systemd.refusal()
    if refused is None:
        return Finding("machine", "systemd", "there", f"{systemd.manager()} can make a scope")
    return Finding("machine", "systemd", "absent", f"cannot make a scope: {refused.problem}", refused.hint)


def _process() -> Iterator[Finding]:
    """Check what this process may do beside setting limits."""
    held = read_state().permitted
    lacking = Capabilities.of(CAP_SETUID, CAP_SETGID) - held
    if lacking:
        yield Finding(
            "works", "identity", "absent", f"running as other users: this process lacks {lacking}",
            "run as root; or add to the unit: [Service] AmbientCapabilities=CAP_SETUID CAP_SETGID CAP_SETPCAP",
        )  # fmt: skip
    else:
        yield Finding("works", "identity", "there", "running as other users (user = ..., rcon run --user)")
