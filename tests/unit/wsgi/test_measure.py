"""Small frames and text for the log are taken in measure."""

from __future__ import annotations

import io
import threading
import time

import pytest

from rcon_plugins.executors.channel import ProtocolViolation
from rcon_wsgi import exchange, wire
from rcon_wsgi.exchange import LOG_CHARACTERS, LOG_FRAMES, WINDOW_FRAMES, ErrorLog, FrameRateLimiter
from tests.unit.wsgi.peer import DONE, START, data, meeting


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(exchange, "time", clock)
    return clock


def count(limiter: FrameRateLimiter, number: int = WINDOW_FRAMES) -> float:
    return sum(limiter.count() for _ in range(number))


def test_small_frames_at_a_slow_rate_are_never_delayed(clock: Clock) -> None:
    limiter = FrameRateLimiter()
    for _ in range(20 * WINDOW_FRAMES):
        clock.now += 1
        assert limiter.count() == 0
        assert not limiter.is_fast


def test_limiting_ends_when_the_burst_is_over(clock: Clock) -> None:
    limiter = FrameRateLimiter()
    clock.now += 0.5
    assert count(limiter) == 0
    assert limiter.is_fast
    clock.now += 30
    assert count(limiter) == 0
    assert not limiter.is_fast


def test_frames_that_come_at_once_are_taken_at_a_rate(clock: Clock) -> None:
    limiter = FrameRateLimiter()
    for _ in range(10):
        clock.now += count(limiter)
    assert clock.now - 100 == pytest.approx(10 * 0.04)


def test_a_flood_of_small_chunks_is_taken_at_a_rate_and_in_large_pieces() -> None:
    """What an executor sends for next to nothing must not be work for the host, nor for the server behind it."""
    frames = 10 * WINDOW_FRAMES
    with meeting() as met:
        flood = threading.Thread(target=lambda: met.says(START, *[data(b"x")] * frames, DONE))
        before, cpu = time.monotonic(), time.thread_time()
        flood.start()
        result = met.server.begin()
        chunks = list(result)
        result.close()
        flood.join()
        assert b"".join(chunks) == b"x" * frames
        assert len(chunks) < 2 * WINDOW_FRAMES
        assert time.monotonic() - before > 0.3
        assert time.thread_time() - cpu < 0.3
        assert met.admission.settled == [("ok", "")]


def test_chunks_that_come_one_by_one_stay_as_they_are() -> None:
    with meeting() as met:
        met.says(START, *[data(b"x")] * 100, DONE)
        assert list(met.server.begin()) == [b"x"] * 100


def test_an_error_behind_joined_chunks_comes_behind_them() -> None:
    with meeting() as met:
        met.says(START, *[data(b"x")] * (2 * WINDOW_FRAMES), (200, b""))
        result = met.server.begin()
        taken: list[bytes] = []
        with pytest.raises(ConnectionResetError):
            taken.extend(result)
        assert b"".join(taken) == b"x" * 2 * WINDOW_FRAMES


def logged(*payloads: bytes, policy: str = "tenant", key: str | None = None) -> str:
    stream = io.StringIO()
    log = ErrorLog(stream, policy, key)
    for payload in payloads:
        log.write(payload)
    return stream.getvalue()


FORGED = '{"event": "memory", "policy": "neighbour"}'


@pytest.mark.parametrize("end", ["\n", "\r", "\r\n", "\v", "\f", "\x1c", "\x85", "\u2028", "\u2029"])
def test_each_line_begins_with_the_policy(end: str) -> None:
    """Whatever a reader of the log takes for the end of a line."""
    text = logged(f"first{end}{FORGED}{end}".encode())
    assert text.splitlines() == ["[tenant] first", f"[tenant] {FORGED}"]


def test_half_lines_do_not_begin_another_line() -> None:
    assert logged(b"half", FORGED.encode()) == f"[tenant] half\n[tenant] {FORGED}\n"


def test_control_characters_are_written_out() -> None:
    text = logged("\x1b[2J\x00\x08\tcaf\xe9 \u202eabc\ud7ff".encode())
    assert text == "[tenant] \\x1b[2J\\x00\\x08\tcaf\xe9 \\u202eabc\\ud7ff\n"


def test_a_key_cannot_break_out() -> None:
    """It may be what a client sent."""
    assert logged(b"a", key="a.example:80") == "[tenant a.example:80] a\n"
    assert logged(b"a", key="/a b]\n\u3042\ud800") == "[tenant /a%20b%5D%0A%E3%81%82%5Cud800] a\n"
    assert len(logged(b"a", key="x" * 10_000)) < 200


def test_a_text_without_text_is_a_breach() -> None:
    with pytest.raises(ProtocolViolation):
        logged(b"")


@pytest.mark.parametrize(
    "payloads",
    [[b"x"] * 5 * LOG_FRAMES, [b"x" * 60_000] * 20, [b"\n" * 1_000_000] * 3, [b"\0\n" * 400_000] * 3],
    ids=["many", "long", "empty lines", "characters that grow"],
)
def test_a_request_logs_at_a_bounded_rate(clock: Clock, payloads: list[bytes]) -> None:
    stream = io.StringIO()
    log = ErrorLog(stream, "tenant", None)
    for payload in payloads:
        log.write(payload)
    text = stream.getvalue()
    assert len(text) <= LOG_CHARACTERS + 200
    assert text.count("logs too much") == 1
    assert text.splitlines()[-1].startswith("[tenant] ")
    clock.now += 61
    log.write(b"a minute later")
    assert stream.getvalue().endswith("\n[tenant] a minute later\n")


class Full(io.StringIO):
    def write(self, text: str, /) -> int:
        raise OSError(28, "No slimiter left on device")


def test_a_log_that_cannot_be_written_fails_no_request() -> None:
    with meeting(environ={"wsgi.errors": Full()}) as met:
        met.says((wire.ERRORS, b"text\n"), START, data(b"one"), DONE)
        assert met.server.run() == b"one"
        assert met.admission.settled == [("ok", "")]
