"""Cut off the connection of a server's client. For adapters."""

from __future__ import annotations

import contextlib
import socket
import struct

from rcon_plugins.errors import KernelError
from rcon_plugins.kernel.syscalls import disconnect

_RESET_ON_CLOSE = struct.pack("ii", 1, 0)


def reset_on_close(sock: socket.socket) -> None:
    """Have close() reset the connection instead of ending it (SO_LINGER, socket(7)). Raises OSError."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)


def cut(sock: socket.socket) -> None:
    """Cut off a connection that another thread may write to or wait for, and wake that thread. Raises OSError.

    The client finds the connection reset, since an end could pass for that of a response. Where the kernel cannot reset
    it at once (a Unix socket; see `disconnect`) it is shut down, and reset when it is closed: a client that has read
    everything before that finds an end. The socket stays open, and must not be closed meanwhile.
    """
    reset_on_close(sock)
    with contextlib.suppress(KernelError):
        disconnect(sock.fileno())
        return
    # Not the method of the object: that of a TLS socket would go on without TLS.
    socket.socket.shutdown(sock, socket.SHUT_RDWR)
