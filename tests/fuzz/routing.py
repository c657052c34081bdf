"""Fuzz the matching of hosts and routes: it never raises, is stable, and agrees with a plain reading of the routes."""

from __future__ import annotations

from random import Random

from rcon_plugins.errors import SettingsError
from rcon_plugins.settings.routing import Route, Router, normalise_host
from rcon_plugins.work import Work

_HOSTS = (
    "example.com", "EXAMPLE.com", "a.example.com", "b.a.example.com", "example.com.", "example.com..", "example.com:80",
    "example.com:", "example.com:x", "[::1]", "[::1]:80", "::1", "[", "]", "[]", "[:]", "", ".", "*", "*.example.com",
    "éxample.com", "xn--xample-9ua.com", "a_b.example.com", "example.com\x00", "example.com/", "user@example.com",
    "example.com:80:80", " example.com", "İ.com", "K.com", "com", "127.0.0.1", "2130706433", "x" * 300,
)  # fmt: skip
_PATTERNS = (
    "example.com",
    "*.example.com",
    "*",
    "a.example.com",
    "*.com",
    "127.0.0.1",
    "::1",
    "*.a.example.com",
)


def run(random: Random) -> bool:
    """Match one host against some routes; return whether one matched."""
    host = _host(random)
    once = normalise_host(host)
    assert normalise_host(once) == once, host
    for upper in (host.upper(), f"{host}."):
        if host.isascii() and (upper == host.upper() or host.replace(".", "").isalnum()):
            assert normalise_host(upper) == once, upper
    routes = []
    for number in range(random.randrange(1, 5)):
        patterns = random.sample(_PATTERNS, random.randrange(1, 3))
        try:
            routes.append(Route.make(f"p{number}", host=patterns))
        except SettingsError as error:
            raise AssertionError(f"{patterns}: {error}") from None
    found = Router(routes).match(Work("request", "GET /", {"host": host}))
    plain = (
        route.policy
        for route in routes
        if any(_meets(pattern, once) for pattern in route.conditions()["host"])
    )
    assert found == next(plain, None), (host, routes)
    return found is not None


def _meets(pattern: str, host: str) -> bool:
    if pattern == "*":
        return True
    return host.endswith(pattern[1:]) if pattern[:2] == "*." else host == pattern


def _host(random: Random) -> str:
    host = random.choice(_HOSTS)
    for _ in range(random.randrange(3)):
        at = random.randrange(len(host) + 1)
        host = (
            host[:at] + random.choice(("", ".", ":", "[", "]", "A", "é", "\n", "80", "*", "%41")) + host[at:]
        )
    return host
