"""A hostile executor process cannot harm the worker, whatever it sends."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from celery.utils.serialization import UnpickleableExceptionWrapper

from rcon_plugins.errors import Killed, ResultTooLarge, TimeLimitExceeded
from tests.integrations.celery.sessions import Session, Sessions
from tests.processes import cpu_seconds

MALFORMED = (
    "hostile: its process sent an answer that cannot be decoded, and was killed; "
    "look for code that writes to file descriptors which it did not open"
)


@pytest.fixture(scope="module")
def session(sessions: Sessions) -> Iterator[Session]:
    with sessions.of_one_process() as opened:
        yield opened
        assert opened.get("where")["confined"]


def test_nothing_is_unpickled(session: Session, tmp_path: Path) -> None:
    with pytest.raises(Killed):
        session.get("hostile", "pickle", str(tmp_path / "bomb"))
    assert not (tmp_path / "bomb").exists()


def test_pickle_where_the_application_accepts_it(sessions: Sessions, tmp_path: Path) -> None:
    """It is the application's own decision, with and without confinement."""
    with sessions(concurrency=1, RCON_TEST_ACCEPT="json,pickle") as session:
        with pytest.raises(Killed):
            session.get("hostile", "pickle", str(tmp_path / "bomb"))
        assert (tmp_path / "bomb").exists()


@pytest.mark.parametrize(
    ("module", "name"), [("os", "system"), ("builtins", "print"), ("builtins", "object"), ("os", "environ")]
)
def test_only_exceptions_are_made(session: Session, tmp_path: Path, module: str, name: str) -> None:
    error = session.error("hostile", Killed, "error", module, name, f"touch {tmp_path}/ran")
    assert str(error) == MALFORMED
    assert not (tmp_path / "ran").exists()


def test_no_module_is_imported(session: Session) -> None:
    """An exception of a module that the worker has not loaded is one of that name: to pickle it would import it."""
    error = session.error("hostile", UnpickleableExceptionWrapper, "error", "this", "Zen", "five")
    assert (error.exc_cls_name, error.exc_args) == ("Zen", ("five",))
    wrapper = ("celery.utils.serialization", "UnpickleableExceptionWrapper")
    session.error(
        "hostile", UnpickleableExceptionWrapper, "error", *wrapper, "this", "Zen", ["five"], "Zen(5)"
    )
    assert "Namespaces are one honking great idea" not in session.worker.log()


def test_exception_that_cannot_be_constructed_is_replaced(session: Session) -> None:
    """A stand-in replaces an exception that cannot be constructed from its arguments; the task did not die."""
    error = session.error(
        "hostile", UnpickleableExceptionWrapper, "error", "builtins", "ExceptionGroup", "five"
    )
    assert (error.exc_cls_name, error.exc_args) == ("ExceptionGroup", ("five",))
    assert str(error) == "ExceptionGroup('five')"


@pytest.mark.parametrize("name", ["SystemExit", "KeyboardInterrupt", "GeneratorExit"])
def test_no_exception_ends_the_worker(session: Session, name: str) -> None:
    error = session.error("hostile", UnpickleableExceptionWrapper, "error", "builtins", name, "five")
    assert error.exc_cls_name == name


@pytest.mark.parametrize(
    "how", ["value wrong", "value long", "value twice", "value noise", "list", "children", "error"]
)
def test_malformed_answer_kills_the_process(session: Session, how: str) -> None:
    arguments: list[Any] = [None, 5, []] if how == "error" else []
    with pytest.raises(Killed):
        session.get("hostile", how, *arguments)


JSON = ("application/json", "utf-8")


def exception(module: str, name: str, *args: object) -> str:
    """Return the code of the data of an answer with an exception."""
    pairs = [[False, value] for value in args]
    error = {"module": module, "type": name, "args": pairs, "constructor_args": pairs, "state": {}}
    return repr(json.dumps({"children": [], "error": error}).encode())


def raised(state: str, message: str = '"x"') -> str:
    """Return the code that makes an answer of a ValueError."""
    error = (
        f'"module": "builtins", "type": "ValueError", "constructor_args": [], "args": [[false, {message}]]'
    )
    return f"""rb'{{"children": [], "error": {{{error}, "state": {state}}}}}'"""


