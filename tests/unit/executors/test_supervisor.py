"""The thread that watches: deadlines, jobs, a descriptor."""

from __future__ import annotations

import os
import threading
import time
import tracemalloc
import weakref
from collections.abc import Iterator
from functools import partial

import pytest

from rcon_plugins.executors.supervisor import Supervisor


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    yield ends
    for end in ends:
        os.close(end)


def test_deadlines_come_in_their_order_and_not_before_their_time(pipe: tuple[int, int]) -> None:
    supervisor = Supervisor(pipe[0], lambda: True)
    supervisor.start()
    began = time.monotonic()
    seen: list[tuple[str, float]] = []
    over = threading.Event()
    supervisor.at(began + 0.2, lambda: seen.append(("late", time.monotonic())))
    supervisor.at(began + 0.05, lambda: seen.append(("early", time.monotonic())))
    supervisor.at(began + 0.2, over.set)
    assert over.wait(10)
    supervisor.close()
    assert [name for name, _ in seen] == ["early", "late"]
    assert seen[0][1] >= began + 0.05
    assert seen[1][1] >= began + 0.2


class Thing:
    """What a deadline may be of."""


def test_deadlines_of_executors_that_are_gone_are_dropped(pipe: tuple[int, int]) -> None:
    """However far away they are: a server makes thousands of processes in a day."""
    supervisor = Supervisor(pipe[0], lambda: True)
    supervisor.start()
    day = time.monotonic() + 86400
    kept = Thing()
    seen: list[Thing] = []
    over = threading.Event()
    supervisor.at(day, seen.append, kept)
    gone = weakref.WeakSet[Thing]()
    tracemalloc.start()
    for _ in range(20_000):
        thing = Thing()
        gone.add(thing)
        supervisor.at(day, seen.append, thing)
    del thing
    assert tracemalloc.get_traced_memory()[0] < 1_000_000
    tracemalloc.stop()
    assert not gone
    supervisor.at(time.monotonic() + 0.01, seen.append, kept)
    supervisor.at(time.monotonic() + 0.02, over.set)
    assert over.wait(10)
    supervisor.close()
    assert seen == [kept]


def test_the_thread_does_not_wake_itself(pipe: tuple[int, int]) -> None:
    """A turn costs more than what most deadlines and jobs do."""
    turns: list[float] = []
    over = threading.Event()

    def again(number: int) -> None:
        when = time.monotonic() + 0.05
        supervisor.at(when, over.set if number == 5 else partial(again, number + 1))

    supervisor = Supervisor(pipe[0], lambda: True, chores=lambda: turns.append(0.0))
    supervisor.start()
    supervisor.submit(partial(again, 1))
    assert over.wait(10)
    assert len(turns) <= 1 + 5 + 5  # a wait may end a moment before its deadline, and is begun again
    supervisor.close()


def test_one_failing_job_does_not_end_the_watch(
    pipe: tuple[int, int], caplog: pytest.LogCaptureFixture
) -> None:
    supervisor = Supervisor(pipe[0], lambda: True)
    supervisor.start()
    done = threading.Event()
    supervisor.submit(lambda: 1 // 0)
    supervisor.submit(done.set)
    assert done.wait(10)
    supervisor.close()
    assert "ZeroDivisionError" in caplog.text


def test_jobs_submitted_before_the_end_are_done(pipe: tuple[int, int]) -> None:
    supervisor = Supervisor(pipe[0], lambda: True)
    supervisor.start()
    done: list[int] = []
    for number in range(100):
        supervisor.submit(partial(done.append, number))
    supervisor.close()
    assert done == list(range(100))


def test_the_supervisor_reads_until_on_readable_returns_false(pipe: tuple[int, int]) -> None:
    heard: list[bytes] = []
    enough = threading.Event()

    def read_report() -> bool:
        heard.append(os.read(pipe[0], 1))
        if len(heard) == 2:
            enough.set()
        return len(heard) < 2

    supervisor = Supervisor(pipe[0], read_report)
    supervisor.start()
    os.write(pipe[1], b"abc")
    assert enough.wait(10)
    done = threading.Event()
    supervisor.submit(done.set)  # it goes on watching over deadlines and jobs
    assert done.wait(10)
    supervisor.close()
    assert heard == [b"a", b"b"]


def test_a_failing_callback_does_not_end_the_supervisor(
    pipe: tuple[int, int], caplog: pytest.LogCaptureFixture
) -> None:
    def read_report() -> bool:
        os.read(pipe[0], 1)
        raise OSError("no more descriptors")

    supervisor = Supervisor(pipe[0], read_report)
    supervisor.start()
    os.write(pipe[1], b"a")
    done = threading.Event()
    supervisor.at(time.monotonic() + 0.05, done.set)
    assert done.wait(10)
    supervisor.close()
    assert "no more descriptors" in caplog.text


def test_deadlines_come_between_jobs(pipe: tuple[int, int]) -> None:
    supervisor = Supervisor(pipe[0], lambda: True)
    seen: list[str] = []

    def job() -> None:
        seen.append("job")
        time.sleep(0.01)

    for _ in range(50):
        supervisor.submit(job)
    supervisor.at(time.monotonic(), lambda: seen.append("deadline"))
    supervisor.start()
    supervisor.close()
    assert seen[0] == "deadline"


def test_after_its_end_nothing_is_written_anywhere(pipe: tuple[int, int]) -> None:
    supervisor = Supervisor(pipe[0], lambda: True)
    supervisor.start()
    supervisor.close()
    others = [
        os.eventfd(0, os.EFD_NONBLOCK) for _ in range(8)
    ]  # one of them has the number of its descriptor now
    supervisor.submit(lambda: None)
    supervisor.at(0.0, lambda: None)
    for other in others:
        with pytest.raises(BlockingIOError):
            os.eventfd_read(other)
        os.close(other)
