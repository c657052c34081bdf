"""Only what the application accepts is decoded, and nothing is imported or called on the way."""

from __future__ import annotations

import bz2
import sys
import traceback
from typing import Any

import celery
import pytest
from celery.exceptions import Retry
from celery.utils.serialization import UnpickleableExceptionWrapper
from kombu import serialization as _serialization

from rcon_celery import codec
from rcon_celery.decoding_cost import TooCostly
from rcon_celery.wire import MAX_ERROR, Payload
from rcon_plugins.executors.channel import ProtocolViolation

JSON = {"application/json": "utf-8"}
serialization: Any = _serialization  # its functions have no types


def application(**settings: Any) -> celery.Celery:
    app = celery.Celery("codec", broker="memory://", backend="cache+memory://", set_as_current=False)
    app.conf.update(settings)
    return app


def test_accepted_encodings_are_those_that_the_serializers_write() -> None:
    assert codec.accepted_encodings(application()) == JSON
    app = application(accept_content=["json", "application/x-yaml"], result_accept_content=["pickle"])
    assert codec.accepted_encodings(app) == {
        **JSON,
        "application/x-yaml": "utf-8",
        "application/x-python-serialize": "binary",
    }


@pytest.mark.parametrize(
    ("content_type", "encoding", "data"),
    [
        ("application/data", "bz2", bz2.compress(b"{}")),
        ("application/data", "binary", b"{}"),
        ("application/text", "utf-8", b"{}"),
        ("text/plain", "utf-8", b"{}"),
        ("", "", b"{}"),
        ("", "utf-8", b"{}"),
        ("application/json", "", b"{}"),
        ("application/json", "UTF-8", b"{}"),
        ("application/json", "utf-16", "{}".encode("utf-16")),
        ("application/json", "utf-7", b"{}"),
        ("application/json", "zlib", b"{}"),
        ("application/json", "rot13", b"{}"),
        ("application/x-yaml", "utf-8", b"{}"),
        ("application/x-python-serialize", "binary", b"}."),
        ("application/x-msgpack", "binary", b"\x80"),
        ("x" * 2**20, "y" * 2**20, b"{}"),
    ],
)
def test_another_pair_is_refused(content_type: str, encoding: str, data: bytes) -> None:
    with pytest.raises(ProtocolViolation, match="does not accept") as caught:
        codec.decode(Payload(content_type, encoding, len(data)), bytearray(data), JSON)
    assert len(str(caught.value)) < 300


def test_the_reason_of_a_decoder_is_short() -> None:
    data = b'{"__type__": "decimal", "__value__": "' + b"x" * 2**20 + b'"}'
    with pytest.raises(ProtocolViolation, match="cannot be decoded") as caught:
        codec.decode(Payload("application/json", "utf-8", len(data)), bytearray(data), JSON)
    assert len(str(caught.value)) < 1000


def test_a_costly_payload_is_refused_before_it_is_decoded() -> None:
    data = b"[" + b"[]," * 2**20 + b"1]"
    with pytest.raises(ProtocolViolation, match="TooCostly"):
        codec.decode(Payload("application/json", "utf-8", len(data)), bytearray(data), JSON)


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("rcon_celery.results", "this:s"),
        ("rcon_celery.results", "this/s"),
        ("celery", "this"),
        ("rcon_plugins", "this"),
    ],
)
def test_the_lookup_of_a_class_runs_no_code(module: str, name: str) -> None:
    """A module with ``__getattr__`` may import others for an attribute; this package's own does."""
    sys.modules.pop("this", None)
    error = codec.decode_exception(described(module, name), "")
    assert type(error).__name__ == name
    assert "this" not in sys.modules


def test_a_nested_class_is_found() -> None:
    found = codec.decode_exception(described(__name__, "Outer.Inner"), "")
    assert type(found).__qualname__ in ("Outer.Inner", "Inner")


class Outer:
    class Inner(Exception):
        pass


def test_the_name_of_a_class_is_bounded() -> None:
    with pytest.raises(ProtocolViolation, match="2000001 characters"):
        codec.decode_exception(described("builtins", "a." * 10**6 + "b"), "")


