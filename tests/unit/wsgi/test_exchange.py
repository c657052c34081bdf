"""The host's side: whatever an executor says, the client gets a whole response, a problem, or a cut one."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import resource
import socket
import struct
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rcon_plugins.errors import ApplicationError
from rcon_plugins.executors.channel import MAX_PAYLOAD, ChannelClosed, Frame
from rcon_plugins.outcome import Outcome
from rcon_wsgi import ResponseCut, wire
from rcon_wsgi.exchange import Client
from tests.unit.wsgi.peer import DONE, END, FAILED, NUMBER, START, START_500, data, meeting, only

GARBAGE = b"\xc1 is never msgpack"


def test_a_response_of_one_chunk_settles_before_it_is_sent() -> None:
    with meeting() as met:
        met.says(START, only(b"hello"), DONE)
        result = met.server.begin()
        assert result == [b"hello"]
        assert met.admission.settled == [("ok", "")]


def test_a_response_of_one_chunk_with_a_slow_close_keeps_its_length() -> None:
    with meeting() as met:
        met.says(START, only(b"hello"), END, end=False)
        result = met.server.begin()
        assert len(result) == 1
        assert list(result) == [b"hello"]
        assert met.admission.settled == []
        met.says(DONE)
        result.close()
        assert met.admission.settled == [("ok", "")]


def test_a_streamed_response_has_no_length() -> None:
    with meeting() as met:
        met.says(START, data(b"one"), data(b"two"), END, DONE)
        result = met.server.begin()
        assert not hasattr(result, "__len__")
        assert list(result) == [b"one", b"two"]
        result.close()
        assert met.admission.settled == [("ok", "")]


def test_the_application_failed() -> None:
    with meeting() as met:
        met.says(FAILED)
        with pytest.raises(ApplicationError, match="ValueError: a mistake"):
            met.server.run()
        assert met.server.started == []
        assert met.admission.settled == [("error", "ValueError: a mistake")]


def test_a_failure_cannot_forge_lines_of_the_log() -> None:
    class Forging(Exception):
        pass

    Forging.__qualname__ = "Forging\n{}"
    forged = Forging('\x1b[2J\n{"event": "memory"}')
    with meeting() as met:
        met.admission.key = "a.example"
        met.says((wire.ERROR, NUMBER + wire.encode_failure(forged, input_failed=False)))
        with pytest.raises(ApplicationError) as caught:
            met.server.run()
    first, *others = str(caught.value).splitlines()
    assert first.endswith('Forging\\n{}: \\x1b[2J\\n{"event": "memory"}')
    assert all(line.startswith("[tenant a.example] ") for line in others if line)


def test_the_application_failed_in_the_stream() -> None:
    with meeting() as met:
        met.says(START, data(b"one"), FAILED)
        result = met.server.begin()
        assert next(result) == b"one"
        with pytest.raises(ApplicationError, match="a mistake"):
            next(result)
        result.close()
        assert met.admission.settled == [("error", "ValueError: a mistake")]


def test_the_application_failed_in_close() -> None:
    with meeting() as met:
        met.says(START, data(b"one"), END, FAILED)
        result = met.server.begin()
        assert list(result) == [b"one"]
        with pytest.raises(ApplicationError, match="a mistake"):
            result.close()
        assert met.admission.settled == [("error", "ValueError: a mistake")]


PIDS = Outcome(ending="pids", policy="tenant", limit="each.pids")


@pytest.mark.parametrize(
    "frames",
    [(FAILED,), (START_500, only(b"oh no"), DONE), (START_500, data(b"oh "), data(b"no"), END, DONE)],
)
def test_work_that_failed_at_a_limit_is_a_problem(frames: tuple[tuple[int, bytes], ...]) -> None:
    """Also where a framework made a page of it."""
    with meeting() as met:
        met.admission.outcomes["error"] = PIDS
        met.says(*frames)
        document = json.loads(met.server.run())
        assert met.server.status == "503 Service Unavailable"
        assert (document["limit"], document["policy"]) == ("each.pids", "tenant")
        assert len(met.admission.settled) == 1


def test_work_that_failed_at_a_limit_in_the_stream_is_cut() -> None:
    with meeting() as met:
        met.admission.outcomes["error"] = PIDS
        met.says(START, data(b"one"), FAILED)
        result = met.server.begin()
        assert next(result) == b"one"
        with pytest.raises(ResponseCut) as caught:
            next(result)
        assert caught.value.outcome is PIDS
        assert caught.value.errno == errno.ECONNRESET  # servers are quiet about these


def test_an_error_page_of_the_applications_own_is_left_alone() -> None:
    with meeting() as met:
        met.says(START_500, data(b"oh "), data(b"no"), END, DONE)
        assert met.server.run() == b"oh no"
        assert met.server.status == "500 Oh No"
        assert met.admission.settled == [("error", "500 Oh No")]


def test_an_error_page_that_dies_is_a_problem() -> None:
    """It had been held back, so it had not begun."""
    with meeting() as met:
        met.says(START_500, data(b"oh "))
        assert json.loads(met.server.run())["status"] == 503


def test_a_long_error_page_is_streamed() -> None:
    with meeting() as met:
        met.says(START_500, data(b"x" * 60_000), data(b"y" * 60_000), end=False)
        result = met.server.begin()
        assert met.server.status == "500 Oh No"
        met.says(data(b"z"), DONE)
        assert [len(chunk) for chunk in result] == [60_000, 60_000, 1]
        assert met.admission.settled == [("error", "500 Oh No")]


def test_a_deadline_just_before_the_end_is_answered_while_it_can_be() -> None:
    with meeting() as met:
        met.admission.outcomes["ok"] = Outcome(ending="timeout", policy="tenant", limit="each.timeout")
        met.says(START, only(b"late"), DONE)
        assert json.loads(met.server.run())["limit"] == "each.timeout"
        assert met.server.status == "504 Gateway Timeout"


def test_the_server_stops_reading() -> None:
    with meeting() as met:
        met.says(START, data(b"one"), data(b"two"), DONE)
        result = met.server.begin()
        next(result)
        result.close()
        assert [ending for ending, _ in met.admission.settled] == ["aborted"]


def test_the_server_does_not_take_the_headers() -> None:
    with meeting() as met:
        met.says(START, data(b"one"), DONE)

        def refuse(*arguments: Any) -> Any:
            raise ValueError("an invalid header")

        with pytest.raises(ValueError, match="an invalid header"):
            met.server._exchange.begin(refuse)
        assert len(met.admission.settled) == 1


class Body(io.BytesIO):
    """A request's body; what the executor does next is said when it has been read from."""

    then: list[Callable[[], object]]

    def read(self, size: int | None = -1, /) -> bytes:
        self.then.pop(0)()
        return super().read(size)

    def readline(self, size: int | None = -1, /) -> bytes:
        self.then.pop(0)()
        return super().readline(size)


