"""The environ crosses as it is, or a part of it does not cross."""

from __future__ import annotations

import io
import socket
import threading
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rcon_plugins.executors.channel import MAX_PAYLOAD, Channel, ProtocolViolation
from rcon_wsgi import wire
from tests.unit.wsgi.peer import NUMBER


def crossed(original: dict[str, Any]) -> dict[str, Any]:
    """What the executor has of it."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        frames = wire.encode_request(NUMBER, original)
        sending = threading.Thread(target=Channel(ours).send, args=frames)
        sending.start()
        try:
            channel = Channel(theirs)
            number, arrived = wire.receive_request(channel, channel.receive())
            assert number == NUMBER
            return arrived
        finally:
            sending.join()


TEXT = st.text(st.characters(codec=None, exclude_categories=()), max_size=20)  # lone surrogates, too
PLAIN = st.recursive(
    st.one_of(
        TEXT, st.binary(max_size=20), st.integers(), st.floats(allow_nan=False), st.booleans(), st.none()
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.tuples(inner, inner),
        st.dictionaries(TEXT, inner, max_size=3),
    ),
    max_leaves=6,
)


@given(st.dictionaries(TEXT.filter(lambda name: not name.startswith("wsgi.")), PLAIN, max_size=6))
def test_plain_values_cross_with_their_types(original: dict[str, Any]) -> None:
    arrived = crossed(original)
    assert arrived == original
    assert repr(arrived) == repr(original)


class Text(str):
    __slots__ = ()


def test_subclasses_cross_as_what_they_are() -> None:
    arrived = crossed({"a": Text("text"), "b": [Text("text")]})
    assert arrived == {"a": "text", "b": ["text"]}
    assert type(arrived["a"]) is type(arrived["b"][0]) is str


def test_values_that_only_the_host_can_use_are_left_out() -> None:
    with socket.socket() as sock:
        original: dict[str, Any] = {
            "kept": "yes",
            "gunicorn.socket": sock,
            "a.callable": print,
            "a.list.with.one": ["text", sock],
            "an.object": object(),
            "wsgi.input": io.BytesIO(),
            "wsgi.errors": io.StringIO(),
            "wsgi.file_wrapper": list,
            "wsgi.multithread": True,
            "wsgi.multiprocess": False,
            "wsgi.run_once": False,
            "wsgi.url_scheme": "https",
        }
        assert crossed(original) == {"kept": "yes", "wsgi.run_once": False, "wsgi.url_scheme": "https"}


def test_a_value_that_contains_itself_is_left_out() -> None:
    circle: list[Any] = []
    circle.append(circle)
    assert crossed({"circle": circle, "kept": "yes"}) == {"kept": "yes"}


def test_very_large_headers_cross_in_parts() -> None:
    original = {f"HTTP_X_{n}": "v" * 600_000 for n in range(5)}
    frames = wire.encode_request(NUMBER, original)
    assert len(frames) > 2
    assert all(len(payload) <= MAX_PAYLOAD for _, payload in frames)
    assert crossed(original) == original


def test_a_request_starts_with_an_environ() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        channel = Channel(ours)
        Channel(theirs).send((wire.INPUT, b""))
        with pytest.raises(ProtocolViolation):
            wire.receive_request(channel, channel.receive())
