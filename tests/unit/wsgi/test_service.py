"""The executor's side, with the test as its host."""

from __future__ import annotations

import socket
import sys
import threading
from collections.abc import Callable, Iterable
from typing import Any

import pytest

from rcon_plugins.executors.channel import MAX_PAYLOAD, Channel, ChannelClosed, Frame
from rcon_wsgi import WsgiService, wire
from tests.unit.wsgi.peer import NUMBER, environ_of


class Host:
    """A service that runs in a thread, and the host's end of its channel."""

    def __init__(self, app: Callable[[dict[str, Any], Any], Iterable[bytes]]) -> None:
        self._sock, self._theirs = socket.socketpair()
        self._sock.settimeout(10)
        self.channel = Channel(self._sock)
        self.raised: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(WsgiService(app),))

    def __enter__(self) -> Host:
        self.channel.send(*wire.encode_request(NUMBER, environ_of(CONTENT_LENGTH="8")))
        self._thread.start()
        return self

    def __exit__(self, *arguments: object) -> None:
        self._sock.close()
        self.join()
        self._theirs.close()

    def _run(self, service: WsgiService) -> None:
        channel = Channel(self._theirs)
        try:
            service(channel, channel.receive())
        except BaseException as error:
            self.raised = error

    def join(self) -> None:
        self._thread.join(10)
        assert not self._thread.is_alive()

    def hears(self) -> list[Frame]:
        """All frames up to the last."""
        frames = [self.channel.receive()]
        while frames[-1].kind not in (wire.DONE, wire.ERROR):
            frames.append(self.channel.receive())
        return frames

    def kinds(self) -> list[int]:
        return [kind for kind, _ in self.hears()]


def failure_of(frame: Frame) -> wire.Failure:
    assert frame.kind == wire.ERROR
    assert frame.payload.startswith(NUMBER)
    return wire.decode_failure(frame.payload[len(NUMBER) :])


def text(start_response: Any, status: str = "200 OK") -> Any:
    return start_response(status, [("Content-Type", "text/plain")])


def test_a_list_of_one_goes_over_at_once() -> None:
    def app(environ: Any, start_response: Any) -> Iterable[bytes]:
        text(start_response)
        return [b"hello"]

    with Host(app) as host:
        assert host.kinds() == [wire.START, wire.ONLY, wire.DONE]
        host.join()
        assert host.raised is None


def test_the_end_of_the_body_does_not_wait_for_close() -> None:
    released = threading.Event()

    class Slow:
        def __iter__(self) -> Any:
            return iter([b"one"])

        def close(self) -> None:
            assert released.wait(10)

    def app(environ: Any, start_response: Any) -> Iterable[bytes]:
        text(start_response)
        return Slow()

    with Host(app) as host:
        assert [host.channel.receive().kind for _ in range(3)] == [wire.START, wire.DATA, wire.END]
        released.set()
        assert host.kinds() == [wire.DONE]


def test_a_chunk_is_sent_before_the_next_is_made() -> None:
    asked = threading.Event()

    def app(environ: Any, start_response: Any) -> Iterable[bytes]:
        text(start_response)
        yield b"one"
        assert asked.wait(10)
        yield b"two"

    with Host(app) as host:
        assert [host.channel.receive().kind for _ in range(2)] == [wire.START, wire.DATA]
        asked.set()
        assert host.kinds() == [wire.DATA, wire.DONE]


def test_a_large_chunk_goes_over_in_pieces() -> None:
    def app(environ: Any, start_response: Any) -> Iterable[bytes]:
        text(start_response)
        return [b"x" * (MAX_PAYLOAD + 1)]

    with Host(app) as host:
        frames = host.hears()
        assert {kind for kind, _ in frames[1:-1]} == {wire.DATA}
        assert sum(len(payload) for _, payload in frames[1:-1]) == MAX_PAYLOAD + 1


@pytest.mark.parametrize(
    ("status", "headers", "error"),
    [
        ("200 OK\r\nX: y", [], "ValueError"),
        ("200 OK", [("X", "a\nb")], "ValueError"),
        ("200 OK", [("X\0", "a")], "ValueError"),
        ("200 OK", [("X", "\u0100")], "ValueError"),
        ("200 OK", [("X", 1)], "TypeError"),
        (b"200 OK", [], "TypeError"),
        ("200 OK", None, "TypeError"),
    ],
)
def test_headers_that_no_response_may_have_are_the_applications_error(
    status: Any, headers: Any, error: str
) -> None:
    """Not a breach of the protocol: an honest executor goes on."""

    def app(environ: Any, start_response: Any) -> Iterable[bytes]:
        start_response(status, headers)
        return []

    with Host(app) as host:
        (frame,) = host.hears()
        assert failure_of(frame).type_name == error
        host.join()
        assert host.raised is None


