"""Change limits of policies while work runs, in every process of a server and in the cgroups of running work."""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import threading
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from rcon_plugins.builtin.namespaces import memory_size
from rcon_plugins.confinement.isolation import judge, resources_of, shares_memory
from rcon_plugins.errors import ConfinementError, KernelError, SettingsError
from rcon_plugins.kernel import descriptors
from rcon_plugins.kernel.cgroup import MAX, IoMax, Resources, change_limits, read_limits
from rcon_plugins.kernel.files import gone
from rcon_plugins.settings.budget import promised
from rcon_plugins.settings.conversion import convert, one_of
from rcon_plugins.settings.limit_text import NO_LIMIT, as_written, device_and_key, removes, value_of
from rcon_plugins.settings.limits import Each, IoLimits, Limits
from rcon_plugins.settings.policy import Policy

if TYPE_CHECKING:
    from rcon_plugins.confinement.plan import Plan
    from rcon_plugins.kernel.cgroup import Cgroup
    from rcon_plugins.tree.instance import Instance


#: How many times to try to write IO limits while new work keeps starting in the cgroup.
_ATTEMPTS = 10
_UNLIMITED = IoMax(MAX, MAX, MAX, MAX)


class PolicyChangeLog:
    """All changes of limits since a deployment was made, in order; shared by the processes of a server.

    The log is a file in memory that grows by one line with each change. Make it before the processes that share it are
    forked. Checking for changes costs one fstat(2). Safe in every process and thread.
    """

    def __init__(self) -> None:
        """Make the file. Raises `KernelError`."""
        self.file = descriptors.memory_file("rcon-changes")
        try:
            fcntl.fcntl(self.file, fcntl.F_SETFL, os.O_APPEND)
        except OSError as error:
            os.close(self.file)
            raise KernelError.from_oserror(error, path="the log of changes") from None

    def add(self, policy: str, key: str, value: str) -> None:
        """Append one change. Raises `KernelError`."""
        try:
            os.write(self.file, json.dumps([policy, key, value]).encode() + b"\n")
        except OSError as error:
            raise KernelError.from_oserror(error, path="the log of changes") from None

    def size(self) -> int:
        """Return the size in bytes, which grows with each change. Raises `KernelError`."""
        try:
            return os.fstat(self.file).st_size
        except OSError as error:
            raise KernelError.from_oserror(error, path="the log of changes") from None

    def since(self, offset: int) -> tuple[list[tuple[str, str, str]], int]:
        """Return the changes from this byte on (policy, key, value), and the byte after the last of them.

        Raises `KernelError`.
        """
        try:
            data = os.pread(self.file, self.size() - offset, offset)
        except OSError as error:
            raise KernelError.from_oserror(error, path="the log of changes") from None
        whole = data[: data.rfind(b"\n") + 1]  # the last line may still be incomplete
        return [tuple(json.loads(line)) for line in whole.splitlines()], offset + len(whole)


class LivePolicies:
    """The policies of a server as they are now, seen from one process. Thread-safe.

    Without ``changes`` they never change. ``on_change`` is called with the changed policies, by name, before any thread
    gets one of them.
    """

    def __init__(
        self,
        policies: Mapping[str, Policy],
        changes: PolicyChangeLog | None = None,
        on_change: Callable[[Mapping[str, Policy]], object] = lambda _: None,
    ) -> None:
        #: The policies as of the last `refresh`, by name.
        self.by_name = dict(policies)
        self.changes = changes
        self._on_change = on_change
        self._read = 0
        self._lock = threading.Lock()

    def refresh(self) -> None:
        """Apply the changes since the last call. Usually there are none."""
        if self.changes is None or self.changes.size() == self._read:
            return
        with self._lock:
            changes, offset = self.changes.since(self._read)
            found: dict[str, Policy] = {}
            for name, key, value in changes:
                found[name] = self.by_name[name] = changed(self.by_name[name], key, value)
            if found:
                self._on_change(found)
            self._read = offset

    def latest(self, policy: Policy) -> Policy:
        """Return the policy of the same name as it is now."""
        self.refresh()
        return self.by_name[policy.name]

    def all(self) -> Mapping[str, Policy]:
        """Return all policies as they are now, by name."""
        self.refresh()
        return self.by_name


class Change(NamedTuple):
    """The result of a change: the limit before (None without one) and after, in the spelling of a settings file.

    ``cgroups`` is the number of cgroups of running work that got the new limit. ``kept`` is the number of cgroups of
    single executors that kept the old one. ``notes`` say what else running work keeps.
    """

    policy: Policy
    old: Any
    new: Any
    cgroups: int
    kept: int
    notes: tuple[str, ...] = ()


