"""A connection that is cut: what its client finds, and who waits in it."""

from __future__ import annotations

import socket
import threading

import pytest

from rcon_plugins.connections import cut

PATIENCE = 60.0


def test_a_thread_that_waits_for_a_client_is_woken_and_the_client_finds_a_reset() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.socket() as client:
        client.settimeout(PATIENCE)
        client.connect(listener.getsockname())
        server, _ = listener.accept()
        woken: list[BaseException] = []
        begun = threading.Event()

        def write() -> None:
            begun.set()
            try:
                while True:
                    server.sendall(b"x" * 1_000_000)
            except ConnectionError as error:
                woken.append(error)

        with server:
            writing = threading.Thread(target=write, daemon=True)
            writing.start()
            assert begun.wait(PATIENCE)
            cut(server)
            writing.join(PATIENCE)
            assert woken
            with pytest.raises(ConnectionResetError):
                all(iter(lambda: client.recv(1 << 20), b""))


def test_a_unix_socket_is_shut_down() -> None:
    """It knows no reset."""
    server, client = socket.socketpair()
    with server, client:
        cut(server)
        assert client.recv(1) == b""
        with pytest.raises(BrokenPipeError):
            server.sendall(b"x")


def test_cutting_a_closed_socket_is_an_error() -> None:
    closed = socket.socket()
    closed.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        cut(closed)