def test_the_body_is_read_as_it_is_asked_for() -> None:
    body = Body(b"the body")
    with meeting(environ={"wsgi.input": body}) as met:
        body.then = [
            lambda: met.says((wire.READLINE, wire.encode_size(100)), end=False),
            lambda: met.says(START, DONE),
        ]
        met.says((wire.READ, wire.encode_size(3)), end=False)
        met.server.run()
        assert met.executor.receive().kind == wire.REQUEST
        assert met.executor.receive() == Frame(wire.INPUT, b"the")
        assert met.executor.receive() == Frame(wire.INPUT, b" body")


class Broken:
    def __init__(self, error: BaseException) -> None:
        self._error = error
        self.then: Callable[[], object] = lambda: None

    def read(self, size: int) -> bytes:
        self.then()
        raise self._error


def test_an_error_of_the_servers_input_goes_over_and_comes_back_as_itself() -> None:
    error = ConnectionResetError(errno.ECONNRESET, "the client")
    broken = Broken(error)
    with meeting(environ={"wsgi.input": broken}) as met:
        back = wire.encode_failure(OSError("as it was raised there"), input_failed=True)
        broken.then = lambda: met.says((wire.ERROR, NUMBER + back))
        met.says((wire.READ, wire.encode_size(3)), end=False)
        with pytest.raises(ConnectionResetError) as caught:
            met.server.run()
        assert caught.value is error
        met.executor.receive()
        kind, payload = met.executor.receive()
        assert kind == wire.INPUT_FAILED
        assert isinstance(wire.decode_input_failure(payload), ConnectionResetError)