def change_limit(
    plan: Plan, policies: LivePolicies, instance: Instance, name: str, key: str, value: str
) -> Change:
    """Change one limit of a policy, also for its running work. Call it in one process, by one thread at a time.

    A limit of the whole policy is changed in all of its cgroups or in none. A limit of ``each`` holds for work that
    starts from now on. Running work gets it too, unless it was given more than the policy says, or the kernel refuses
    the new limit (v1: memory below what is in use). A new ``timeout`` holds only for work that starts later.

    Raises `SettingsError` for a key that is not a limit or a limit that cannot be enforced here, `KernelError` if the
    kernel refuses, `ConfinementError` if ``policies`` cannot change.
    """
    if policies.changes is None:
        raise ConfinementError("limits cannot be changed while this server runs")
    found = policies.all()
    if name not in found:
        raise SettingsError(f"there is no policy {name!r}", hint=f"one of: {', '.join(sorted(found))}")
    old = found[name]
    new = changed(old, key, value)
    hook = plan.plugins.hook
    if plan.verdicts[name].isolation != "process":
        raise SettingsError(
            "its requests run in threads of the server, and their limits cannot be changed while the server runs",
            key=f"policy.{name}",
            hint="change the settings and restart the server",
        )
    judge(new, plan.server, instance.hierarchy, hook).check()
    memory = promised(new)
    if memory is not None:
        plan.check_fits(memory, f"policy.{name}.{key}")
    of_each = key.startswith("each.")
    was, wanted = (resources_of(hook, one.each if of_each else one, one) for one in (old, new))
    news = _differing(was, wanted)
    written: list[tuple[Cgroup, Resources]] = []
    try:
        _change_all(instance, name, was, news, written, of_each=of_each)
        policies.changes.add(name, key, value)
    except KernelError:
        for cgroup, before in written:
            change_limits(cgroup, _of_before(before, news))
        raise
    # Write again, for cgroups that another process has just made under the old policy.
    written = []
    kept = _change_all(instance, name, was, news, written, of_each=of_each)
    return Change(new, _limit(old, key), _limit(new, key), len(written), kept, _notes(old, new))


def _notes(old: Policy, new: Policy) -> tuple[str, ...]:
    size = memory_size(old)
    if size is None or size >= (memory_size(new) or math.inf) or shares_memory(old):
        return ()
    return ("the size of /dev/shm stays as it is for the processes that run now",)


def changed(policy: Policy, key: str, value: str) -> Policy:
    """Return the policy with one limit changed, or removed (``max``).

    ``key`` is for example ``memory``, ``each.timeout`` or ``io./srv.read``. Raises `SettingsError`.
    """
    limits, name = _limits(policy, key)
    in_each = limits is policy.each
    kinds = {field.name: field.type for field in msgspec.structs.fields(Each if in_each else Limits)}
    where = f"policy.{policy.name}.{key}"
    try:
        if name.startswith("io."):
            name, made = "io", _changed_io(limits.io, name.removeprefix("io."), value, where)
        elif name not in kinds or name == "io":
            raise SettingsError(
                "is not a limit that can be changed while work runs", hint=one_of(_settable())
            )
        elif removes(name, value):
            made = None
        else:
            made = convert(value_of(name, value), kinds[name], where)
        if in_each:
            return msgspec.structs.replace(policy, each=msgspec.structs.replace(policy.each, **{name: made}))
        return msgspec.structs.replace(policy, **{name: made})
    except SettingsError as error:
        if (error.key or "").startswith(where):
            raise
        raise SettingsError(error.problem, key=where, value=error.value, hint=error.hint) from None


def _limits(policy: Policy, key: str) -> tuple[Limits, str]:
    """Return the table that holds a limit, and its name in it: for ``each.memory`` the table `each` and ``memory``."""
    return (policy.each, key.removeprefix("each.")) if key.startswith("each.") else (policy, key)


def _changed_io(now: Mapping[str, IoLimits], name: str, value: str, where: str) -> dict[str, IoLimits]:
    """Return the IO limits of all devices, with one key or the whole table of one device changed."""
    device, key = device_and_key(name)
    devices = dict(now)
    if key is None and value != NO_LIMIT:
        devices[device] = convert(value_of("io", value), IoLimits, where)
        return devices
    before = devices.pop(device, None)
    said = {} if before is None or key is None else as_written("io", before)
    if key is not None and removes(key, value):
        said.pop(key, None)
    elif key is not None:
        said[key] = value_of(key, value)
    if said:
        devices[device] = convert(said, IoLimits, where if key is None else where.removesuffix(f".{key}"))
    return devices


