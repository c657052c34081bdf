"""What the host makes of the records that executor processes send, which may be forged."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Iterator

import pytest

from rcon_plugins.executors.records import ConfinementRecords, RecordLog, RecordPipe, RecordReader
from tests.processes import until


class Kept(logging.Handler):
    """Keeps the records that it gets."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


class Host:
    """A host with one logger, and the pipe of one executor process."""

    def __init__(self, name: str, *, own_user: bool) -> None:
        self.kept = Kept()
        self.logger = logging.getLogger(name)
        self.logger.propagate = False
        self.logger.addHandler(self.kept)
        self.target = RecordLog(self.logger, logging.WARNING, [self.logger])
        self.reader = RecordReader(self.target)
        pipe = self.reader.open("c", "policy", "key", own_user=own_user)
        assert isinstance(pipe, RecordPipe)
        self.pipe = pipe

    def send(self, **fields: object) -> None:
        sent = {"name": "some", "via": self.logger.name, "level": 30, "message": "m", "created": time.time()}
        self.write(b"\x1e" + json.dumps({**sent, **fields}).encode())

    def write(self, line: bytes) -> None:
        os.write(self.pipe.writer, line + b"\n")

    def record(self, number: int = 0) -> logging.LogRecord:
        until(lambda: len(self.kept.records) > number)
        return self.kept.records[number]


@pytest.fixture(params=[True, False], ids=["own user", "user of the server"])
def host(request: pytest.FixtureRequest) -> Iterator[Host]:
    host = Host(f"tests.records.{time.monotonic_ns()}", own_user=request.param)
    yield host
    host.pipe.close_writer()
    host.reader.finish(host.pipe)
    host.reader.close()


def test_a_record_comes_with_what_the_host_knows(host: Host) -> None:
    host.pipe.label("01", {"task_id": "7"})
    host.send(work="01", extra={"field": [1, {"a": None}]}, path="/srv/app.py", line=3, function="f")
    record = host.record()
    assert record.getMessage() == ("[policy key] m" if host.pipe.own_user else "m")
    assert vars(record)["task_id"] == "7"
    assert vars(record)["field"] == [1, {"a": None}]
    assert (record.filename, record.module, record.lineno, record.funcName) == ("app.py", "app", 3, "f")
    assert (vars(record)["rcon_policy"], vars(record)["rcon_key"]) == ("policy", "key")
    assert record.process == os.getpid()


@pytest.mark.parametrize("work", ["", "02", "01x"])
def test_a_record_of_another_work_has_none(host: Host, work: str) -> None:
    host.pipe.label("01", {"task_id": "7"})
    host.send(work=work, extra={"rcon_policy": "other", "a b": 1, "_x": 2, "process": 1, "msg": "x"})
    record = host.record()
    assert "task_id" not in vars(record)
    assert vars(record)["rcon_policy"] == "policy"
    assert "a b" not in vars(record)
    assert "_x" not in vars(record)
    assert record.process == os.getpid()


def test_times_levels_and_names_are_bounded(host: Host) -> None:
    host.send(created=0.0, level=-5, name="n" * 1000)
    host.send(created=1e18, level=10**6, name="a\nb")
    first, second = host.record(), host.record(1)
    assert host.pipe.opened <= first.created <= time.time()
    assert host.pipe.opened <= second.created <= time.time()
    assert (first.levelno, second.levelno) == (0, 100)
    assert len(first.name) == 256
    assert second.name == "a\\nb"


def test_no_logger_is_made(host: Host) -> None:
    host.send(via="tests.records.nobody", name="tests.records.nobody")
    host.send()
    host.record()
    assert "tests.records.nobody" not in logging.Logger.manager.loggerDict


@pytest.mark.parametrize(
    "line",
    [
        b"\x1e",
        b"\x1e{}",
        b"\x1e[1, 2]",
        b"\x1e" + b"[" * 50_000,
        b'\x1e{"name": 1}',
        b'\x1e{"name": "a", "via": "", "level": 1, "message": "m", "created": NaN}',
        b'\x1e{"name": "a", "via": "", "level": 1, "message": "m", "created": 1, "other": 1}',
        b'\x1e{"name": "a", "via": "", "level": 1' + b"0" * 5000 + b"}",
        b"\xff\xfe\x1e",
        b"plain",
    ],
)
def test_another_line_is_output(host: Host, line: bytes) -> None:
    host.write(line)
    record = host.record()
    assert record.name == host.logger.name
    assert record.levelno == logging.WARNING
    assert record.getMessage().startswith("[policy key] ") == host.pipe.own_user
    if host.pipe.own_user:
        assert "\x1e" not in record.getMessage()


def test_lines_of_a_message_cannot_be_forged() -> None:
    host = Host("tests.records.forged", own_user=True)
    host.send(message="a\nb\x1b[1m\r\nc", text="t\nu", stack="s\nv", extra={"field": "x\ny"}, data=None)
    record = host.record()
    assert record.getMessage() == "[policy key] a\n[policy key] b\\x1b[1m\n[policy key] c"
    assert record.exc_text == "[policy key] t\n[policy key] u"
    assert record.stack_info == "[policy key] s\n[policy key] v"
    assert vars(record)["field"] == "x\\ny"
    host.pipe.close_writer()
    host.reader.finish(host.pipe)
    host.reader.close()


def test_records_past_the_meter_are_dropped_and_counted() -> None:
    target = RecordLog(logging.getLogger("tests.records.meter"), logging.WARNING, [])
    log = ConfinementRecords("policy", None, target)
    pipe = RecordPipe(log, own_user=False)
    line = (
        b"\x1e"
        + json.dumps({"name": "n", "via": "", "level": 30, "message": "x" * 1000, "created": 0.0}).encode()
    )
    kept = pipe.take((line + b"\n") * 1000, heard=True)
    assert 200 < len(kept) < 300
    assert log.dropped == 1000 - len(kept)
    (notice,) = log.take_notice()
    assert log.dropped == 0
    assert notice.count == 1
    for descriptor in (pipe.reader, pipe.writer):
        os.close(descriptor)


def test_labels_are_bounded() -> None:
    target = RecordLog(logging.getLogger("tests.records.labels"), logging.WARNING, [])
    pipe = RecordPipe(ConfinementRecords("policy", None, target), own_user=False)
    for number in range(100):
        pipe.label(str(number), {})
    assert pipe.label_of("35") is None
    assert pipe.label_of("36") is not None
    for descriptor in (pipe.reader, pipe.writer):
        os.close(descriptor)


def test_without_a_handler_a_warning_goes_to_standard_error(capfd: pytest.CaptureFixture[str]) -> None:
    host = Host("tests.records.bare", own_user=False)
    host.logger.removeHandler(host.kept)
    host.send(message="nobody logs this")
    host.send(message="too low", level=20)
    host.pipe.close_writer()
    host.reader.finish(host.pipe)
    host.reader.close()
    assert capfd.readouterr().err == "nobody logs this\n"


def test_a_handler_that_fails_keeps_no_other_from_the_record(capfd: pytest.CaptureFixture[str]) -> None:
    class Failing(logging.Handler):
        def handle(self, record: logging.LogRecord) -> bool:
            raise OSError("the log is full")

    host = Host("tests.records.failing", own_user=False)
    host.logger.handlers.insert(0, Failing())
    host.send(message="once")
    host.send(message="twice")
    assert [host.record().getMessage(), host.record(1).getMessage()] == ["once", "twice"]
    host.pipe.close_writer()
    host.reader.finish(host.pipe)
    host.reader.close()
    assert "the log is full" in capfd.readouterr().err