def test_an_executor_cannot_claim_an_input_error_there_was_not() -> None:
    with meeting() as met:
        met.says((wire.ERROR, NUMBER + wire.encode_failure(OSError("never"), input_failed=True)))
        with pytest.raises(ApplicationError, match="OSError"):
            met.server.run()


def test_an_exception_that_ends_the_servers_thread_stops_the_request() -> None:
    with meeting(environ={"wsgi.input": Broken(SystemExit())}) as met:
        met.says((wire.READ, wire.encode_size(3)), end=False)
        with pytest.raises(SystemExit):
            met.server.run()
        assert [ending for ending, _ in met.admission.settled] == ["aborted"]


def test_logged_text_need_not_be_text() -> None:
    with meeting() as met:
        met.says((wire.ERRORS, b"caf\xe9\n"), START, DONE)
        met.server.run()
        assert met.errors.getvalue() == "[tenant] caf\ufffd\n"


def start(*fields: object) -> tuple[int, bytes]:
    return wire.START, NUMBER + msgspec.msgpack.encode(fields)


BEFORE_THE_RESPONSE = {
    "nothing": (),
    "a chunk first": (data(b"one"),),
    "an end first": (END,),
    "a done first": (DONE,),
    "an unknown kind": ((200, b""),),
    "a kind of the host's": ((wire.REQUEST, b""),),
    "a kind of the executor's own": ((1, b""),),
    "garbage for headers": ((wire.START, NUMBER + GARBAGE),),
    "headers with more fields": (start("200 OK", [], 1),),
    "headers of numbers": (start("200 OK", [("Content-Length", 3)]),),
    "headers of three": (start("200 OK", [("a", "b", "c")]),),
    "a status of bytes": (start(b"200 OK", []),),
    "a header with a line break": (start("200 OK", [("X-A", "b\r\nX-C: d")]), DONE),
    "a name with a line break": (start("200 OK", [("X-A\n", "b")]), DONE),
    "a status with a line break": (start("200 OK\r\nX-C: d", []), DONE),
    "a header with NUL": (start("200 OK", [("X-A", "\0")]), DONE),
    "a header that is not latin-1": (start("200 OK", [("X-A", "\u0100")]), DONE),
    "garbage for an error": ((wire.ERROR, NUMBER + GARBAGE),),
    "a read of nothing": ((wire.READ, wire.encode_size(0)),),
    "a read of too much": ((wire.READ, wire.encode_size(2**32 - 1)),),
    "a read without a size": ((wire.READ, b""),),
    "headers twice": (START, START),
    "a frame after the last": (START, only(b"one"), DONE, DONE),
    "only headers": (START,),
    "headers of another request": ((wire.START, b"another." + START[1][8:]), DONE),
    "headers without a number": ((wire.START, START[1][8:]), DONE),
    "an error of another request": ((wire.ERROR, b"another." + FAILED[1][8:]),),
    "an end of another request": (START, only(b"one"), (wire.DONE, b"another.")),
    "an end without a number": (START, only(b"one"), (wire.DONE, b"")),
    "an end with more to it": (START, only(b"one"), (wire.DONE, NUMBER + b"x")),
    "an error, and then something": (FAILED, DONE),
    "a text without text": ((wire.ERRORS, b""), START, DONE),
    "an empty chunk of a failure": (START_500, data(b""), data(b""), DONE),
    "a read, and then something": ((wire.READ, wire.encode_size(3)), START, DONE),
    "two reads": ((wire.READ, wire.encode_size(3)),) * 2,
}


