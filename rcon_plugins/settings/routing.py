"""Routes: the policy for each request, task or command. The first match wins.

A `Router` looks up hosts, domains, tasks and queues in an index, so ten thousand routes cost no more than ten.
"""

from __future__ import annotations

import fnmatch
import heapq
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from operator import itemgetter
from typing import Annotated, Any, ClassVar, NamedTuple, Self

import msgspec
from msgspec import Meta

from rcon_plugins.errors import SettingsError
from rcon_plugins.settings.conversion import Written, convert
from rcon_plugins.settings.units import show
from rcon_plugins.work import Work

_GLOB = frozenset("*?[")
_SMALL = str.maketrans("ABCDEFGHIJKLMNOPQRSTUVWXYZ", "abcdefghijklmnopqrstuvwxyz")


def normalise_host(host: str) -> str:
    """Return a host name as routes and keys use it: small ASCII letters, no port, no dot at the end.

    An IPv6 address loses its brackets. Internationalised names stay as they are. Never raises: text that is
    not a host name is returned nearly unchanged. Idempotent.
    """
    host = host.translate(_SMALL).rstrip(".")
    if host.startswith("["):
        inner, bracket, rest = host[1:].partition("]")
        if bracket and inner.count(":") >= 2 and (not rest or (rest[0] == ":" and _is_port(rest[1:]))):
            host = inner
    elif host.count(":") == 1:
        name, _, port = host.partition(":")
        if _is_port(port):
            host = name
    return host.rstrip(".")


def _is_port(text: str) -> bool:
    return not text or (text.isascii() and text.isdigit())


class Patterns(Written, tuple[str, ...]):
    """The patterns of one condition of a route: a text or a list of texts. One of them must match."""

    __slots__ = ()
    schema: ClassVar[dict[str, Any]] = {
        "anyOf": [
            {"type": "string", "minLength": 1},
            {"type": "array", "items": {"type": "string", "minLength": 1}, "minItems": 1},
        ]
    }

    @classmethod
    def parse(cls, value: object) -> Self:
        patterns = (value,) if isinstance(value, str) else value
        if not isinstance(patterns, list | tuple) or not patterns:
            raise SettingsError(f"{show(value)} is neither a text nor a list of texts", value=value)
        for pattern in patterns:
            if not isinstance(pattern, str) or not pattern:
                raise SettingsError(f"{show(pattern)} matches nothing", value=value)
        return cls(patterns)


