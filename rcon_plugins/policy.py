"""Policies: what one kind of work may use. Immutable data that names nothing of the kernel's.

A policy's own limits hold for all the work under it together, per key where it has one. Its ``each``
limits hold for every single work::

    Policy.make("tenant", per="host", cpu="30%", memory="256M", each={"memory": "128M", "timeout": "20s"})
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

import msgspec
from msgspec import Meta

from rcon_plugins.conversion import convert, dotted
from rcon_plugins.errors import SettingsError
from rcon_plugins.units import CpuList, Cpus, Duration, Size, Written, show

#: How work gets into a confinement. ``"auto"`` is the cheapest that enforces all the policy asks for.
Isolation = Literal["auto", "inline", "thread", "process"]

_PAGE = 4096
_COUNT = Meta(ge=1, le=2**63 - 1)


class PolicyName(Written, str):
    """The name of a policy. It becomes the name of a directory, so it is short and plain."""

    __slots__ = ()
    schema: ClassVar[dict[str, Any]] = {
        "type": "string",
        "pattern": r"^[a-z][a-z0-9_-]{0,62}$",
        "not": {"enum": ["notify_on_release", "release_agent", "tasks"]},
    }

    @classmethod
    def parse(cls, value: object) -> Self:
        if not isinstance(value, str) or not re.fullmatch(cls.schema["pattern"], value):
            raise SettingsError(
                f"{show(value)} cannot be the name of a policy",
                value=value,
                hint="a small letter, then at most 62 small letters, digits, - and _",
            )
        if value in cls.schema["not"]["enum"]:
            raise SettingsError(
                f"{show(value)} cannot be the name of a policy: the kernel has a file of that name",
                value=value,
                hint=f'for example "{value}-policy"',
            )
        return cls(value)


class Per(Written, str):
    """The attribute of a work that is its key: each value of it gets a confinement of its own.

    ``"host"``, ``"path"``, ``"method"``, ``"remote_addr"``, ``"remote_user"``, ``"task"``, ``"queue"``,
    ``"command"``, ``"header:NAME"`` (a request header, in any case; kept in small letters) or ``"path:N"``
    (the N-th segment of the path, from 1).
    """

    __slots__ = ()
    names: ClassVar[tuple[str, ...]] = (
        "host",
        "path",
        "method",
        "remote_addr",
        "remote_user",
        "task",
        "queue",
        "command",
    )
    schema: ClassVar[dict[str, Any]] = {
        "anyOf": [
            {"enum": list(names)},
            {"type": "string", "pattern": r"^(header:[A-Za-z0-9!#$%&'*+.^_`|~-]+|path:[1-9][0-9]?)$"},
        ]
    }

    @classmethod
    def parse(cls, value: object) -> Self:
        if isinstance(value, str):
            if value in cls.names:
                return cls(value)
            if re.fullmatch(cls.schema["anyOf"][1]["pattern"], value):
                return cls(value.lower())
        hint = f"one of: {', '.join(cls.names)}, header:NAME, path:N (its N-th segment, from 1)"
        raise SettingsError(f"{show(value)} is not an attribute of work", value=value, hint=hint)


class IoLimits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How much may be read from and written to one device. ``None`` is "not set"."""

    read: Annotated[Size | None, Meta(description="Bytes read per second.", examples=["10M"])] = None
    write: Annotated[Size | None, Meta(description="Bytes written per second.", examples=["5M"])] = None
    read_iops: Annotated[
        Annotated[int, _COUNT] | None, Meta(description="Reads per second.", examples=[1000])
    ] = None
    write_iops: Annotated[
        Annotated[int, _COUNT] | None, Meta(description="Writes per second.", examples=[500])
    ] = None

    def __post_init__(self) -> None:
        for name in ("read", "write"):
            if getattr(self, name) == 0:
                raise SettingsError("0 bytes per second never end", key=name, value=0, hint='at least "1"')
        if all(getattr(self, name) is None for name in self.__struct_fields__):
            raise SettingsError("sets no limit", hint=f"one of: {', '.join(self.__struct_fields__)}")


