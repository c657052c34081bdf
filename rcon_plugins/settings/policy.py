"""Policies: the limits, the identity and the rights of one kind of request, task or command. Immutable data.

The limits of a policy hold for everything that runs under it together, per key where it has one. Its ``each``
limits hold for each request, task or command::

    Policy.make("tenant", per="host", cpu="30%", memory="256M", each={"memory": "128M", "timeout": "20s"})
"""

from __future__ import annotations

import re
from typing import Annotated, Any, ClassVar, Literal, Self

from msgspec import Meta

from rcon_plugins.errors import SettingsError
from rcon_plugins.settings.accounts import Account, PathTemplate
from rcon_plugins.settings.conversion import Size, Umask, Written, convert, dotted
from rcon_plugins.settings.limits import Each, Limits
from rcon_plugins.settings.memory import OnMemory
from rcon_plugins.settings.rights import CapabilityName, FileName, Rlimits, check_capability
from rcon_plugins.settings.units import format_size, show

#: How to confine a request, task or command. ``"auto"`` chooses the cheapest way that enforces the whole policy.
Isolation = Literal["auto", "inline", "thread", "process"]

_COUNT = Meta(ge=1, le=2**63 - 1)
_ID = Meta(ge=1, le=2**32 - 2)
_GROUPS = Meta(max_length=65536)  # NGROUPS_MAX, setgroups(2)


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
    """The attribute that is the key of a policy: each value of it gets a confinement of its own.

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
        raise SettingsError(
            f"{show(value)} is not an attribute of a request, task or command", value=value, hint=hint
        )


#: What an OOM kill ends: the whole request, task or command, or the one process that the kernel chose.
Oom = Literal["group", "process"]


class Policy(Limits, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The limits, the identity and the rights of one kind of work. See `make` for a constructor that reads ``"256M"``.

    These limits hold for everything that runs under the policy together, per value of the attribute ``per``
    where that is set. ``each`` and the keys of the identity apply to each request, task or command;
    `rcon_plugins.identity.resolution` finds the accounts. ``None`` is "not set".
    """

    name: str
    per: Annotated[
        Per | None,
        Meta(
            description="Attribute of the request or task; each value of it has limits of its own.",
            examples=["host"],
        ),
    ] = None
    isolation: Annotated[
        Isolation, Meta(description="How requests, tasks and commands are confined.", examples=["process"])
    ] = "auto"
    concurrency: Annotated[
        Annotated[int, Meta(ge=1, le=65536)] | None,
        Meta(description="Most requests or tasks at once; more are refused.", examples=[8]),
    ] = None
    each: Annotated[
        Each,
        Meta(
            description="Limits of each request, task or command.",
            examples=[{"memory": "128M", "timeout": "20s"}],
        ),
    ] = Each()
    max_uses: Annotated[
        Annotated[int, _COUNT],
        Meta(
            description="Uses after which an executor process is replaced; 1 gives each request or task its own.",
            examples=[1],
        ),
    ] = 1000
    max_result: Annotated[
        Size | None,
        Meta(
            description="Most bytes of the encoded result of a task, or of the exception it raises.",
            examples=["16M"],
        ),
    ] = None
    leave_children: Annotated[
        bool,
        Meta(
            description="Processes that were left behind may continue after a good end.",
            examples=[True],
        ),
    ] = False
    oom: Annotated[
        Oom | None,
        Meta(
            description="What ends when the OOM killer ends a process of a request, task or command: all of it, or "
            'only that process. The default is "group"; for a command whose standard input is a terminal, "process".',
            examples=["process"],
        ),
    ] = None
    on_memory: Annotated[
        OnMemory | None,
        Meta(
            description="Retry a task that ran out of memory, with more.",
            examples=[{"expand": "2x", "up_to": "2G"}],
        ),
    ] = None
    max_deaths: Annotated[
        Annotated[int, _COUNT] | None,
        Meta(description="Kills after which a task is not retried.", examples=[3]),
    ] = None
    dead_letter: Annotated[
        Annotated[str, Meta(min_length=1)] | None,
        Meta(description="Queue for tasks that were killed too often.", examples=["dead"]),
    ] = None

    user: Annotated[
        Account | None,
        Meta(
            description='User to run as: a name, a number, or "owner:PATH".',
            examples=["owner:/srv/{host}"],
        ),
    ] = None
    group: Annotated[
        Account | None,
        Meta(description="Group to run as; the default is the primary group of the user.", examples=["web"]),
    ] = None
    groups: Annotated[
        Annotated[tuple[Account, ...], _GROUPS] | None,
        Meta(description="Supplementary groups; the default is all groups of the user.", examples=[["web"]]),
    ] = None
    capabilities: Annotated[
        tuple[CapabilityName, ...] | None,
        Meta(description='Capabilities to keep, or ["all"].', examples=[["net_bind_service"]]),
    ] = None
    no_new_privs: Annotated[
        bool,
        Meta(
            description="Programs cannot gain privileges (setuid, file capabilities).",
            examples=[True],
        ),
    ] = True
    min_uid: Annotated[
        Annotated[int, _ID], Meta(description="The lowest uid to run as.", examples=[1000])
    ] = 100
    min_gid: Annotated[
        Annotated[int, _ID], Meta(description="The lowest gid to run as.", examples=[1000])
    ] = 100
    allow_root: Annotated[
        bool, Meta(description="Allow to run as root, uid 0 or gid 0.", examples=[False])
    ] = False
    keep_files: Annotated[
        tuple[FileName, ...],
        Meta(
            description='Files of the server that stay open: "stdout", "stderr", or a path.',
            examples=[["stderr", "/var/log/app.log"]],
        ),
    ] = ()
    owner_must_be: Annotated[
        PathTemplate | None,
        Meta(
            description="Path that must belong to the user; else the request, task or command is refused.",
            examples=["/srv/{host}/app.py"],
        ),
    ] = None
    shared_memory: Annotated[
        Literal["private", "server"] | None,
        Meta(
            description="Whether /dev/shm and IPC are the executor's own, or the server's.",
            examples=["server"],
        ),
    ] = None
    umask: Annotated[
        Umask | None,
        Meta(description="Permissions that new files do not get, in octal: umask(2).", examples=["027"]),
    ] = None
    rlimits: Annotated[
        Rlimits,
        Meta(
            description="Limits of each process, setrlimit(2).",
            examples=[{"nofile": 256, "cpu": "10s", "core": 0}],
        ),
    ] = Rlimits()

    belongs: ClassVar[dict[str, str]] = {
        "timeout": 'it is a limit of each request or task: each = { timeout = "20s" }',
        "uid": "write user",
        "gid": "write group",
        **{name: f"it belongs under rlimits: rlimits.{name}" for name in Rlimits.__struct_encode_fields__},
    }

    @classmethod
    def make(cls, name: str, /, **keys: object) -> Self:
        """Return a policy from values in the form of a settings file, checked in the same way.

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
        self._check_identity()
        self._check_isolation()
        if self.result_limit < _SHORTEST_MAX_RESULT:
            raise SettingsError(
                f"{show(format_size(self.result_limit))} is too short to hold an error",
                key="max_result",
                value=self.max_result,
                hint=f"at least {_SHORTEST_MAX_RESULT}",
            )
        self.each.check_within(self)
        self._check_on_memory()

    def _check_identity(self) -> None:
        for name in ("group", "groups", "owner_must_be"):
            if self.user is None and getattr(self, name) is not None:
                raise SettingsError(
                    f"{name} has no effect without user",
                    key=name,
                    value=getattr(self, name),
                    hint='write the user too: a name, a number, or "owner:/srv/{host}"',
                )
        if self.keep_files and (self.user is None or self.isolation == "thread"):
            raise SettingsError(
                "only a process with a user of its own loses files",
                key="keep_files",
                value=self.keep_files,
                hint="leave it out",
            )
        for number, capability in enumerate(self.capabilities or (), 1):
            check_capability(capability, f"capabilities[{number}]")
        if self.capabilities and "all" in self.capabilities and len(self.capabilities) > 1:
            raise SettingsError(
                '"all" includes the others',
                key="capabilities",
                value=self.capabilities,
                hint='write ["all"], or leave "all" out',
            )

    def _check_on_memory(self) -> None:
        limit, more = self.each.memory, self.on_memory
        if more is None:
            return
        if limit is None:
            raise SettingsError(
                "needs each.memory to start from",
                key="on_memory",
                value=more,
                hint='each = { memory = "256M" }',
            )
        if limit.expands:
            raise SettingsError(
                "each.memory expands while the task runs already",
                key="on_memory",
                value=more,
                hint="leave it out, or the table of each.memory",
            )
        if more.up_to <= limit.limit:
            raise SettingsError(
                f"{format_size(more.up_to)} is not above each.memory = {format_size(limit.limit)}",
                key="on_memory.up_to",
                value=more.up_to,
                hint="name more, or leave on_memory out",
            )
        if self.memory is not None and more.up_to > self.memory.most:
            bound = format_size(self.memory.most)
            raise SettingsError(
                f"{format_size(more.up_to)} is never reached: the whole policy is limited to {bound}",
                key="on_memory.up_to",
                value=more.up_to,
                hint=f"at most {bound}",
            )

    def _check_isolation(self) -> None:
        if self.isolation not in ("inline", "thread"):
            return
        beyond = [limit for limit in self.limits_set() if limit.startswith("each.") or limit in _OF_A_PROCESS]
        if beyond:
            raise SettingsError(
                f"a thread cannot have limits of {' and '.join(beyond)}: use a process",
                key="isolation",
                value=self.isolation,
                hint='write "process", or "auto", or leave those limits out',
            )
        if self.shared_memory == "private":
            raise SettingsError(
                "a thread shares the memory of the server",
                key="shared_memory",
                value=self.shared_memory,
                hint='write isolation = "process", or "auto", or leave shared_memory out',
            )
        if self.isolation == "thread" and "rlimits" in self.identity_keys:
            raise SettingsError(
                "rlimits apply to a whole process, and a thread shares that of the server",
                key="isolation",
                value=self.isolation,
                hint='write "process", or "auto", or leave rlimits out',
            )
        if self.isolation == "inline" and self.identity_keys:
            raise SettingsError(
                f"{' and '.join(self.identity_keys)}: a thread of the server could return from that, and so could the "
                "code that it runs",
                key="isolation",
                value=self.isolation,
                hint='write "process", or "auto", or "thread" against mistakes alone',
            )

    def limits_set(self) -> tuple[str, ...]:
        """Return the keys of the limits that are set, as in a settings file: ``("cpu", "each.memory")``."""
        return (*super().limits_set(), *(f"each.{name}" for name in self.each.limits_set()))

    @property
    def retry_keys(self) -> tuple[str, ...]:
        """The keys for retries that are set, for example ``("on_memory", "max_deaths")``."""
        return tuple(name for name in _OF_TRIES if getattr(self, name) is not None)

    @property
    def oom_group(self) -> bool:
        """Whether an OOM kill ends the whole request, task or command."""
        return self.oom != "process"

    @property
    def result_limit(self) -> int:
        """The largest encoded result of a task, in bytes; the default if ``max_result`` is not set."""
        return _MAX_RESULT if self.max_result is None else self.max_result

    @property
    def identity_keys(self) -> tuple[str, ...]:
        """The keys for identity and rights that are set, for example ``("user", "umask")``."""
        written = [name for name in _OF_IDENTITY if getattr(self, name) is not None]
        return (*written, "rlimits") if self.rlimits.written() else tuple(written)


_MAX_RESULT, _SHORTEST_MAX_RESULT = 16 * 2**20, 4096
#: Limits of whole processes, which a thread of the server cannot have.
_OF_A_PROCESS = frozenset({"memory", "memory_high", "swap"})
#: Keys for retries of tasks that were killed.
_OF_TRIES = ("on_memory", "max_deaths", "dead_letter")
#: Keys for identity and rights, which a process keeps until it ends. Also rlimits, which are never None.
_OF_IDENTITY = ("user", "group", "groups", "capabilities", "owner_must_be", "umask")
