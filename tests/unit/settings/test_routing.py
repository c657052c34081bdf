from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from rcon_plugins.errors import SettingsError
from rcon_plugins.settings.routing import Route, Router, normalise_host
from rcon_plugins.work import Work


def work(**attributes: str) -> Work:
    return Work("request", "for a test", attributes)


def matches(pattern: str | list[str], condition: str, value: str) -> bool:
    return Router([Route.make("p", **{condition: pattern})]).match(work(**{condition: value})) == "p"


@pytest.mark.parametrize(
    ("written", "known"),
    [
        ("Shop.Example", "shop.example"),
        ("shop.example:8080", "shop.example"),
        ("shop.example:", "shop.example"),
        ("shop.example.", "shop.example"),
        ("shop.example.:80", "shop.example"),
        ("shop.example:80.", "shop.example"),
        ("[::1]", "::1"),
        ("[::1]:8080", "::1"),
        ("::1", "::1"),
        ("[2001:DB8::1]", "2001:db8::1"),
        ("127.0.0.1:80", "127.0.0.1"),
        ("xn--bcher-kva.example", "xn--bcher-kva.example"),
        ("BÜCHER.example", "bÜcher.example"),
        ("shop.example:http", "shop.example:http"),
        ("", ""),
    ],
)
def test_hosts_are_known_without_port_dot_and_capitals(written: str, known: str) -> None:
    assert normalise_host(written) == known


@given(st.text() | st.text("aA.:[]08"))
def test_normalising_a_host_twice_changes_nothing(host: str) -> None:
    assert normalise_host(normalise_host(host)) == normalise_host(host)


@pytest.mark.parametrize(
    ("pattern", "host", "does"),
    [
        ("shop.example", "SHOP.example:80", True),
        ("Shop.Example.", "shop.example", True),
        ("shop.example", "a.shop.example", False),
        ("*.customers.example", "a.customers.example", True),
        ("*.customers.example", "a.b.Customers.example.", True),
        ("*.customers.example", "customers.example", False),
        ("*.customers.example", "evilcustomers.example", False),
        ("*.customers.example", "a.customers.example.evil", False),
        ("*", "anything at all", True),
        ("[::1]", "[::1]:80", True),
        (["a.example", "*.b.example"], "x.b.example", True),
        (["a.example", "*.b.example"], "x.a.example", False),
    ],
)
def test_hosts(pattern: str | list[str], host: str, does: bool) -> None:
    assert matches(pattern, "host", host) is does


@pytest.mark.parametrize(
    ("pattern", "path", "does"),
    [
        ("/api", "/api", True),
        ("/api", "/api/x", True),
        ("/api", "/api/", True),
        ("/api", "/apix", False),
        ("/api", "/x/api", False),
        ("/api/", "/api/x", True),
        ("/api/", "/api", False),
        ("/", "/anything", True),
        ("/*/export", "/a/export", True),
        ("/*/export", "/a/b/export", True),
        ("/*/export", "/a/export/x", False),
        ("*.pdf", "/a/b.pdf", True),
        ("/v[12]/x", "/v2/x", True),
        ("/v[12]/x", "/v3/x", False),
        ("/a?", "/ab", True),
        ("/*.PDF", "/a.pdf", False),
        ("/*x", "/a\nx", True),
    ],
)
def test_paths(pattern: str, path: str, does: bool) -> None:
    assert matches(pattern, "path", path) is does


@pytest.mark.parametrize(
    ("condition", "pattern", "value", "does"),
    [
        ("method", "POST", "POST", True),
        ("method", ["POST", "PUT"], "PUT", True),
        ("method", "GET", "HEAD", False),
        ("task", "reports.*", "reports.monthly", True),
        ("task", "reports.*", "reports", False),
        ("task", "reports.monthly", "reports.monthly", True),
        ("task", ["a", "b*"], "bc", True),
        ("queue", "slow", "slow", True),
        ("queue", "slow", "slower", False),
        ("queue", "slow*", "slower", True),
        ("command", "convert", "/usr/bin/convert", True),
        ("command", "convert", "convert", True),
        ("command", "/usr/bin/*", "/usr/bin/convert", True),
        ("command", "/usr/bin/*", "/opt/convert", False),
        ("command", "bin*", "/usr/bin/convert", False),
    ],
)
def test_other_conditions(condition: str, pattern: str | list[str], value: str, does: bool) -> None:
    assert matches(pattern, condition, value) is does