def test_the_exceptions_of_a_group_are_bounded() -> None:
    inner = described("nowhere", "T")
    group = {**described("builtins", "ExceptionGroup"), "args": [[False, "m"], [True, [inner] * 5000]]}
    with pytest.raises(TooCostly):
        codec.decode_exception(group, "")
    nested: dict[str, Any] = inner
    for _ in range(40):
        nested = {**described("nowhere", "T"), "args": [[True, nested]], "constructor_args": [[True, nested]]}
    with pytest.raises(TooCostly):
        codec.decode_exception(nested, "")


def test_the_lines_of_an_exception_are_bounded() -> None:
    """A traceback takes each line apart, and in a group does so again at each level."""
    assert codec.decode_exception(described("builtins", "ValueError", "x\n" * 9999), "")
    nested = described("builtins", "ValueError", "\n" * 200_000)
    for end in ("\n", "\r", "\x85", "\u2028"):
        for text in (end * 10_001, ["x", {"y": [end * 10_001]}]):
            with pytest.raises(TooCostly, match="more than 10000 lines"):
                codec.decode_exception(described("builtins", "ValueError", text), "")
    group = {**described("builtins", "ExceptionGroup"), "args": [[False, "m"], [True, [nested]]]}
    with pytest.raises(TooCostly):
        codec.decode_exception({**group, "constructor_args": group["args"]}, "")
    with pytest.raises(TooCostly):
        codec.decode_exception({**described("nowhere", "T"), "state": {"text": "\n" * 10_001}}, "")
    for error in (ValueError("\n" * 200_000), ExceptionGroup("m", [ValueError("\n" * 6000)] * 2)):
        with pytest.raises(TooCostly):
            codec.encode_exception(error, [], "json")

    def nothing() -> None:
        """Do nothing."""

    task = application().task(nothing, name="t")
    with pytest.raises(TooCostly):
        codec.encode_predicate(task, Retry(exc=ValueError("\n" * 200_000)), [], "json")


@pytest.mark.parametrize("name", ["__notes__", "__cause__", "__dict__"])
def test_an_executor_sets_no_special_attribute_of_an_exception(name: str) -> None:
    answer = {**described("builtins", "ValueError"), "state": {name: ["x"] * 9, "own": 1}}
    assert vars(codec.decode_exception(answer, "")) == {"own": 1}


def test_an_error_in_source_code_keeps_its_place() -> None:
    error = codec.decode_exception(
        described("builtins", "SyntaxError", "m", ["f.py", 1, 2, "x = 1", 1, 4]), ""
    )
    assert isinstance(error, SyntaxError)
    assert (error.lineno, error.offset, error.end_offset) == (1, 2, 4)
    assert "^^" in "".join(traceback.format_exception(error))


def test_the_names_of_classes_have_no_control_characters() -> None:
    forged = "X\n[CRITICAL/MainProcess] forged \x1b[31m"
    error = codec.decode_exception(described("nowhere", forged), "")
    assert type(error).__name__ == "X\\n[CRITICAL/MainProcess] forged \\x1b[31m"
    wrapper = ("celery.utils.serialization", "UnpickleableExceptionWrapper")
    error = codec.decode_exception(described(*wrapper, "this", forged, ["a"], "text"), "")
    assert type(error.restore()).__name__.isprintable()  # type: ignore[attr-defined]


def described(module: str, name: str, *args: Any) -> dict[str, Any]:
    pairs = [[False, value] for value in args]
    return {"module": module, "type": name, "args": pairs, "constructor_args": pairs, "state": {}}


@pytest.mark.parametrize("name", ["SyntaxError", "IndentationError"])
def test_a_syntax_error_has_a_traceback_that_can_be_made(name: str) -> None:
    place = ["f.py", 1, 1, "x = 1", 1, 4]
    error = codec.decode_exception(described("builtins", name, "m", place), "")
    assert "    x = 1\n    ^^^\n" in "".join(traceback.format_exception(error))
    for end in (10**9, -(10**9)):
        wide = described(
            "builtins", name, "m", [*place[:2], -(10**9) if end < 0 else 1, *place[3:5], abs(end)]
        )
        with pytest.raises(TooCostly, match="underlines more than 10000 characters"):
            codec.decode_exception(wide, "")
    for wrong in ([*place[:5], "y"], [*place[:2], [], *place[3:]], [*place[:3], {}, 1, 4]):
        with pytest.raises(ProtocolViolation, match="a SyntaxError whose place"):
            codec.decode_exception(described("builtins", name, "m", wrong), "")


