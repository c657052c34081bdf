"""A loopback interface, even if it was down before, and a port that only privileged users may bind."""

from __future__ import annotations

import contextlib
import fcntl
import random
import socket
import struct
from collections.abc import Iterator

_SIOCGIFFLAGS, _SIOCSIFFLAGS, _IFF_UP = 0x8913, 0x8914, 1


@contextlib.contextmanager
def local_network() -> Iterator[None]:
    """Set `lo` up within the context (netdevice(7)), and restore it afterwards."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        answer = fcntl.ioctl(control, _SIOCGIFFLAGS, struct.pack("16sh14x", b"lo", 0))
        flags = struct.unpack("16sh14x", answer)[1]
        fcntl.ioctl(control, _SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", flags | _IFF_UP))
        try:
            yield
        finally:
            fcntl.ioctl(control, _SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", flags))


def free_low_port() -> int:
    """Return a free port below 1024."""
    for port in random.sample(range(600, 1024), 400):
        with socket.socket() as attempt, contextlib.suppress(OSError):
            attempt.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            attempt.bind(("127.0.0.1", port))
            return port
    raise OSError("no port below 1024 is free")