def _settable() -> list[str]:
    return [
        *(one.name for one in msgspec.structs.fields(Limits) if one.name != "io"),
        *("io.DEVICE.read", "each.…", "each.timeout"),
    ]


def _limit(policy: Policy, key: str) -> Any:
    """Return a limit as the settings spell it."""
    limits, name = _limits(policy, key)
    if not name.startswith("io."):
        return as_written(name, getattr(limits, name))
    device, part = device_and_key(name.removeprefix("io."))
    found = limits.io.get(device)
    if found is None or part is None:
        return as_written("io", found)
    return as_written(part, getattr(found, part))


def _differing(was: Resources, wanted: Resources) -> Resources:
    """Return the fields of ``wanted`` that differ from ``was``; `MAX` for a limit that was removed."""
    news: dict[str, Any] = {}
    for name in Resources._fields:
        before, after = getattr(was, name), getattr(wanted, name)
        if name not in ("io", "oom_group", "files") and before != after:
            news[name] = MAX if after is None else after
    if wanted.swap_max is None and was.swap_max is not None and isinstance(wanted.memory_max, int):
        news["swap_max"] = 0  # that of a limit of memory alone
    if wanted.oom_group and not was.oom_group:
        news["oom_group"] = True
    io = {
        device: IoMax(*map(_changed_rate, was.io.get(device, IoMax()), wanted.io.get(device, IoMax())))
        for device in {*was.io, *wanted.io}
        if was.io.get(device) != wanted.io.get(device)
    }
    files = {name: text for name, text in wanted.files.items() if was.files.get(name) != text}
    return Resources(**news, io=io, files=files)


def _changed_rate(before: Any, after: Any) -> Any:
    """Return the value to write for one rate; None to leave it unchanged."""
    if before == after:
        return None
    return MAX if after is None else after


def _change_all(
    instance: Instance,
    policy: str,
    was: Resources,
    news: Resources,
    written: list[tuple[Cgroup, Resources]],
    *,
    of_each: bool,
) -> int:
    """Write limits to all cgroups of a policy, or of its executors. Return how many of the latter kept theirs.

    Adds to ``written`` each cgroup with the limits that it had before. Raises `KernelError`.
    """
    kept = 0
    if news == Resources():
        return 0
    for cgroup in _cgroups(instance, policy, of_each=of_each):
        try:
            before = read_limits(cgroup)
            if of_each and _has_its_own(before, was, news):
                kept += 1
                continue
            _write(cgroup, news, of_each=of_each)
        except KernelError as error:
            if gone(error) and not cgroup.exists():
                continue
            if of_each:
                kept += 1
                continue
            raise
        written.append((cgroup, before))
    return kept


def _write(cgroup: Cgroup, news: Resources, *, of_each: bool) -> None:
    """Write limits to a cgroup in use. On v1, IO limits also cover processes that start meanwhile.

    Raises `KernelError`.
    """
    for attempts_left in reversed(range(_ATTEMPTS)):
        try:
            change_limits(cgroup, news, gather=not of_each)
            return
        except KernelError as error:
            if of_each or not news.io or error.errno != errno.EBUSY or not attempts_left:
                raise


def _cgroups(instance: Instance, policy: str, *, of_each: bool) -> list[Cgroup]:
    found = [
        instance.policy_cgroup(name)
        for name in instance.work.children()
        if name == policy or name.startswith(f"{policy}~")
    ]
    return [one.child(leaf) for one in found for leaf in one.children()] if of_each else found


def _has_its_own(now: Resources, was: Resources, news: Resources) -> bool:
    """Return whether a cgroup has more memory than both the old and the new limit of its policy."""
    own, old, new = now.memory_max, was.memory_max, news.memory_max
    return isinstance(own, int) and isinstance(old, int) and isinstance(new, int) and own > max(old, new)


def _of_before(before: Resources, news: Resources) -> Resources:
    """Return the limits of ``before`` that writing ``news`` may have changed."""
    kept = {
        name: getattr(before, name)
        for name in Resources._fields
        if name not in ("io", "oom_group", "files") and getattr(news, name) is not None
    }
    return Resources(**kept, io={device: before.io.get(device, _UNLIMITED) for device in news.io})
