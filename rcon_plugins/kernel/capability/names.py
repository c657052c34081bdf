"""The names of capabilities, and which of them the running kernel has (capabilities(7))."""

from __future__ import annotations

import os
from functools import cache

from rcon_plugins.errors import KernelError

CAP_CHOWN = 0
CAP_DAC_OVERRIDE = 1
CAP_DAC_READ_SEARCH = 2
CAP_FOWNER = 3
CAP_FSETID = 4
CAP_KILL = 5
CAP_SETGID = 6
CAP_SETUID = 7
CAP_SETPCAP = 8
CAP_LINUX_IMMUTABLE = 9
CAP_NET_BIND_SERVICE = 10
CAP_NET_BROADCAST = 11
CAP_NET_ADMIN = 12
CAP_NET_RAW = 13
CAP_IPC_LOCK = 14
CAP_IPC_OWNER = 15
CAP_SYS_MODULE = 16
CAP_SYS_RAWIO = 17
CAP_SYS_CHROOT = 18
CAP_SYS_PTRACE = 19
CAP_SYS_PACCT = 20
CAP_SYS_ADMIN = 21
CAP_SYS_BOOT = 22
CAP_SYS_NICE = 23
CAP_SYS_RESOURCE = 24
CAP_SYS_TIME = 25
CAP_SYS_TTY_CONFIG = 26
CAP_MKNOD = 27
CAP_LEASE = 28
CAP_AUDIT_WRITE = 29
CAP_AUDIT_CONTROL = 30
CAP_SETFCAP = 31
CAP_MAC_OVERRIDE = 32
CAP_MAC_ADMIN = 33
CAP_SYSLOG = 34
CAP_WAKE_ALARM = 35
CAP_BLOCK_SUSPEND = 36
CAP_AUDIT_READ = 37
CAP_PERFMON = 38  # Linux 5.8
CAP_BPF = 39  # Linux 5.8
CAP_CHECKPOINT_RESTORE = 40  # Linux 5.9

#: As libcap writes them, by number.
NAMES: tuple[str, ...] = tuple(
    name.lower()
    for name, _ in sorted(
        ((name, number) for name, number in globals().items() if name.startswith("CAP_")),
        key=lambda item: item[1],
    )
)
NUMBERS: dict[str, int] = {name: number for number, name in enumerate(NAMES)}

#: A capability set of the kernel has so many bits.
BITS = 64

_LAST = "/proc/sys/kernel/cap_last_cap"


def name_of(number: int) -> str:
    """``cap_net_raw``; the bare number, as libcap writes it, where a newer kernel has one without a name here."""
    return NAMES[number] if number < len(NAMES) else str(number)


def number_of(name: str) -> int:
    """The number of ``cap_net_raw``, ``net_raw`` or ``13``, in any case. Raises `ValueError`."""
    text = name.strip().lower()
    if text.isascii() and text.isdigit() and int(text) < BITS:
        return int(text)
    number = NUMBERS.get(text, NUMBERS.get(f"cap_{text}"))
    if number is None:
        raise ValueError(
            f"{name!r} is not a capability; capabilities(7) lists them, for example net_bind_service"
        )
    return number


@cache
def last() -> int:
    """The highest capability of the running kernel (``/proc/sys/kernel/cap_last_cap``, Linux 3.2).

    Raises `KernelError` where that cannot be read.
    """
    try:
        descriptor = os.open(_LAST, os.O_RDONLY | os.O_CLOEXEC)
        try:
            return int(os.read(descriptor, 32))
        finally:
            os.close(descriptor)
    except OSError as error:
        raise KernelError.from_oserror(error, path=_LAST, hint="mount proc at /proc") from None
