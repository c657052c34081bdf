"""What of a request is matched, and what people see of it."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rcon_plugins.settings.policy import Per
from rcon_wsgi import work_of


@pytest.mark.parametrize(
    ("header", "host"),
    [
        ("a.example", "a.example"),
        ("A.Example:8080", "a.example"),
        ("a.example.", "a.example"),
        ("a.example.:80", "a.example"),
        ("a.example:", "a.example"),
        ("a.example..", "a.example"),
        ("..", None),
        ("127.0.0.1:80", "127.0.0.1"),
        ("[::1]", "::1"),
        ("[::1]:8080", "::1"),
        ("[2001:DB8::1]:8080", "2001:db8::1"),
        ("a.example:evil", "a.example:evil"),
        ("a.example:\u0661", "a.example:\u0661"),  # a digit, but of no port
        ("../../x", "../../x"),  # whoever makes a name of it sees to that
        ("", "server.example"),
    ],
)
def test_host(header: str, host: str | None) -> None:
    work = work_of({"HTTP_HOST": header, "SERVER_NAME": "Server.Example"})
    assert work.attributes.get("host") == host


def test_without_a_host_there_is_none() -> None:
    attributes = work_of({"REQUEST_METHOD": "GET", "PATH_INFO": "/"}).attributes
    assert attributes.get("host") is None
    assert "host" not in attributes
    with pytest.raises(KeyError):
        attributes["host"]
    assert dict(attributes) == {"path": "/", "method": "GET"}
    assert len(attributes) == 2


def test_an_unknown_attribute_is_a_missing_key() -> None:
    assert work_of({}).attributes.get("task") is None


@pytest.mark.parametrize(
    ("script", "path", "whole"),
    [
        ("", "/a/b", "/a/b"),
        ("/app", "/a", "/app/a"),
        ("", "/\xe3\x81\x82", "/\u3042"),
        ("", "/\xff", "/\ufffd"),
        ("", "/\u3042", "/\u3042"),
        ("", "/a/../b//c", "/a/../b//c"),
    ],
)
def test_path(script: str, path: str, whole: str) -> None:
    assert work_of({"SCRIPT_NAME": script, "PATH_INFO": path}).attributes["path"] == whole


def test_the_name_is_the_request_line() -> None:
    environ = {"REQUEST_METHOD": "GET", "PATH_INFO": "/a/\xe3\x81\x82", "QUERY_STRING": "secret=1"}
    work = work_of(environ)
    assert (work.kind, work.name) == ("request", "GET /a/\u3042")


ANY_TEXT = st.text(st.characters(codec=None, exclude_categories=()))  # lone surrogates, too


@given(ANY_TEXT, ANY_TEXT)
def test_a_name_is_one_line_of_the_log(method: str, path: str) -> None:
    assert work_of({"REQUEST_METHOD": method, "PATH_INFO": path}).name.isprintable()


@given(ANY_TEXT)
def test_any_host_has_attributes(host: str) -> None:
    dict(work_of({"HTTP_HOST": host}).attributes)


REQUEST = {
    "REQUEST_METHOD": "POST",
    "SCRIPT_NAME": "/shop",
    "PATH_INFO": "/anna//photos",
    "REMOTE_ADDR": "192.0.2.7",
    "REMOTE_USER": "anna",
    "CONTENT_TYPE": "text/plain",
    "CONTENT_LENGTH": "12",
    "HTTP_X_TENANT": "north",
    "HTTP_X_EMPTY": "",
    "wsgi.errors": object(),
}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("remote_addr", "192.0.2.7"),
        ("remote_user", "anna"),
        ("header:x-tenant", "north"),
        ("header:X-Tenant", "north"),
        ("header:x_tenant", "north"),
        ("header:x-empty", None),
        ("header:content-type", "text/plain"),
        ("header:content-length", "12"),
        ("header:accept", None),
        ("header:", None),
        ("path:1", "shop"),
        ("path:2", "anna"),
        ("path:3", None),
        ("path:4", "photos"),
        ("path:5", None),
        ("path:99", None),
        ("path:0", None),
        ("path:-1", None),
        ("path:x", None),
        ("path:", None),
        ("REMOTE_ADDR", None),
        ("wsgi.errors", None),
        ("", None),
    ],
)
def test_attributes_that_can_be_a_key(name: str, value: str | None) -> None:
    attributes = work_of(REQUEST).attributes
    assert attributes.get(name) == value
    if value is None:
        with pytest.raises(KeyError):
            attributes[name]


def test_remote_user_is_missing_where_the_server_does_not_know_it() -> None:
    attributes = work_of({"REMOTE_ADDR": "", "PATH_INFO": "*"}).attributes
    assert [name for name in ("remote_addr", "remote_user", "path:1") if name in attributes] == []


def test_every_name_that_settings_take_for_a_request_is_known_here() -> None:
    whole = {**REQUEST, "HTTP_HOST": "a.example"}
    for name in Per.names:
        if name not in ("task", "queue", "command"):
            assert name in work_of(whole).attributes


def test_changes_of_the_environ_do_not_change_the_attributes() -> None:
    environ = {"HTTP_HOST": "a.example", "PATH_INFO": "/a", "REQUEST_METHOD": "GET"}
    work = work_of(environ)
    environ.update(HTTP_HOST="b.example", PATH_INFO="/b", REQUEST_METHOD="POST", REMOTE_USER="anna")
    assert dict(work.attributes) == {"host": "a.example", "path": "/a", "method": "GET"}


TRACE = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
MADE = re.compile(r"[0-9a-f]{32}")


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({"HTTP_X_REQUEST_ID": "7f3c-1.a_b~c=d+e@f"}, "7f3c-1.a_b~c=d+e@f"),
        ({"HTTP_X_REQUEST_ID": "x" * 128}, "x" * 128),
        ({"HTTP_X_REQUEST_ID": "one", "HTTP_TRACEPARENT": TRACE}, "one"),
        ({"HTTP_TRACEPARENT": TRACE}, "4bf92f3577b34da6a3ce929d0e0e4736"),
        ({"HTTP_X_REQUEST_ID": "two words", "HTTP_TRACEPARENT": TRACE}, "4bf92f3577b34da6a3ce929d0e0e4736"),
    ],
)
def test_the_id_is_the_one_that_came(headers: dict[str, str], expected: str) -> None:
    assert work_of(headers).attributes["request_id"] == expected


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"HTTP_X_REQUEST_ID": ""},
        {"HTTP_X_REQUEST_ID": "x" * 129},
        {"HTTP_X_REQUEST_ID": "one,two"},  # sent twice
        {"HTTP_X_REQUEST_ID": "a\nrcon: forged"},
        {"HTTP_X_REQUEST_ID": "a\n"},
        {"HTTP_X_REQUEST_ID": "-a"},
        {"HTTP_X_REQUEST_ID": "//evil.example"},
        {"HTTP_X_REQUEST_ID": "javascript:alert"},
        {"HTTP_X_REQUEST_ID": 'a"b'},
        {"HTTP_X_REQUEST_ID": "\xe9"},
        {"HTTP_X_REQUEST_ID": "\u0661"},
        {"HTTP_TRACEPARENT": TRACE + "-more"},
        {"HTTP_TRACEPARENT": TRACE.upper()},
        {"HTTP_TRACEPARENT": TRACE.replace("00-4", "ff-4")},
        {"HTTP_TRACEPARENT": "00-" + "0" * 32 + "-00f067aa0ba902b7-01"},
        {"HTTP_TRACEPARENT": "00-4bf92f3577b34da6a3ce929d0e0e4736-" + "0" * 16 + "-01"},
    ],
)
def test_an_id_of_another_form_is_not_used(headers: dict[str, str]) -> None:
    attributes = work_of(headers).attributes
    made = attributes["request_id"]
    assert MADE.fullmatch(made)
    assert attributes["request_id"] == made  # the same for the log and the answer
    assert work_of(headers).attributes["request_id"] != made


@given(ANY_TEXT)
def test_any_header_leads_to_an_id(header: str) -> None:
    found = work_of({"HTTP_X_REQUEST_ID": header, "HTTP_TRACEPARENT": header}).attributes["request_id"]
    assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._~=+@-]{0,127}", found)


def test_an_id_is_no_key_and_is_not_listed() -> None:
    environ = {"HTTP_X_REQUEST_ID": "one"}
    assert "request_id" not in Per.names
    assert "request_id" not in list(work_of(environ).attributes)
    assert "rcon.request_id" not in environ