@pytest.mark.parametrize(
    ("how", "text", "content_type", "encoding", "data", "frame"),
    [
        ("ok", "", "application/data", "bz2", "__import__('bz2').compress(bytes(1 << 26)) * 20", 65536),
        ("ok", "", "application/json", "zlib", "__import__('zlib').compress(b'1' * 9999)", 65536),
        ("ok", "", "application/text", "utf-8", "b'x' * 9999", 65536),
        ("ok", "", *JSON, "b'[' + b'[],' * 3_500_000 + b'1]'", 65536),
        ("ok", "", *JSON, "b'[' * 5_000_000 + b']' * 5_000_000", 65536),
        ("ok", "", *JSON, "b'[' + b'9' * 15_000_000 + b']'", 65536),
        ("ok", "", *JSON, "b'{' + b','.join(b'%d' % i for i in range(1_500_000)) + b'}'", 65536),
        ("ok", "", *JSON, "b'[' + b' ' * 400_000 + b']'", 1),
        (
            "ok",
            "",
            *JSON,
            "b'{\"value\": 1, \"children\": [' + b'[[1, 2], []],' * 9999 + b'[1, null]]}'",
            65536,
        ),
        ("error", "", *JSON, "b'[' + b'\"a\",' * 500_000 + b'1]'", 65536),
        (
            "ok",
            "",
            *JSON,
            'b\'{"value": 1, "children": [\' + b\'[["", null], null],\' * 4999 + b\'["a", null]]}\'',
            65536,
        ),
        (
            "error",
            "",
            *JSON,
            exception("builtins", "SyntaxError", "m", ["f", 1, 1, "x", 1, 300_000_000]),
            65536,
        ),
        ("error", "", *JSON, exception("builtins", "SyntaxError", "m", ["f", 1, "x", {}, 1, "y"]), 65536),
        ("too long", "9" * 900_000, *JSON, "b'{\"children\": 1}'", 65536),
        ("error", "", *JSON, raised('{"__notes__": ["' + r"\n" * 450_000 + '"]}'), 65536),
        ("error", "", *JSON, raised("{}", '"' + r"\n" * 200_000 + '"'), 65536),
    ],
    ids=[
        "compressed",
        "another encoding",
        "trusted by kombu",
        "lists",
        "deep",
        "digits",
        "malformed",
        "frames",
        "children",
        "error",
        "empty ids",
        "underlined",
        "no place",
        "size",
        "notes",
        "lines",
    ],
)
@pytest.mark.measures
def test_an_answer_that_would_cost_much_costs_little(
    session: Session, how: str, text: str, content_type: str, encoding: str, data: str, frame: int
) -> None:
    """The pool's process refuses it before a decoder begins. Its executor process is killed."""
    (process,) = session.worker.children()
    assert session.get("where")["confined"]
    before, resident = cpu_seconds(process), resident_peak(process, reset=True)
    error = session.error("hostile_large", Killed, "raw", how, text, content_type, encoding, data, frame)
    assert str(error) == MALFORMED.replace("hostile:", "hostile_large:")
    assert cpu_seconds(process) - before < 0.2
    assert resident_peak(process) - resident < 8 * 16 * 2**20


def resident_peak(pid: int, *, reset: bool = False) -> int:
    """Return the most memory that a process had resident, bytes; with ``reset``, count from now on."""
    if reset:
        Path(f"/proc/{pid}/clear_refs").write_text("5")
    (line,) = (
        line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmHWM")
    )
    return int(line.split()[1]) * 1024


@pytest.mark.measures
def test_the_text_of_an_exception_costs_little(session: Session) -> None:
    """The class of dateutil, which Celery loads, makes its text of a format in its first argument."""
    (process,) = session.worker.children()
    resident = resident_peak(process, reset=True)
    data = exception("dateutil.parser._parser", "ParserError", "%300000000s", "x")
    session.error("hostile_large", UnpickleableExceptionWrapper, "raw", "error", "", *JSON, data, 65536)
    assert resident_peak(process) - resident < 64 * 2**20


@pytest.mark.parametrize("kind", ["lists", "deep", "children", "exceptions", "exception", "lines"])
def test_a_result_that_would_cost_much_is_not_sent(session: Session, kind: str) -> None:
    error = session.error("expensive", ResultTooLarge, kind)
    assert str(error).startswith("expensive: its result costs too much to decode: ")
    assert session.get("expensive", "small") == [[]]


def test_a_process_that_never_answers_ends_at_its_time_limit(session: Session) -> None:
    session.error("hostile", TimeLimitExceeded, "silent")


def test_well_formed_answer_is_accepted(session: Session) -> None:
    assert session.get("hostile", "value") == 1


def test_a_task_cannot_forge_lines_of_the_workers_log(session: Session) -> None:
    session.error("expensive", ValueError, "forged")
    session.error(
        "hostile",
        UnpickleableExceptionWrapper,
        "error",
        "nowhere",
        "X\n[CRITICAL/MainProcess] forged by name",
        "m",
    )
    lines = session.worker.log().splitlines()
    assert not [line for line in lines if re.match(r"\[(2026-11-30: )?CRITICAL", line)]
    assert any(
        re.match(r"\[\S+\] \[2026-11-30: CRITICAL/MainProcess\] forged \\x1b\[31mred", line) for line in lines
    )
    assert any(re.match(r"\[\S+\] +raise ValueError", line) for line in lines)
    assert "\x1b[31mred" not in session.worker.log()