def test_every_condition_must_hold() -> None:
    router = Router([Route.make("p", host="a.example", path="/x", method="POST")])
    assert router.match(work(host="a.example", path="/x", method="POST")) == "p"
    assert router.match(work(host="a.example", path="/x", method="GET")) is None
    assert router.match(work(host="a.example", path="/x")) is None
    assert router.match(work(host="b.example", path="/x", method="POST")) is None


def test_the_first_match_wins_whichever_index_it_is_found_in() -> None:
    routes = {
        "exact": Route.make("exact", host="a.b.example"),
        "near": Route.make("near", host="*.b.example"),
        "far": Route.make("far", host="*.example"),
        "any": Route.make("any", host="*"),
        "path": Route.make("path", path="/"),
    }
    names = list(routes)
    for turn in range(len(names)):
        order = names[turn:] + names[:turn]
        assert Router([routes[name] for name in order]).match(work(host="a.b.example", path="/")) == order[0]


def test_a_route_without_conditions_matches_everything() -> None:
    assert Router([Route.make("all")]).match(Work("call", "x")) == "all"


def test_no_route_no_policy() -> None:
    assert Router([]).match(work(host="a.example")) is None


class Noted(Mapping[str, str]):
    """Attributes that record which of them were looked up."""

    def __init__(self, **attributes: str) -> None:
        self.attributes = attributes
        self.looked_up: list[str] = []

    def __getitem__(self, name: str) -> str:
        self.looked_up.append(name)
        return self.attributes[name]

    def __iter__(self) -> Iterator[str]:
        raise NotImplementedError

    def __len__(self) -> int:
        raise NotImplementedError


def test_only_attributes_that_a_route_needs_are_looked_up_and_once() -> None:
    router = Router(
        [
            Route.make("other", host="b.example", command="x"),
            Route.make("post", host="a.example", path="/a", method="POST"),
            Route.make("get", host="a.example", path="/b", method="GET"),
        ]
    )
    attributes = Noted(host="a.example", path="/b", method="GET")
    assert router.match(Work("request", "x", attributes)) == "get"
    assert attributes.looked_up == ["host", "path", "method"]


HOSTS = st.sampled_from(["a.example", "b.example", "x.a.example", "y.x.a.example", "A.EXAMPLE:80", "example"])
HOST_PATTERNS = st.sampled_from(["a.example", "*.a.example", "*.example", "*", "B.example", "*.x.a.example"])
PATHS = st.sampled_from(["/", "/a", "/a/b", "/ab", "/a/b/c", "*", "/a*", "/*/b", "/[ab]"])
NAMES = st.sampled_from(["t", "t.a", "t.b", "u"])
GLOBS = st.sampled_from(["t", "t.a", "t.*", "*", "u"])
METHODS = st.sampled_from(["GET", "POST"])


def some(values: st.SearchStrategy[str]) -> st.SearchStrategy[str | list[str]]:
    return values | st.lists(values, min_size=1, max_size=3)


CONDITIONS = st.fixed_dictionaries(
    {},
    optional={
        "host": some(HOST_PATTERNS),
        "path": some(PATHS),
        "method": some(METHODS),
        "task": some(GLOBS),
        "queue": some(GLOBS),
    },
)
ATTRIBUTES = st.fixed_dictionaries(
    {}, optional={"host": HOSTS, "path": PATHS, "method": METHODS, "task": NAMES, "queue": NAMES}
)


def meets(condition: str, pattern: str, value: str) -> bool:
    """Return whether a value meets one condition, by the rules of the documentation, without an index."""
    if condition == "host":
        pattern, value = pattern.lower(), value.lower().partition(":")[0]
        return fnmatchcase(value, pattern)
    if condition == "path" and not set("*?[") & set(pattern):
        return value == pattern or value.startswith(pattern.rstrip("/") + "/")
    return fnmatchcase(value, pattern)


