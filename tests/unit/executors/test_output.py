"""The thread that reads the output of executors: bounds, a log that takes nothing, and what it keeps."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import logging.handlers
import os
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from rcon_plugins.executors import output
from rcon_plugins.executors.output import OutputReader, log_of


class Reader:
    """A reader whose log is a file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        self.reader = OutputReader(self.log)

    def log(self) -> AbstractContextManager[int]:
        return contextlib.nullcontext(self.file)

    def lines(self, prefix: str = "[p] ") -> list[str]:
        found = self.path.read_text().splitlines()
        return [line.removeprefix(prefix) for line in found if line.startswith(prefix)]


@pytest.fixture
def reader(tmp_path: Path) -> Iterator[Reader]:
    made = Reader(tmp_path / "log")
    yield made
    made.reader.close()
    os.close(made.file)


def test_text_is_logged_line_by_line(reader: Reader) -> None:
    pipe = reader.reader.open("p", "p", None)
    os.write(pipe.writer, b"a\nb")
    time.sleep(0.1)
    os.write(pipe.writer, b"c\r\n\nlast")
    pipe.close_writer()
    reader.reader.finish(pipe)
    reader.reader.close()
    assert reader.lines() == ["a", "bc", "", "last"]


def test_long_lines_are_split_between_characters(reader: Reader) -> None:
    text = "é" * 100_000
    pipe = reader.reader.open("p", "p", None)
    for start in range(0, len(text), 10_000):
        os.write(pipe.writer, text[start : start + 10_000].encode())
    os.write(pipe.writer, b"\nnext\n")
    pipe.close_writer()
    reader.reader.finish(pipe)
    reader.reader.close()
    *pieces, last = reader.lines()
    assert last == "next"
    assert "".join(piece.removesuffix("…") for piece in pieces) == text
    assert max(map(len, pieces)) == output.LONGEST_LINE + 1


def test_the_last_lines_are_logged_after_a_flood(reader: Reader) -> None:
    pipe = reader.reader.open("p", "p", None)
    for _ in range(6000):
        os.write(pipe.writer, b"x" * 99 + b"\n")
    os.write(pipe.writer, b"why it died\n")
    pipe.close_writer()
    reader.reader.finish(pipe)
    reader.reader.close()
    lines = reader.lines()
    assert "why it died" in lines
    notices = [line for line in lines if line.startswith("…")]
    assert (
        sum(int(notice.split()[1].replace(",", "")) for notice in notices) + len(lines) - len(notices) == 6001
    )


def test_a_writer_waits_at_most_a_moment_for_a_log_that_takes_nothing(tmp_path: Path) -> None:
    end, full = os.pipe()
    fcntl.fcntl(full, fcntl.F_SETPIPE_SZ, 4096)
    os.write(full, b"x" * 4096)
    reader = OutputReader(lambda: contextlib.nullcontext(full))
    pipe = reader.open("p", "p", None)
    began = time.monotonic()
    for _ in range(4000):
        os.write(pipe.writer, b"x" * 99 + b"\n")  # six times what the pipe holds
    assert time.monotonic() - began < output.PATIENCE + 10
    os.set_blocking(end, False)
    said = ""
    until = time.monotonic() + 20
    while "lines dropped" not in said and time.monotonic() < until:
        with contextlib.suppress(BlockingIOError):
            said += os.read(end, 4096).decode()
        time.sleep(0.01)
    pipe.close_writer()
    reader.finish(pipe)
    reader.close()
    os.close(end)
    os.close(full)
    assert "lines dropped" in said
    assert all(line.startswith("[p] ") for line in said.removeprefix("x" * 4096).splitlines())


def test_pipes_whose_writers_are_closed_cost_nothing(reader: Reader) -> None:
    pipes = [reader.reader.open(f"p~{number}", "p", str(number)) for number in range(50)]
    for pipe in pipes:
        pipe.close_writer()
    time.sleep(0.5)
    before = time.process_time()
    time.sleep(1)
    assert time.process_time() - before < 0.1
    for pipe in pipes:
        reader.reader.finish(pipe)


def test_nothing_is_kept_for_each_key(reader: Reader, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output, "RATE", 1 << 30)  # so that a meter is as new soon
    open_files = len(list(Path("/proc/self/fd").iterdir()))
    for number in range(640):
        pipe = reader.reader.open(f"p~{number}", "p", str(number))
        os.write(pipe.writer, b"x\n")
        pipe.close_writer()
        reader.reader.finish(pipe)
        if number % 64 == 63:
            until = time.monotonic() + 10
            while any(log.pipes for log in reader.reader._all_logs()) and time.monotonic() < until:
                time.sleep(0.01)
    reader.reader.open("p~last", "p", "last")
    assert len(reader.reader._all_logs()) <= 64
    reader.reader.close()
    assert len(list(Path("/proc/self/fd").iterdir())) <= open_files + 1  # the writer of the last
    assert sum(line.endswith("] x") for line in reader.path.read_text().splitlines()) == 640


def test_the_end_of_an_executor_leaves_the_writer_to_its_thread(reader: Reader) -> None:
    """An executor may end while the thread that orders it still has to pass the writer on."""
    pipe = reader.reader.open("p", "p", None)
    reader.reader.finish(pipe)
    reader.reader.close()
    assert pipe.ended
    os.fstat(pipe.writer)
    pipe.close_writer()


def test_a_file_that_is_rotated_gets_the_lines(tmp_path: Path) -> None:
    handler = logging.handlers.WatchedFileHandler(tmp_path / "log")
    logger = logging.Logger("of this test")
    logger.addHandler(handler)
    reader = OutputReader(log_of([logging.Logger("none"), logger]))
    pipe = reader.open("p", "p", None)
    os.write(pipe.writer, b"one\n")
    until = time.monotonic() + 10
    while not (tmp_path / "log").read_text() and time.monotonic() < until:
        time.sleep(0.01)
    (tmp_path / "log").rename(tmp_path / "old")
    os.write(pipe.writer, b"two\n")
    pipe.close_writer()
    reader.finish(pipe)
    reader.close()
    handler.close()
    assert (tmp_path / "old").read_text() == "[p] one\n"
    assert (tmp_path / "log").read_text() == "[p] two\n"
