"""Connections of a server's clients, for adapters: how one is cut."""

from __future__ import annotations

import contextlib
import socket
import struct

from rcon_plugins.errors import KernelError
from rcon_plugins.kernel.syscalls import disconnect

_RESET_ON_CLOSE = struct.pack("ii", 1, 0)


def reset_on_close(sock: socket.socket) -> None:
    """Let the closing of a socket reset its connection, and not end it (SO_LINGER, socket(7)). Raises OSError."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)


def cut(sock: socket.socket) -> None:
    """Cut a connection that another thread may be writing to or wait for, and wake that up. Raises OSError.

    The client finds it reset: an end could pass for that of a response. Only where the kernel does not do so at once
    (a Unix socket; see `disconnect`) it is shut down, and reset when it is closed: a client that has read all
    before that finds an end. The socket stays open. Nobody may close it meanwhile.
    """
    reset_on_close(sock)
    with contextlib.suppress(KernelError):
        disconnect(sock.fileno())
        return
    # Not the method of the object: that of a TLS socket would go on without TLS.
    socket.socket.shutdown(sock, socket.SHUT_RDWR)
