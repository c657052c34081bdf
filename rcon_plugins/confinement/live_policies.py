"""Other limits for a policy while work runs under it: told to every process that has a manager, and to the cgroups."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import threading
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from rcon_plugins.confinement.isolation import judge, resources_of
from rcon_plugins.errors import KernelError, SettingsError
from rcon_plugins.kernel.cgroup import MAX, IoMax, Resources, change_limits, read_limits
from rcon_plugins.settings.budget import promised
from rcon_plugins.settings.conversion import convert, one_of
from rcon_plugins.settings.limit_words import NO_LIMIT, as_written, device_and_key, removes, value_of
from rcon_plugins.settings.limits import Each, IoLimits, Limits
from rcon_plugins.settings.policy import Policy

if TYPE_CHECKING:
    from rcon_plugins.confinement.plan import Plan
    from rcon_plugins.kernel.cgroup import Cgroup
    from rcon_plugins.tree.instance import Instance


#: How often limits of IO are tried to be written while work begins beside them.
_ATTEMPTS = 10
_UNLIMITED = IoMax(MAX, MAX, MAX, MAX)


class PolicyChangeLog:
    """All changes of policies since an instance was made, in the order they were made in.

    A file in memory that grows by a line with each. Made before the processes that share it are forked, and so also
    known to one that is forked later; safe in every process. What it costs a work to learn that there is nothing new is
    one fstat(2).
    """

    def __init__(self) -> None:
        self.file = os.memfd_create("rcon-changes")
        fcntl.fcntl(self.file, fcntl.F_SETFL, os.O_APPEND)

    def add(self, policy: str, key: str, value: str) -> None:
        """Tell of one."""
        os.write(self.file, json.dumps([policy, key, value]).encode() + b"\n")

    def size(self) -> int:
        """How many bytes there are: more after each change."""
        return os.fstat(self.file).st_size

    def since(self, place: int) -> tuple[list[tuple[str, str, str]], int]:
        """The changes from this byte on, each policy, key and value; and how far that is."""
        data = os.pread(self.file, self.size() - place, place)
        whole = data[: data.rfind(b"\n") + 1]  # one may be being written just now
        return [tuple(json.loads(line)) for line in whole.splitlines()], place + len(whole)


class LivePolicies:
    """The policies of one process with what has been changed since it read its settings. Thread-safe.

    ``renew`` is told of those that are otherwise now, by name, before any thread goes on with what it had.
    """

    def __init__(
        self,
        policies: Mapping[str, Policy],
        changes: PolicyChangeLog | None,
        renew: Callable[[Mapping[str, Policy]], object],
    ) -> None:
        self._policies = dict(policies)
        self._changes = changes
        self._renew = renew
        self._read = 0
        self._lock = threading.Lock()

    def look(self) -> None:
        """See what is new; hardly ever anything."""
        if self._changes is None or self._changes.size() == self._read:
            return
        with self._lock:
            changes, place = self._changes.since(self._read)
            news: dict[str, Policy] = {}
            for name, key, value in changes:
                news[name] = self._policies[name] = changed(self._policies[name], key, value)
            if news:
                self._renew(news)
            self._read = place

    def current(self, policy: Policy) -> Policy:
        """The policy of this name, as it is now."""
        self.look()
        return self._policies[policy.name]


class Change(NamedTuple):
    """What came of a change: the limit before (None: there was none) and now, as a settings file spells them.

    ``cgroups`` of running work have the new limit, ``kept`` those of single works that go on with theirs.
    """

    policy: Policy
    old: Any
    new: Any
    cgroups: int
    kept: int


def change(
    plan: Plan,
    policies: Mapping[str, Policy],
    instance: Instance,
    changes: PolicyChangeLog,
    name: str,
    key: str,
    value: str,
) -> Change:
    """Change one limit of a policy, of the cgroups of its running work too; call it in one process, one at a time.

    A limit of all work together is in force in each of its cgroups, or nothing was changed. One of each work holds for
    all that begins from now on; a running one keeps its own where it was given more than the policy says, or where the
    kernel refuses (v1: memory below what is in use). A ``timeout`` is of work that begins.

    Raises `SettingsError` for what is no limit, or cannot be enforced here; `KernelError` where the kernel refuses.
    """
    if name not in policies:
        raise SettingsError(f"there is no policy {name!r}", hint=f"one of: {', '.join(sorted(policies))}")
    old = policies[name]
    new = changed(old, key, value)
    hook = plan.plugins.hook
    if plan.verdicts[name].isolation != "process":
        raise SettingsError(
            "its work runs in threads of the server, whose limits stay as they are",
            key=f"policy.{name}",
            hint="change the settings and restart it",
        )
    judge(new, plan.server, instance.hierarchy, hook).check()
    memory = promised(new)
    if memory is not None:
        plan.check_fits(memory, f"policy.{name}.{key}")
    of_each = key.startswith("each.")
    was, wanted = (resources_of(hook, one.each if of_each else one, one) for one in (old, new))
    news = _differing(was, wanted)
    cgroups, kept = _change_all(instance, name, was, news, of_each=of_each)
    changes.add(name, key, value)
    # What another process made meanwhile, by the policy of before.
    cgroups, kept = _change_all(instance, name, was, news, of_each=of_each)
    return Change(new, _limit(old, key), _limit(new, key), cgroups, kept)


def changed(policy: Policy, key: str, value: str) -> Policy:
    """The policy with one limit changed, or without it (``max``).

    ``key`` is such as ``memory``, ``each.timeout`` or ``io./srv.read``. Raises `SettingsError`.
    """
    limits, name = _limits(policy, key)
    in_each = limits is policy.each
    kinds = {field.name: field.type for field in msgspec.structs.fields(Each if in_each else Limits)}
    where = f"policy.{policy.name}.{key}"
    try:
        if name.startswith("io."):
            name, made = "io", _changed_io(limits.io, name.removeprefix("io."), value, where)
        elif name not in kinds or name == "io":
            raise SettingsError("is not a limit that can be set while work runs", hint=one_of(_settable()))
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
    """What ``each.memory`` is a limit of, and its name there."""
    return (policy.each, key.removeprefix("each.")) if key.startswith("each.") else (policy, key)


def _changed_io(now: Mapping[str, IoLimits], name: str, value: str, where: str) -> dict[str, IoLimits]:
    """The limits of all devices with one changed: a key of it, or all of them by a table."""
    device, key = device_and_key(name)
    devices = dict(now)
    if key is None and value != NO_LIMIT:
        devices[device] = convert(value_of("io", value), IoLimits, where)
        return devices
    before = devices.pop(device, None)
    said = {} if before is None or key is None else as_written(before)
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
    """The limit as it is, spelled as in the settings."""
    limits, name = _limits(policy, key)
    if not name.startswith("io."):
        return as_written(getattr(limits, name))
    device, part = device_and_key(name.removeprefix("io."))
    found = limits.io.get(device)
    return as_written(found if found is None or part is None else getattr(found, part))


def _differing(was: Resources, wanted: Resources) -> Resources:
    """Of ``wanted``, what was otherwise; `MAX` for what had a limit and has none."""
    news: dict[str, Any] = {}
    for name in Resources._fields:
        before, after = getattr(was, name), getattr(wanted, name)
        if name not in ("io", "oom_group", "files") and before != after:
            news[name] = MAX if after is None else after
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
    """What is to be written of one rate; None to leave it as it is."""
    if before == after:
        return None
    return MAX if after is None else after


def _change_all(
    instance: Instance, policy: str, was: Resources, news: Resources, *, of_each: bool
) -> tuple[int, int]:
    """Write limits to all cgroups of a policy, or to those of its single works: how many, and how many kept theirs."""
    done: list[tuple[Cgroup, Resources]] = []
    kept = 0
    if news == Resources():
        return 0, 0
    for cgroup in _cgroups(instance, policy, of_each=of_each):
        try:
            before = read_limits(cgroup)
            if of_each and _has_its_own(before, was, news):
                kept += 1
                continue
            _write(cgroup, news, of_each=of_each)
        except KernelError:
            if not cgroup.exists():
                continue
            if of_each:
                kept += 1
                continue
            for one, its in done:
                change_limits(one, _of_before(its, news))
            raise
        done.append((cgroup, before))
    return len(done), kept


def _write(cgroup: Cgroup, news: Resources, *, of_each: bool) -> None:
    """Write limits to a cgroup in use. Of IO on v1, work that is born meanwhile is gathered too. Raises KernelError."""
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
    """Whether it was given more memory than its policy says, before and now."""
    own, old, new = now.memory_max, was.memory_max, news.memory_max
    return isinstance(own, int) and isinstance(old, int) and isinstance(new, int) and own > max(old, new)


def _of_before(before: Resources, news: Resources) -> Resources:
    """Of ``before``, what ``news`` may have changed."""
    kept = {
        name: getattr(before, name)
        for name in Resources._fields
        if name not in ("io", "oom_group", "files") and getattr(news, name) is not None
    }
    return Resources(**kept, io={device: before.io.get(device, _UNLIMITED) for device in news.io})
