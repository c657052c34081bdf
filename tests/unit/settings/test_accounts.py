"""Accounts and paths as written in settings. test_policy.py tests the refused ones."""

from __future__ import annotations

import pickle

import pytest

from rcon_plugins.settings.accounts import Account, PathTemplate
from rcon_plugins.settings.policy import Policy
from rcon_plugins.settings.rights import CapabilityName, Rlimits
from rcon_plugins.settings.units import format_umask, parse_umask


@pytest.mark.parametrize(
    ("written", "kept", "number"),
    [
        ("web", "web", None),
        ("www-data", "www-data", None),
        ("EXAMPLE\\anna", "EXAMPLE\\anna", None),
        ("anna@example.org", "anna@example.org", None),
        ("domain users", "domain users", None),
        ("jürgen", "jürgen", None),
        (33, "33", 33),
        ("33", "33", 33),
        ("0033", "33", 33),
        (0, "0", 0),
        (2**32 - 2, "4294967294", 2**32 - 2),
        ("3com", "3com", None),
    ],
)
def test_names_and_numbers(written: object, kept: str, number: int | None) -> None:
    account = Account.parse(written)
    assert (account, account.number, account.path) == (kept, number, None)


@pytest.mark.parametrize(
    ("written", "trusted", "pieces"),
    [
        ("/srv/{host}", "/srv", (("", "host"), ("", None))),
        ("/srv/{host}/www", "/srv", (("", "host"), ("/www", None))),
        ("/srv/site-{host}.d", "/srv", (("site-", "host"), (".d", None))),
        ("/{host}", "/", (("", "host"), ("", None))),
        ("/srv/www/{path}", "/srv/www", (("", "path"), ("", None))),
        (
            "/srv/{header:X-Tenant}/{path:2}",
            "/srv",
            (("", "header:x-tenant"), ("/", "path:2"), ("", None)),
        ),
        ("/srv//{host}", "/srv/", (("", "host"), ("", None))),
        ("/srv/www", "/srv/www", ()),
        ("/", "/", ()),
    ],
)
def test_the_part_before_the_first_placeholder_is_trusted(
    written: str, trusted: str, pieces: tuple[tuple[str, str | None], ...]
) -> None:
    path = Account.parse(f"owner:{written}").path
    assert path is not None
    assert path == PathTemplate.parse(written)
    assert (path.trusted, path.pieces) == (trusted, pieces)
    assert path.placeholders == tuple(name for _, name in pieces if name)


@pytest.mark.parametrize("name", [*PathTemplate.names, "header:x-tenant", "path:1", "path:99"])
def test_every_attribute_can_be_filled_in(name: str) -> None:
    assert PathTemplate.parse(f"/srv/{{{name}}}").placeholders == (name,)


@pytest.mark.parametrize("written", ["net_raw", "cap_net_raw", "CAP_NET_RAW", "Net_Raw"])
def test_capabilities_are_named_in_any_way(written: str) -> None:
    assert CapabilityName.parse(written) == "net_raw"


@pytest.mark.parametrize(("written", "mask"), [("027", 0o27), ("0027", 0o27), ("000", 0), ("777", 0o777)])
def test_a_umask_is_octal(written: str, mask: int) -> None:
    assert parse_umask(written) == mask
    assert parse_umask(format_umask(mask)) == mask
    assert Policy.make("p", umask=written).umask == mask


def test_rlimits_by_the_names_and_units_of_the_kernel() -> None:
    table = {"nofile": 256, "cpu": "2m", "core": 0, "as": "1G", "nproc": 0}
    rlimits = Policy.make("p", rlimits=table).rlimits
    assert rlimits == Rlimits(nofile=256, cpu=120.0, core=0, as_=1024**3, nproc=0)
    assert rlimits.written() == {"nofile": 256, "nproc": 0, "core": 0, "as": 1024**3, "cpu": 120}
    assert {type(value) for value in rlimits.written().values()} == {int}
    assert Rlimits().written() == {}


def test_a_policy_with_an_identity_pickles_with_its_types() -> None:
    policy = Policy.make(
        "p",
        user="owner:/srv/{host}",
        groups=["web", 1000],
        capabilities=["CAP_CHOWN"],
        owner_must_be="/srv/{host}/{path}",
        umask="027",
        rlimits={"core": 0},
    )
    twin = pickle.loads(pickle.dumps(policy))
    assert twin == policy
    assert (type(twin.user), type(twin.owner_must_be), type(twin.umask)) == (Account, PathTemplate, int)


@pytest.mark.parametrize(
    ("keys", "wanted"),
    [
        ({}, ()),
        ({"min_uid": 1, "min_gid": 1, "allow_root": True, "no_new_privs": False, "rlimits": {}}, ()),
        ({"capabilities": []}, ("capabilities",)),
        ({"user": "web", "groups": []}, ("user", "groups")),
        (
            {
                "rlimits": {"core": 0},
                "umask": "000",
                "owner_must_be": "/srv",
                "capabilities": ["all"],
                "groups": ["a"],
                "group": 100,
                "user": "owner:/srv",
            },
            ("user", "group", "groups", "capabilities", "owner_must_be", "umask", "rlimits"),
        ),
    ],
)
def test_the_keys_of_the_identity_that_are_set(keys: dict[str, object], wanted: tuple[str, ...]) -> None:
    assert Policy.make("p", **keys).identity_keys == wanted


def test_a_thread_can_have_all_of_an_identity_but_rlimits() -> None:
    keys: dict[str, object] = {
        "user": "owner:/srv/{host}",
        "group": "web",
        "groups": [],
        "capabilities": ["net_raw"],
        "owner_must_be": "/srv/{host}",
        "umask": "027",
        "cpu": "30%",
        "pids": 9,
    }
    assert Policy.make("p", isolation="thread", **keys).isolation == "thread"
