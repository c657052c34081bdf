"""Only what the application accepts is decoded, and nothing is imported or called on the way."""

from __future__ import annotations

import bz2
import sys
import traceback
from typing import Any

import celery
import pytest
from celery.exceptions import Retry
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


@pytest.mark.parametrize("position", [10**8, 10**15, "x", {}])
def test_an_error_in_source_code_has_no_far_positions(position: Any) -> None:
    """A traceback would mark 100,000,000 columns with carets."""
    args = ("m", ["f.py", position, position, "x = 1", position, position])
    error = codec.decode_exception(described("builtins", "SyntaxError", *args), "")
    assert len("".join(traceback.format_exception(error))) < 1000
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


@pytest.mark.parametrize(
    "children", [5, [5], ["ab"], [["a", "bc"]], [[["a"], None]], [["a", {}]], [["a", None, None]], None]
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
