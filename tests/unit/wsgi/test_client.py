"""The client's socket: a client that has gone is noticed, and nobody waits for one past the deadline."""

from __future__ import annotations

import contextlib
import json
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from rcon_plugins.executors.channel import Channel, ChannelClosed
from rcon_plugins.outcome import Outcome
from rcon_wsgi import ResponseCut, wire
from tests.unit.wsgi.peer import DONE, END, NUMBER, START, START_500, Meeting, data, meeting, only

PATIENCE = 60.0
TIMEOUT = Outcome(ending="timeout", policy="tenant", limit="each.timeout")


@contextlib.contextmanager
def connected() -> Iterator[tuple[socket.socket, socket.socket]]:
    """A server's and a client's end of a TCP connection."""
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        socket.create_connection(listener.getsockname()) as client,
    ):
        server, _ = listener.accept()
        with server:
            server.settimeout(PATIENCE)
            client.settimeout(PATIENCE)
            yield server, client


def in_thread(act: Callable[[], object]) -> threading.Thread:
    def run() -> None:
        with contextlib.suppress(OSError, ChannelClosed):
            act()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread


def ends(act: Callable[[], object]) -> Any:
    """What is raised or returned, within the time."""
    result: list[object] = []

    def run() -> None:
        try:
            result.append(act())
        except BaseException as error:
            result.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    assert result, "it hangs"
    return result[0]


def all_of(sock: socket.socket) -> bytes:
    return b"".join(iter(lambda: sock.recv(1 << 20), b""))


FLOODS = {
    "texts": [(wire.ERRORS, b"x")],
    "chunks": [(wire.DATA, b"x")],
    "large chunks": [(wire.DATA, b"x" * 100_000)],
}


@pytest.mark.parametrize("name", FLOODS)
def test_a_client_that_left_is_noticed_while_the_executor_floods(name: str) -> None:
    with connected() as (sock, client), meeting(sock) as met:
        client.close()

        def flood() -> None:
            met.says(START, end=False)
            while True:
                met.says(*FLOODS[name] * 100, end=False)

        flooding = in_thread(flood)
        assert isinstance(ends(met.server.run), ResponseCut)
        assert [ending for ending, _ in met.admission.settled] == ["aborted"]
        met.admission.channel.close()
        flooding.join(PATIENCE)


def test_a_client_that_left_is_noticed_in_the_middle_of_a_frame() -> None:
    with connected() as (sock, client), meeting(sock) as met:
        met.peer.sendall(struct.pack("!BI", wire.START, 100) + b"half")
        client.close()
        assert isinstance(ends(met.server.run), ResponseCut)


def test_a_client_that_left_is_noticed_while_the_executor_does_not_read() -> None:
    with connected() as (sock, client), meeting(sock, {"HTTP_X": "x" * 3_000_000}) as met:
        client.close()
        assert isinstance(ends(met.server.run), ResponseCut)
        assert [ending for ending, _ in met.admission.settled] == ["aborted"]


def test_the_end_of_the_work_is_noticed_while_the_executor_does_not_read() -> None:
    with connected() as (sock, _), meeting(sock, {"HTTP_X": "x" * 3_000_000}) as met:
        threading.Timer(0.2, met.admission.channel.hang_up).start()
        assert json.loads(ends(met.server.run))["status"] == 503
        assert [ending for ending, _ in met.admission.settled] == ["died"]


def test_frames_that_are_here_are_taken_though_the_client_left() -> None:
    with connected() as (sock, client), meeting(sock) as met:
        met.says(START, data(b"one"), END, DONE)
        client.close()
        assert met.server.run() == b"one"
        assert met.admission.settled == [("ok", "")]


def time_out(met: Meeting) -> None:
    """What the supervisor does at the deadline."""
    met.admission.outcomes["killed"] = TIMEOUT
    met.admission.channel.hang_up()
    assert met.admission.on_deadline is not None
    met.admission.on_deadline()