class Route(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Choose ``policy`` for requests, tasks and commands that meet all the conditions; without conditions, for all.

    See `make` for a constructor that takes a single text for a condition.
    """

    policy: Annotated[str, Meta(description="The name of the policy.", examples=["tenant"])]
    host: Annotated[
        Patterns | None,
        Meta(
            description="Host of the request: a name, or *.name for all names below it, or * for any.",
            examples=["*.customers.example"],
        ),
    ] = None
    path: Annotated[
        Patterns | None,
        Meta(
            description="Path of the request: /a is /a and all below it; with *, ? or [ a glob for it all.",
            examples=["/api"],
        ),
    ] = None
    method: Annotated[
        Patterns | None, Meta(description="Method of the request.", examples=[["POST", "PUT"]])
    ] = None
    task: Annotated[
        Patterns | None, Meta(description="Glob for the name of the task.", examples=["reports.*"])
    ] = None
    queue: Annotated[
        Patterns | None, Meta(description="Glob for the queue of the task.", examples=["slow"])
    ] = None
    command: Annotated[
        Patterns | None,
        Meta(
            description="Glob for the command: for its last part, or with a / for all of it.",
            examples=["convert"],
        ),
    ] = None

    @classmethod
    def make(cls, policy: str, /, **conditions: str | Iterable[str]) -> Self:
        """Return a route from values in the form of a settings file, checked in the same way."""
        return convert({"policy": policy, **conditions}, cls, "route")

    def __post_init__(self) -> None:
        for name, pattern in ((n, p) for n, patterns in self.conditions().items() for p in patterns):
            problem, hint = _CHECKS[name](pattern) if name in _CHECKS else (None, None)
            if problem:
                raise SettingsError(f"{show(pattern)} {problem}", key=name, value=pattern, hint=hint)

    def conditions(self) -> Mapping[str, Patterns]:
        """The conditions that are set, by attribute."""
        names = (name for name in self.__struct_fields__ if name != "policy")
        return {name: patterns for name in names if (patterns := getattr(self, name)) is not None}


class Found(NamedTuple):
    """A route: its number from 0, its policy, and the conditions that an index did not check."""

    order: int
    policy: str
    rest: tuple[tuple[str, Callable[[str], bool]], ...]


class Router:
    """Finds the route for a request, task or command. Immutable, so any thread may use it."""

    def __init__(self, routes: Iterable[Route]) -> None:
        self._hosts: dict[str, list[Found]] = {}
        self._domains: dict[str, list[Found]] = {}
        self._named: dict[str, dict[str, list[Found]]] = {"task": {}, "queue": {}}
        self._others: list[Found] = []
        for order, route in enumerate(routes):
            self._add(order, route)
        self._depth = max((domain.count(".") + 1 for domain in self._domains), default=0)
        self._named = {name: index for name, index in self._named.items() if index}
        self._is_empty = not (self._hosts or self._domains or self._named or self._others)

    def match(self, work: Work) -> str | None:
        """Return the policy name of the first route that matches, or None. See `find`."""
        if self._is_empty:
            return None
        found = self.find(work)
        return None if found is None else found.policy

    def find(self, work: Work) -> Found | None:
        """Return the first route that matches, or None.

        Each attribute is looked up once, and only if a route that may still match needs it. Never raises.
        """
        attributes = _Attributes(work.attributes)
        for entry in self._candidates(attributes):
            if all((value := attributes[name]) is not None and meets(value) for name, meets in entry.rest):
                return entry
        return None

    def _add(self, order: int, route: Route) -> None:
        conditions = dict(route.conditions())
        places: list[list[Found]] = []
        if "host" in conditions:
            for pattern in set(conditions.pop("host")):
                if pattern.startswith("*"):
                    places.append(self._domains.setdefault(normalise_host(pattern[2:]), []))
                else:
                    places.append(self._hosts.setdefault(normalise_host(pattern), []))
        else:
            for name, index in self._named.items():
                if name in conditions and not any(_GLOB & set(pattern) for pattern in conditions[name]):
                    places = [index.setdefault(pattern, []) for pattern in set(conditions.pop(name))]
                    break
        rest = tuple((name, _matcher(name, patterns)) for name, patterns in conditions.items())
        for place in places or [self._others]:
            place.append(Found(order, route.policy, rest))

    def _candidates(self, attributes: _Attributes) -> Iterator[Found]:
        """Return the routes that may match according to the indexes, in their order."""
        found: list[list[Found]] = []
        if self._hosts or self._domains:
            host = attributes["host"]
            if host is not None:
                found += self._by_host(normalise_host(host))
        for name, index in self._named.items():
            value = attributes[name]
            if value in index:
                found.append(index[value])
        if self._others:
            found.append(self._others)
        if len(found) < 2:
            return iter(found[0] if found else ())
        return heapq.merge(*found, key=itemgetter(0))

    def _by_host(self, host: str) -> Iterator[list[Found]]:
        if host in self._hosts:
            yield self._hosts[host]
        if "" in self._domains:
            yield self._domains[""]
        domain = ""
        # Check no more labels than the longest domain of a route has, so that a host with a thousand dots stays cheap.
        for label in reversed(host.rsplit(".", self._depth)[1:]):
            domain = f"{label}.{domain}" if domain else label
            if domain in self._domains:
                yield self._domains[domain]


class _Attributes(dict[str, str | None]):
    """Attributes, each looked up on first use; None if an attribute is missing."""

    def __init__(self, attributes: Mapping[str, str]) -> None:
        super().__init__()
        self._attributes = attributes

    def __missing__(self, name: str) -> str | None:
        try:
            value: str | None = self._attributes[name]
        except KeyError:
            value = None
        self[name] = value
        return value


def _matcher(name: str, patterns: Iterable[str]) -> Callable[[str], bool]:
    """Return a function that returns whether a value of the attribute ``name`` matches one of the patterns."""
    if name == "path":
        return _any_of([_glob(p) if _GLOB & set(p) else _prefix(p) for p in patterns])
    if name == "method":
        return frozenset(patterns).__contains__
    if name == "command":
        return _any_of([_glob(p) if "/" in p else _last_part(p) for p in patterns])
    return _any_of([_glob(p) for p in patterns])


def _any_of(matchers: list[Callable[[str], bool]]) -> Callable[[str], bool]:
    return matchers[0] if len(matchers) == 1 else lambda value: any(meets(value) for meets in matchers)


def _glob(pattern: str) -> Callable[[str], bool]:
    if not _GLOB & set(pattern):
        return pattern.__eq__
    match = re.compile(fnmatch.translate(pattern)).match
    return lambda value: match(value) is not None


def _prefix(prefix: str) -> Callable[[str], bool]:
    below = prefix if prefix.endswith("/") else prefix + "/"
    return lambda path: path == prefix or path.startswith(below)


def _last_part(pattern: str) -> Callable[[str], bool]:
    meets = _glob(pattern)
    return lambda command: meets(command.rpartition("/")[2])


_Fault = tuple[str | None, str | None]


def _check_host(pattern: str) -> _Fault:
    if pattern == "*":
        return None, None
    name = pattern.removeprefix("*.")
    host = normalise_host(name)
    if name.startswith("."):
        return "is not a host name", f'write "*{pattern}" for the names below it'
    if _GLOB & set(host):
        return "has a * where none can be", 'only "*" and "*.customers.example" stand for many hosts'
    if not host or host.count(":") == 1 or any(c in "/@[]" or c == " " or not c.isprintable() for c in host):
        return "is not a host name", 'for example "shop.example" or "*.customers.example"'
    if ":" in name.translate(_SMALL).replace(host, "", 1):
        return "has a port", f'ports are not looked at: write "{pattern[: -len(name)]}{host}"'
    return None, None


def _check_path(pattern: str) -> _Fault:
    if pattern.startswith(("/", "*")):
        return None, None
    return "does not begin with a slash", f'write "/{pattern}", or "*{pattern}" for the end of one'


def _check_method(pattern: str) -> _Fault:
    if re.fullmatch(r"[A-Z0-9!#$%&'*+.^_`|~-]+", pattern):
        return None, None
    return "is not a method", f'write "{pattern.upper()}"' if pattern.isalpha() else 'for example "GET"'


_CHECKS: Mapping[str, Callable[[str], _Fault]] = {
    "host": _check_host,
    "path": _check_path,
    "method": _check_method,
}