def first_match(routes: list[dict[str, str | list[str]]], attributes: dict[str, str]) -> str | None:
    for number, conditions in enumerate(routes):
        if all(
            name in attributes
            and any(
                meets(name, pattern, attributes[name])
                for pattern in ([patterns] if isinstance(patterns, str) else patterns)
            )
            for name, patterns in conditions.items()
        ):
            return str(number)
    return None


@given(st.lists(CONDITIONS, max_size=12), ATTRIBUTES)
def test_the_indexes_find_what_a_scan_finds(
    routes: list[dict[str, str | list[str]]], attributes: dict[str, str]
) -> None:
    router = Router(Route.make(str(number), **conditions) for number, conditions in enumerate(routes))
    assert router.match(work(**attributes)) == first_match(routes, attributes)


EVERY_INDEX = Router(
    [
        Route.make("p", host=["a.example", "*.b.example"], path="/x", method="GET"),
        Route.make("p", path=["/*a*a*a*b", "/x"], command="*a*b"),
        Route.make("p", task="t", queue="q*"),
        Route.make("p", queue="q", task="t*"),
    ]
)


@given(st.dictionaries(st.sampled_from(["host", "path", "method", "task", "queue", "command"]), st.text()))
@example({"host": "\0"})
@example({"host": "a" * 300})
@example({"host": "../../x.b.example\n"})
@example({"host": "\ud800.b.example", "path": "\udcff"})
def test_hostile_attributes_never_raise(attributes: dict[str, str]) -> None:
    assert EVERY_INDEX.match(work(**attributes)) in (None, "p")


@pytest.mark.parametrize(
    "attributes",
    [{"host": "." * 1_000_000}, {"host": "a." * 500_000}, {"path": "/" + "a" * 1_000_000, "command": ""}],
)
def test_hostile_lengths_take_no_time(attributes: dict[str, str]) -> None:
    began = time.process_time()
    EVERY_INDEX.match(work(**attributes))
    assert time.process_time() - began < 1


class Counted(str):
    """A text that counts its comparisons."""

    compared = 0

    def __eq__(self, other: object) -> bool:
        Counted.compared += 1
        return super().__eq__(other)

    __hash__ = str.__hash__


@pytest.mark.parametrize("pattern", ["h{}.example", "*.h{}.example"])
def test_ten_thousand_hosts_leave_as_few_candidates_as_ten(pattern: str) -> None:
    for routes in (10, 10_000):
        router = Router(Route.make("p", host=pattern.format(n), method="GET") for n in range(routes))
        Counted.compared = 0
        router.match(work(host="x.h9.example", method=Counted("PUT")))
        assert Counted.compared <= 1


@pytest.mark.parametrize(
    ("condition", "pattern", "remedy"),
    [
        ("host", "a.example:80", 'write "a.example"'),
        ("host", "*.a.example:80", 'write "*.a.example"'),
        ("host", "[::1]:80", 'write "::1"'),
        ("host", "a*.example", '"*.customers.example"'),
        ("host", "*a.example", '"*.customers.example"'),
        ("host", "*.*.example", '"*.customers.example"'),
        ("host", ".a.example", 'write "*.a.example"'),
        ("host", "http://a.example", "for example"),
        ("host", "a example", "for example"),
        ("host", "a.example:http", "for example"),
        ("host", "*.", "for example"),
        ("host", "a\0", "for example"),
        ("path", "api", 'write "/api"'),
        ("method", "post", 'write "POST"'),
        ("method", "GET POST", 'for example "GET"'),
        ("host", "", "for example"),
        ("task", [], "for example"),
        ("task", [1], "for example"),
        ("queue", 1, "for example"),
        ("hots", "a", "did you mean 'host'"),
    ],
)
def test_conditions_that_could_never_hold_are_refused(condition: str, pattern: str, remedy: str) -> None:
    with pytest.raises(SettingsError) as refused:
        Route.make("p", **{condition: pattern})
    assert refused.value.key == f"route.{condition}"
    assert remedy in (refused.value.hint or "")


def test_an_unmatched_request_is_reported_with_its_host() -> None:
    assert Work("request", "GET /", {"host": "b.example", "path": "/"}).quoted() == (
        "'GET /' of the host 'b.example'"
    )
    assert Work("task", "reports.render", {"task": "reports.render"}).quoted() == "'reports.render'"