class FromClient:
    """A server's ``wsgi.input``: blocks until the client sends."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self.reading = threading.Event()

    def read(self, size: int) -> bytes:
        self.reading.set()
        return self._socket.recv(size)


WHOLE = {
    "a body of its length": (("200 OK", [("Content-Length", "5")]), [data(b"hel"), data(b"lo")], {}),
    "HEAD": (("200 OK", [("Content-Length", "5")]), [data(b"")], {"REQUEST_METHOD": "HEAD"}),
    "no content": (("204 No Content", []), [data(b"")], {}),
}


@pytest.mark.parametrize("name", WHOLE)
def test_a_client_may_leave_once_it_has_the_whole_response(name: str) -> None:
    """The application ends later: its executor is not killed, and its work counts as ok."""
    start, chunks, environ = WHOLE[name]
    with connected() as (sock, client), meeting(sock, environ) as met:
        met.says((wire.START, NUMBER + wire.encode_start(*start)), *chunks, end=False)
        result = met.server.begin()
        assert [next(result) for _ in chunks] == [chunk for _, chunk in chunks]
        client.close()
        thread = threading.Timer(0.2, met.says, (END, DONE))
        thread.start()
        assert ends(lambda: list(result)) == []
        thread.join()
        result.close()
        assert met.admission.settled == [("ok", "")]


def test_a_client_that_left_before_it_had_all_is_noticed() -> None:
    start = (wire.START, NUMBER + wire.encode_start("200 OK", [("Content-Length", "6")]))
    with connected() as (sock, client), meeting(sock) as met:
        met.says(start, data(b"hello"), end=False)
        result = met.server.begin()
        assert next(result) == b"hello"
        client.close()
        assert isinstance(ends(lambda: next(result)), ResponseCut)


@pytest.mark.parametrize("begun", [False, True])
def test_a_body_that_does_not_come_is_not_waited_for_past_the_deadline(begun: bool) -> None:
    with connected() as (sock, client):
        body = FromClient(sock)
        with meeting(sock, {"wsgi.input": body}) as met:
            read = (wire.READ, wire.encode_size(5))
            met.says(*([START, data(b"one"), read] if begun else [read]), end=False)

            def late() -> None:
                assert body.reading.wait(PATIENCE)
                time.sleep(0.1)
                time_out(met)

            deadline = in_thread(late)
            result = ends(met.server.run)
            deadline.join(PATIENCE)
            if begun:
                assert isinstance(result, ResponseCut)
            else:
                assert json.loads(result)["limit"] == "each.timeout"
                assert met.server.status == "504 Gateway Timeout"
                sock.sendall(b"HTTP/1.1 504")  # it can still be answered
                assert client.recv(100) == b"HTTP/1.1 504"
                assert sock.recv(1) == b""  # and a server that keeps connections finds this one at its end


def is_full(sock: socket.socket) -> bool:
    """Whether what is written next has to wait for the client."""
    poll = select.poll()
    poll.register(sock, select.POLLOUT)
    return not poll.poll(0)


def test_a_client_that_does_not_read_is_not_waited_for_past_the_deadline() -> None:
    with connected() as (sock, client), meeting(sock) as met:
        met.says(START, data(b"x"), end=False)
        result = met.server.begin()
        next(result)
        sock.settimeout(None)

        def late() -> None:
            while not is_full(sock):
                time.sleep(0.01)
            time_out(met)

        deadline = in_thread(late)
        assert isinstance(ends(lambda: sock.sendall(b"x" * 50_000_000)), OSError)
        deadline.join(PATIENCE)
        result.close()
        sock.close()
        with pytest.raises(ConnectionResetError):  # not an end that could pass for that of the response
            all_of(client)


@pytest.mark.parametrize("sent", [b"", b"a part"])
def test_a_client_that_reads_finds_no_end_of_the_response_at_the_deadline(sent: bytes) -> None:
    """Also where all that was written has gone out, and nothing is left to be taken back."""
    with connected() as (sock, client), meeting(sock) as met:
        met.says(START, data(b"x"), end=False)
        result = met.server.begin()
        next(result)
        if sent:
            sock.sendall(sent)
            assert client.recv(100) == sent
        time_out(met)
        with pytest.raises(ConnectionResetError):  # before the server has noticed, too
            all_of(client)
        with pytest.raises(ConnectionError):
            sock.sendall(b"the rest")
        result.close()


def test_a_chunk_is_not_handed_over_past_the_deadline() -> None:
    with connected() as (sock, _), meeting(sock) as met:
        met.says(START, data(b"one"), data(b"two"), end=False)
        result = met.server.begin()
        met.admission.on_deadline()  # type: ignore[misc]
        with pytest.raises(ResponseCut):
            next(result)


def test_a_response_that_has_not_begun_at_the_deadline_becomes_a_problem() -> None:
    with connected() as (sock, client), meeting(sock) as met:
        met.says(START_500, data(b"x"), end=False)
        threading.Timer(0.2, time_out, (met,)).start()
        assert json.loads(ends(met.server.run))["limit"] == "each.timeout"
        sock.sendall(b"it")
        assert client.recv(10) == b"it"


FINISHED: dict[str, tuple[tuple[int, bytes], ...]] = {
    "one chunk": (START, only(b"hello"), DONE),
    "a stream": (START, data(b"hello"), DONE),
    "a failure": (START_500, data(b"hello"), DONE),
}


@pytest.mark.parametrize("name", FINISHED)
def test_a_connection_that_was_handed_back_is_never_touched(name: str) -> None:
    """A deadline that comes a moment too late must not hit the next request on it."""
    with connected() as (sock, client), meeting(sock) as met:
        met.says(*FINISHED[name])
        assert met.server.run() == b"hello"
        met.admission.on_deadline()  # type: ignore[misc]
        client.sendall(b"next request")
        assert sock.recv(100) == b"next request"
        sock.sendall(b"next response")
        assert client.recv(100) == b"next response"


def test_the_end_of_a_response_that_is_whole_is_not_cut() -> None:
    """What is past the deadline then is the application's close()."""
    with connected() as (sock, client), meeting(sock) as met:
        met.says(START, only(b"hello"), END, end=False)
        result = met.server.begin()
        assert list(result) == [b"hello"]
        time_out(met)
        sock.sendall(b"hello")
        assert client.recv(10) == b"hello"
        result.close()


def test_a_deadline_finds_no_thread_that_it_could_miss() -> None:
    """Whenever it comes, either the thread does not begin to wait, or it is woken."""
    for delay in range(20):
        with connected() as (sock, _), meeting(sock, {"wsgi.input": FromClient(sock)}) as met:
            met.says((wire.READ, wire.encode_size(5)), end=False)
            deadline = threading.Timer(delay / 10_000, time_out, (met,))
            met.admission.outcomes["killed"] = TIMEOUT
            met.admission.on_deadline = lambda: None  # the deadline may come before there is one
            deadline.start()
            assert json.loads(ends(met.server.run))["status"] == 504
            deadline.join()


def test_without_a_socket_nothing_is_watched() -> None:
    with meeting() as met:
        met.says(START, only(b"hello"), DONE)
        met.server.run()
        assert met.admission.on_deadline is None
        assert isinstance(met.admission.channel, Channel)