class Limits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Limits that hold for all the processes and threads under them together. ``None`` is "not set"."""

    cpu: Annotated[
        Cpus | None,
        Meta(description="CPU time per time: of one CPU, so that 150% is one and a half.", examples=["30%"]),
    ] = None
    cpu_weight: Annotated[
        Annotated[int, Meta(ge=1, le=10000)] | None,
        Meta(description="Share of the CPUs when they are scarce; what sets none has 100.", examples=[50]),
    ] = None
    cpus: Annotated[
        CpuList | None, Meta(description="The CPUs that may be run on, by number.", examples=["0-1"])
    ] = None
    memory: Annotated[
        Size | None,
        Meta(
            description="Bytes of memory; work that needs more is killed.",
            examples=["256M"],
        ),
    ] = None
    memory_high: Annotated[
        Size | None,
        Meta(description="Bytes of memory above which work is slowed down.", examples=["200M"]),
    ] = None
    swap: Annotated[
        Size | None, Meta(description="Bytes of swap, besides the memory; 0 is none.", examples=[0])
    ] = None
    io: Annotated[
        Mapping[str, IoLimits],
        Meta(
            description="Limits per device: by a path on it, or MAJOR:MINOR.",
            examples=[{"/srv": {"read": "10M", "write": "5M"}}],
        ),
    ] = {}
    pids: Annotated[
        Annotated[int, Meta(ge=1, le=4194304)] | None,
        Meta(description="Processes and threads at once.", examples=[64]),
    ] = None

    #: Where a key that is unknown here belongs; for error messages.
    belongs: ClassVar[dict[str, str]] = {}

    def __post_init__(self) -> None:
        for name in ("memory", "memory_high"):
            size = getattr(self, name)
            if size is not None and size < _PAGE:
                raise SettingsError(
                    f"{size} bytes are less than one page", key=name, value=size, hint=f'write "{size}M"?'
                )
        if self.memory_high is not None:
            self._check_memory_high(self.memory_high)
        for device in self.io:
            _check_device(device)

    def _check_memory_high(self, high: Size) -> None:
        if self.memory is None:
            raise SettingsError(
                "without memory, work above memory_high can be slowed down for ever",
                key="memory_high",
                value=high,
                hint=f'set memory too, above "{high}"',
            )
        if high >= self.memory:
            raise SettingsError(
                f"{high} is never reached under memory = {self.memory}",
                key="memory_high",
                value=high,
                hint="set it below memory, or leave it out",
            )

    def asks(self) -> tuple[str, ...]:
        """The limits that are set, as settings spell them: ``("cpu", "memory")``."""
        return tuple(name for name in self.__struct_fields__ if name in _LIMITS and _is_set(self, name))


class Each(Limits, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Limits of every single work."""

    timeout: Annotated[
        Duration | None,
        Meta(description="Wall time; work that takes longer is killed.", examples=["20s"]),
    ] = None

    belongs: ClassVar[dict[str, str]] = dict.fromkeys(
        ("per", "isolation", "concurrency", "max_works"), "it belongs to the policy, not under each"
    )