def test_an_error_carries_its_traceback() -> None:
    class Strange(Exception):
        def __str__(self) -> str:
            raise RuntimeError("no message")

    def app(environ: Any, start_response: Any) -> Iterable[bytes]:
        raise Strange

    with Host(app) as host:
        failure = failure_of(host.hears()[0])
        assert failure.type_name.endswith("Strange")
        assert failure.message == "<its message cannot be shown: RuntimeError>"
        assert "test_service.py" in failure.traceback_text
        assert not failure.input_failed


def test_an_error_is_bounded_and_may_hold_any_text() -> None:
    def app(environ: Any, start_response: Any) -> Iterable[bytes]:
        raise ValueError("\udcff" + "x" * 10_000_000)

    with Host(app) as host:
        failure = failure_of(host.hears()[0])
        assert failure.message.startswith("\\udcffxxx")
        assert len(failure.message) + len(failure.traceback_text) < 100_000


def test_the_body_is_not_read_before_the_application_reads() -> None:
    def app(environ: Any, start_response: Any) -> Iterable[bytes]:
        text(start_response)
        yield b"first"
        yield environ["wsgi.input"].read(8)

    with Host(app) as host:
        assert [host.channel.receive().kind for _ in range(2)] == [wire.START, wire.DATA]
        assert host.channel.receive() == Frame(wire.READ, wire.encode_size(8))
        host.channel.send((wire.INPUT, b"the body"))
        assert host.hears() == [Frame(wire.DATA, b"the body"), Frame(wire.DONE, NUMBER)]


def test_a_failed_read_is_an_oserror_and_known_again() -> None:
    def app(environ: Any, start_response: Any) -> Iterable[bytes]:
        environ["wsgi.input"].read(8)
        return []

    with Host(app) as host:
        host.channel.receive()
        host.channel.send((wire.INPUT_FAILED, wire.encode_input_failure(ValueError("a bad chunk"))))
        failure = failure_of(host.hears()[0])
        assert failure.type_name == "OSError"
        assert "a bad chunk" in failure.message
        assert failure.input_failed


def test_the_hosts_end_closes_the_iterable_and_comes_out() -> None:
    closed = threading.Event()

    class Endless:
        def __iter__(self) -> Any:
            while True:
                yield b"x" * 65536

        def close(self) -> None:
            closed.set()

    def app(environ: Any, start_response: Any) -> Iterable[bytes]:
        text(start_response)
        return Endless()

    with Host(app) as host:
        host.channel.receive()
        host.channel.refuse()
        host.join()
        assert isinstance(host.raised, ChannelClosed)
        assert closed.is_set()


@pytest.mark.parametrize("end", [SystemExit, KeyboardInterrupt])
def test_the_application_may_ask_the_process_to_end(end: type[BaseException]) -> None:
    def app(environ: Any, start_response: Any) -> Iterable[bytes]:
        raise end

    with Host(app) as host:
        host.join()
        assert isinstance(host.raised, end)


def test_a_thread_that_outlives_the_request_is_not_heard(capsys: pytest.CaptureFixture[str]) -> None:
    kept: dict[str, Any] = {}

    def app(environ: Any, start_response: Any) -> Iterable[bytes]:
        kept.update(environ, write=text(start_response))
        return [b"hello"]

    with Host(app) as host:
        host.hears()
        host.join()
        with pytest.raises(ChannelClosed):
            kept["wsgi.input"].read(1)
        with pytest.raises(ChannelClosed):
            kept["write"](b"late")
        print("late", file=kept["wsgi.errors"])
        assert capsys.readouterr().err == "late\n"
        assert sys.stderr is not kept["wsgi.errors"]


@pytest.mark.parametrize("kind", [list, iter], ids=["list", "generator"])
def test_only_the_first_chunk_is_sent_empty(kind: Any) -> None:
    """It sends the headers off; more of them the host would not take."""

    def app(environ: Any, start_response: Any) -> Iterable[bytes]:
        write = text(start_response)
        write(b"")
        write(b"")
        return kind([b"", b"one", b"", b"two", b""])  # type: ignore[no-any-return]

    with Host(app) as host:
        assert host.hears()[1:-1] == [Frame(wire.DATA, payload) for payload in (b"", b"one", b"two")]


def test_a_list_that_begins_with_an_empty_chunk() -> None:
    def app(environ: Any, start_response: Any) -> Iterable[bytes]:
        text(start_response)
        return [b"", b"", b"one", b""]

    with Host(app) as host:
        assert host.hears()[1:-1] == [Frame(wire.DATA, b""), Frame(wire.DATA, b"one")]
