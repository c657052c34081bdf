"""The client of one request, where its socket is known: to see that it has gone, and to wait for it no longer."""

from __future__ import annotations

import enum
import select
import socket
import threading
import time
from collections.abc import Callable
from typing import Final

from rcon_plugins.connections import cut, reset_on_close

#: How often an executor that has something to say is listened to after its client has gone: what ends the work may be
#: among it. One that never comes to an end would be listened to for ever.
_LAST_WORDS: Final = 16


class ClientGone(Exception):
    """Raised when the client has closed its connection, or its half of it."""


class Stage(enum.Enum):
    """What the request's thread may be waiting for."""

    EXECUTOR = enum.auto()
    #: The server reads the request's body from the client.
    BODY = enum.auto()
    #: The server has a part of the response, and writes it to the client.
    RESPONSE = enum.auto()
    #: Nothing of ours: the connection is the server's again, which may serve the next request on it.
    NOTHING = enum.auto()


class Client:
    """The client's socket, or the lack of it. Belongs to the request's thread, but for `deadline`.

    ``wait_to_receive`` and ``wait_to_send`` wait for the executor's channel and raise `ClientGone`; None without a
    socket: then nobody but the executor is waited for.
    """

    __slots__ = (
        "_channel",
        "_late",
        "_lock",
        "_looks",
        "_receiving",
        "_sending",
        "_socket",
        "_stage",
        "wait_to_receive",
        "wait_to_send",
    )

    def __init__(self, sock: socket.socket | None, channel: int) -> None:
        self._socket = sock
        self._channel = channel
        self._lock = threading.Lock()
        self._stage = Stage.EXECUTOR
        self._late = False
        self._looks = 0
        self._receiving: select.poll | None = None
        self._sending: select.poll | None = None
        self.wait_to_receive: Callable[[], None] | None = None
        self.wait_to_send: Callable[[], None] | None = None
        if sock is not None:
            self.wait_to_receive = self._wait_to_receive
            self.wait_to_send = self._wait_to_send

    @property
    def known(self) -> bool:
        """Whether there is a socket."""
        return self._socket is not None

    def enter(self, stage: Stage) -> bool:
        """The thread goes on to wait for something else; False if the deadline has come, and it must not."""
        if self._socket is None:
            return True
        with self._lock:
            if self._stage is Stage.NOTHING:
                return True
            self._stage = stage
            return not self._late

    def release(self) -> None:
        """The client is not watched any more, and `deadline` no longer touches its socket."""
        self.wait_to_receive = self.wait_to_send = None
        with self._lock:
            self._stage = Stage.NOTHING

    def deadline(self) -> None:
        """The work was ended: wake its thread up if it waits for the client. Called by another thread, once."""
        with self._lock:
            self._late = True
            try:
                if self._socket is None:
                    return
                if self._stage is Stage.BODY:
                    # Not the method of the object: that of a TLS socket would go on without TLS.
                    socket.socket.shutdown(self._socket, socket.SHUT_RD)  # the answer can still be written
                elif self._stage is Stage.RESPONSE:
                    cut(self._socket)
            except OSError:
                pass  # it is gone already

    def reset(self) -> None:
        """Cut the connection, so that no client takes that for the end of a response."""
        if self._socket is None:
            return
        try:
            reset_on_close(self._socket)
            self._socket.close()
        except OSError:
            pass  # it is gone already

    def pause(self, seconds: float) -> None:
        """Do nothing for a while. Raises `ClientGone`."""
        if self.wait_to_receive is None:
            time.sleep(seconds)
        elif self._watching(0).poll(seconds * 1000):
            raise ClientGone

    def _wait_to_receive(self) -> None:
        if self._receiving is None:
            self._receiving = self._watching(select.POLLIN)
        self._wait(self._receiving)

    def _wait_to_send(self) -> None:
        if self._sending is None:
            self._sending = self._watching(select.POLLOUT)
        self._wait(self._sending)

    def _wait(self, poll: select.poll) -> None:
        ready = [descriptor for descriptor, _ in poll.poll()]
        if ready != [self._channel]:
            self._looks += 1
            if self._channel not in ready or self._looks > _LAST_WORDS:
                raise ClientGone

    def _watching(self, events: int) -> select.poll:
        """A poll for the client's leaving, and these events of the channel."""
        client = self._socket.fileno() if self._socket is not None else -1
        if client < 0:
            raise ClientGone
        poll = select.poll()
        if events:
            poll.register(self._channel, events)
        poll.register(client, select.POLLRDHUP)
        return poll