class Policy(Limits, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What one kind of work may use. See `make` for a constructor that reads ``"256M"``.

    The limits here hold for all the work under the policy together: per value of the attribute ``per``
    where that is set. ``each`` holds for every single work.
    """

    name: str
    per: Annotated[
        Per | None,
        Meta(description="Attribute of the work; each value of it has limits of its own.", examples=["host"]),
    ] = None
    isolation: Annotated[
        Isolation, Meta(description="How work gets into its confinement.", examples=["process"])
    ] = "auto"
    concurrency: Annotated[
        Annotated[int, Meta(ge=1, le=65536)] | None,
        Meta(description="Works under way at once; more are refused.", examples=[8]),
    ] = None
    each: Annotated[
        Each,
        Meta(description="Limits of every single work.", examples=[{"memory": "128M", "timeout": "20s"}]),
    ] = Each()
    max_works: Annotated[
        Annotated[int, _COUNT],
        Meta(
            description="Works after which an executor process is replaced; 1: each has its own.",
            examples=[1],
        ),
    ] = 1000

    belongs: ClassVar[dict[str, str]] = {
        "timeout": 'it is a limit of every single work: each = { timeout = "20s" }'
    }

    @classmethod
    def make(cls, name: str, /, **keys: object) -> Self:
        """A policy from what a settings file would hold, checked alike.

        ``Policy.make("batch", cpu="50%", each={"memory": "512M"})``. Raises `SettingsError` with the key,
        as ``policy.batch.each.memory``.
        """
        if "name" in keys:
            raise SettingsError(
                "unknown key",
                key=dotted(dotted("policy", name), "name"),
                hint="the name is that of the table: [policy.NAME]",
            )
        key = dotted("policy", convert(name, PolicyName, "policy"))
        return convert({"name": name, **keys}, cls, key)

    def __post_init__(self) -> None:
        super().__post_init__()
        PolicyName.parse(self.name)
        self._check_isolation()
        _check_each(self.each, self, "each")
        for device, limits in self.each.io.items():
            if device in self.io:
                _check_each(limits, self.io[device], dotted("each.io", device))
        if self.each.cpus and self.cpus and not self.each.cpus.numbers <= self.cpus.numbers:
            raise SettingsError(
                f"{self.each.cpus} is not within cpus = {self.cpus} of the whole policy",
                key="each.cpus",
                value=self.each.cpus,
                hint="name only CPUs that the policy has",
            )

    def _check_isolation(self) -> None:
        if self.isolation == "thread":
            raise SettingsError(
                'isolation = "thread" is not available yet',
                key="isolation",
                value=self.isolation,
                hint='"process" keeps all the limits, "inline" those on CPU time and pids',
            )
        beyond = [limit for limit in self.asks() if limit.startswith("each.") or limit in _OF_A_PROCESS]
        if self.isolation == "inline" and beyond:
            raise SettingsError(
                f"a thread cannot be held to {' and '.join(beyond)}: that takes a process",
                key="isolation",
                value=self.isolation,
                hint='write "process", or "auto", or leave those limits out',
            )

    def asks(self) -> tuple[str, ...]:
        """The limits that are set, as settings spell them: ``("cpu", "each.memory")``."""
        return (*super().asks(), *(f"each.{name}" for name in self.each.asks()))


_LIMITS = frozenset(Each.__struct_fields__)
#: Limits that belong to a process, so that a thread of the server cannot be held to them.
_OF_A_PROCESS = frozenset({"memory", "memory_high", "swap"})
#: Limits where a single work's above the whole policy's would never be reached.
_COMPARED = ("cpu", "memory", "swap", "pids", "read", "write", "read_iops", "write_iops")


def _is_set(limits: Limits, name: str) -> bool:
    return bool(limits.io) if name == "io" else getattr(limits, name) is not None


def _check_device(device: str) -> None:
    path = device.startswith("/") and "\0" not in device
    if not path and not re.fullmatch(r"\d{1,10}:\d{1,10}", device, re.ASCII):
        raise SettingsError(
            f"{show(device)} is not a device",
            key=dotted("io", device),
            value=device,
            hint='an absolute path on it, such as "/srv", or "254:0"',
        )


def _check_each(each: msgspec.Struct, whole: msgspec.Struct, key: str) -> None:
    """Refuses a limit of a single work above that of all work together: it would never be reached."""
    for name in _COMPARED:
        own, bound = getattr(each, name, None), getattr(whole, name, None)
        if own is not None and bound is not None and own > bound:
            raise SettingsError(
                f"{own} is never reached: all work of the policy together has {bound}",
                key=f"{key}.{name}",
                value=own,
                hint=f"at most {bound}, or leave it out",
            )
