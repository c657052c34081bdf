"""The rights of a policy: capabilities, rlimits."""

from __future__ import annotations

import posixpath
import re
from typing import Annotated, Any, ClassVar, Final, Self

import msgspec
from msgspec import Meta

from rcon_plugins.errors import SettingsError
from rcon_plugins.settings.conversion import Duration, Size, Written, did_you_mean
from rcon_plugins.settings.memory import check_a_page
from rcon_plugins.settings.units import format_duration, show

_MANY = Meta(ge=0, le=2**31 - 1)

#: The capabilities of Linux 6.18, without ``cap_``. The kernel layer has the same list; a test compares them.
CAPABILITY_NAMES: Final = (
    "chown", "dac_override", "dac_read_search", "fowner", "fsetid", "kill", "setgid", "setuid",
    "setpcap", "linux_immutable", "net_bind_service", "net_broadcast", "net_admin", "net_raw",
    "ipc_lock", "ipc_owner", "sys_module", "sys_rawio", "sys_chroot", "sys_ptrace", "sys_pacct",
    "sys_admin", "sys_boot", "sys_nice", "sys_resource", "sys_time", "sys_tty_config", "mknod",
    "lease", "audit_write", "audit_control", "setfcap", "mac_override", "mac_admin", "syslog",
    "wake_alarm", "block_suspend", "audit_read", "perfmon", "bpf", "checkpoint_restore",
)  # fmt: skip
#: The number of bits in a capability set of the kernel. A capability without a name here is written as its number.
_CAPABILITY_BITS: Final = 64


class CapabilityName(Written, str):
    """A capability, as capabilities(7) names it, or by number: ``"net_bind_service"``. ``"all"`` is all there are.

    With or without ``cap_``, in any case; kept in small letters and without it.
    """

    __slots__ = ()
    schema: ClassVar[dict[str, Any]] = {"type": "string", "pattern": r"^([A-Za-z_]+|[0-9]{1,2})$"}

    @classmethod
    def parse(cls, value: object) -> Self:
        name = value.lower().removeprefix("cap_") if isinstance(value, str) else ""
        if not re.fullmatch(r"[a-z_]+|[0-9]{1,2}", name):
            raise SettingsError(
                f"{show(value)} is not a capability",
                value=value,
                hint='for example "net_bind_service", as capabilities(7) names them',
            )
        return cls(name)


def check_capability(name: str, key: str) -> None:
    """Raise `SettingsError` for a capability that no kernel has."""
    known = int(name) < _CAPABILITY_BITS if name.isdigit() else name in (*CAPABILITY_NAMES, "all")
    if not known:
        raise SettingsError(
            f"{show(str(name))} is not a capability",
            key=key,
            value=name,
            hint=did_you_mean(name, CAPABILITY_NAMES) or "capabilities(7) lists them",
        )


class FileName(Written, str):
    """A file that the server has open: ``"stdout"``, ``"stderr"``, or its absolute path.

    The path of a directory stands for all files below it.
    """

    __slots__ = ()
    schema: ClassVar[dict[str, Any]] = {
        "anyOf": [{"enum": ["stdout", "stderr"]}, {"type": "string", "pattern": r"^/[^/]"}]
    }

    @classmethod
    def parse(cls, value: object) -> Self:
        if isinstance(value, str) and value in cls.schema["anyOf"][0]["enum"]:
            return cls(value)
        if (
            not isinstance(value, str)
            or not value.startswith("/")
            or posixpath.normpath(value) in ("/", "//")
        ):
            raise SettingsError(
                f"{show(value)} is not a file",
                value=value,
                hint='"stdout", "stderr", or a path: "/var/log/app.log"',
            )
        return cls(posixpath.normpath(value))


class Rlimits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Limits of each process: setrlimit(2). ``None`` is "not set". Each is both the soft and the hard limit."""

    nofile: Annotated[
        Annotated[int, Meta(ge=16, le=2**31 - 1)] | None,
        Meta(description="Open files of a process, including those of the server.", examples=[256]),
    ] = None
    nproc: Annotated[
        Annotated[int, _MANY] | None,
        Meta(description="Processes and threads of the user on the whole machine.", examples=[100]),
    ] = None
    core: Annotated[Size | None, Meta(description="Bytes of a core dump; 0 is none.", examples=[0])] = None
    fsize: Annotated[
        Size | None, Meta(description="Most bytes of a file that is written.", examples=["10M"])
    ] = None
    as_: Annotated[Size | None, Meta(description="Bytes of address space of a process.", examples=["1G"])] = (
        msgspec.field(default=None, name="as")
    )
    cpu: Annotated[
        Duration | None, Meta(description="CPU time of a process, in whole seconds.", examples=["10s"])
    ] = None
    stack: Annotated[Size | None, Meta(description="Bytes of stack of a process.", examples=["8M"])] = None
    data: Annotated[Size | None, Meta(description="Bytes of data of a process.", examples=["512M"])] = None
    memlock: Annotated[
        Size | None, Meta(description="Bytes that a process may lock into memory.", examples=["64K"])
    ] = None
    msgqueue: Annotated[
        Size | None, Meta(description="Bytes in POSIX message queues of the user.", examples=["800K"])
    ] = None
    sigpending: Annotated[
        Annotated[int, _MANY] | None, Meta(description="Signals queued for the user.", examples=[1000])
    ] = None

    def __post_init__(self) -> None:
        for name in ("as", "stack", "data"):
            check_a_page(self.written().get(name), name)
        if self.cpu is not None and self.cpu % 1:
            raise SettingsError(
                f"{format_duration(self.cpu)} is not a whole number of seconds",
                key="cpu",
                value=self.cpu,
                hint='at least "1s"; wall time can be shorter: each = { timeout = "500ms" }',
            )

    def written(self) -> dict[str, int]:
        """Return the limits that are set, by the names of setrlimit(2) in lower case: ``{"nofile": 256}``.

        The values are in bytes or whole seconds, or are counts.
        """
        fields = zip(self.__struct_encode_fields__, self.__struct_fields__, strict=True)
        return {
            name: int(value) for name, attribute in fields if (value := getattr(self, attribute)) is not None
        }