class Formatted(Exception):
    """Its first argument is a format, as that of dateutil's ParserError."""

    def __str__(self) -> str:
        return str(self.args[0] % self.args[1:])


@pytest.mark.parametrize(
    "text", ["%999999999s", "%*s", "%-99999s", "%(a)099999d", "{:99999}", "{0[a].b!r:>99999}", "{:{}}"]
)
def test_an_exception_of_wide_fields_gets_a_stand_in(text: str) -> None:
    error = codec.decode_exception(described(__name__, "Formatted", text, 999_999_999), "")
    assert isinstance(error, UnpickleableExceptionWrapper)
    assert text in str(error)
    assert type(codec.decode_exception(described("builtins", "ValueError", text), "")) is ValueError


@pytest.mark.parametrize("text", ["%s: 123456", "%%20%s12345", '%s {"a":12345}', "[%s:12345]", "%5s"])
def test_other_exceptions_with_a_format_keep_their_class(text: str) -> None:
    error = codec.decode_exception(described(__name__, "Formatted", text, "x"), "")
    assert type(error) is Formatted
    assert str(error) == text % "x"


@pytest.mark.parametrize(("name", "value"), [("message", 5), ("text", {"a": 1})])
def test_a_retry_has_texts(name: str, value: object) -> None:
    content = {"message": "m", "error": None, "text": "t", "when": None, "sig": None, name: value}
    with pytest.raises(ProtocolViolation, match="not text"):
        codec.decode_predicate(task_of(application()), "retry", content)


@pytest.mark.parametrize(
    "children",
    [
        *(5, [5], ["ab"], [["a", "bc"]], [[["a"], None]], [["a", {}]], [["a", None, None]], None),
        *(
            [[["", None], None]],
            [[{"a": 1}, None]],
            [[5, None]],
            [["a", [[["b", [["", None], None]], None]]]],
        ),
    ],
)
def test_only_results_are_children(children: Any) -> None:
    with pytest.raises((ProtocolViolation, TypeError)):
        codec.decode_children(application(), {"children": children})


def test_the_results_of_other_tasks_are_bounded() -> None:
    app = application()
    one = [["a", None], None]
    assert len(codec.decode_children(app, {"children": [one] * 5000})) == 5000
    for content in (
        {"children": [one] * 5001},
        {"children": [[["g", None], [one] * 5001]]},
        {"children": [], "tuple": [["g", None], [one] * 5001]},
    ):
        with pytest.raises(TooCostly, match="trail"):
            codec.decode_children(app, content)


def task_of(app: celery.Celery) -> Any:
    @app.task(name="task", shared=False)  # type: ignore[untyped-decorator]
    def task() -> None:
        pass

    return task


def test_a_retry_of_a_large_task_leaves_out_its_signature() -> None:
    task = task_of(application())
    for size, kept in ((10, True), (MAX_ERROR, False)):
        retry = Retry("again", when=1, sig=task.s("x" * size))
        payload, data = codec.encode_predicate(task, retry, [], "json")
        content = codec.decode(payload, bytearray(data), JSON)
        assert (content["sig"] is not None) is kept
        decoded: Any = codec.decode_predicate(task, "retry", content)
        assert (decoded.sig is not None, decoded.message) == (kept, "again")


def test_the_signature_of_a_retry_is_a_plain_one() -> None:
    """Celery would copy a chain once for each of its tasks."""
    task = task_of(application())
    content = {
        "message": "",
        "error": None,
        "text": "",
        "when": None,
        "sig": {"subtask_type": "chain", "kwargs": {"tasks": [5] * 10_000}},
    }
    decoded: Any = codec.decode_predicate(task, "retry", content)
    assert type(decoded.sig).__name__ == "Signature"


def test_serializers_without_a_bound_are_named() -> None:
    serialization.register("mine", str, str, "application/x-mine", "utf-8")
    try:
        found = codec.why_unbounded(
            ["application/json", "application/x-mine", "application/x-python-serialize", "application/x-yaml"]
        )
    finally:
        serialization.unregister("mine")
    mine, pickle = found
    assert "result of mine has no other bound than max_result" in mine
    assert "pickle in accept_content lets the tasks of every policy run code" in pickle