@pytest.mark.parametrize("name", BEFORE_THE_RESPONSE)
def test_an_executor_that_breaks_the_protocol_is_a_503(name: str) -> None:
    with meeting() as met:
        met.says(*BEFORE_THE_RESPONSE[name])
        document = json.loads(met.server.run())
        assert met.server.status == "503 Service Unavailable"
        assert document["status"] == 503
        assert [ending for ending, _ in met.admission.settled] == ["died"]


def test_a_frame_above_the_bound_is_a_503() -> None:
    with meeting() as met:
        met.peer.sendall(struct.pack("!BI", wire.START, MAX_PAYLOAD + 1))
        met.says()
        assert json.loads(met.server.run())["status"] == 503


IN_THE_RESPONSE = {
    "nothing": (),
    "headers again": (START,),
    "an unknown kind": ((200, b""),),
    "a chunk after the end": (END, data(b"more")),
    "an end after the end": (END, END),
    "a frame after the last": (DONE, data(b"for the next request")),
    "garbage for an error": ((wire.ERROR, NUMBER + GARBAGE),),
    "a read of nothing": ((wire.READ, wire.encode_size(0)),),
    "an empty chunk": (data(b""), DONE),
    "a text without text": ((wire.ERRORS, b""), DONE),
    "an only one that is not": (only(b"two"), DONE),
    "an end of another request": ((wire.DONE, b"another."),),
}


@pytest.mark.parametrize("name", IN_THE_RESPONSE)
def test_an_executor_that_breaks_the_protocol_in_the_response_is_cut_off(name: str) -> None:
    with meeting() as met:
        met.says(START, data(b"one"), *IN_THE_RESPONSE[name])
        result = met.server.begin()
        assert next(result) == b"one"
        if IN_THE_RESPONSE[name][:1] == (END,):  # the body was whole; what follows concerns nobody but us
            assert list(result) == []
        else:
            with pytest.raises(ResponseCut):
                next(result)
        result.close()
        assert [ending for ending, _ in met.admission.settled] == ["died"]


KINDS = st.sampled_from([*range(wire.REQUEST, wire.INPUT_FAILED + 1), *range(wire.START, wire.READLINE + 2)])
PAYLOADS = st.one_of(
    st.binary(max_size=40),
    st.sampled_from([START[1], START_500[1], FAILED[1], wire.encode_size(5), b""]),
)


@given(st.lists(st.tuples(KINDS, PAYLOADS), max_size=8))
def test_whatever_an_executor_sends_the_request_is_settled_once(frames: list[tuple[int, bytes]]) -> None:
    with meeting() as met:
        met.says(*frames)
        with contextlib.suppress(ApplicationError, ResponseCut):
            met.server.run()
        assert len(met.admission.settled) == 1
        assert len(met.server.started) <= 1


def test_the_first_chunk_may_be_empty_and_sends_the_headers_off() -> None:
    with meeting() as met:
        met.says(START, data(b""), end=False)
        result = met.server.begin()
        assert met.server.status == "200 OK"
        assert next(result) == b""
        met.says(data(b"one"), DONE)
        assert list(result) == [b"one"]
        assert met.admission.settled == [("ok", "")]


def test_a_failure_of_many_small_chunks_is_not_held_back_for_ever() -> None:
    with meeting() as met:
        met.says(START_500, *[data(b"x")] * 2000, end=False)
        result = met.server.begin()
        assert met.server.status == "500 Oh No"
        met.says(DONE)
        assert b"".join(result) == b"x" * 2000


def test_a_client_that_the_kernel_cannot_watch_ends_the_request(in_child: Any) -> None:
    """poll(2) fails with more descriptors than a process may open."""

    def program() -> str:
        ours, theirs = socket.socketpair()
        client = Client(ours, theirs.fileno())
        resource.setrlimit(resource.RLIMIT_NOFILE, (0, 0))
        wait = client.wait_to_receive
        assert wait is not None
        with pytest.raises(ChannelClosed) as raised:
            wait()
        return str(raised.value)

    assert in_child(program) == "the client cannot be watched: [Errno 22] Invalid argument"
