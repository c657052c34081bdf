from __future__ import annotations

import pickle
from typing import Any

import msgspec
import pytest

from rcon_plugins.errors import SettingsError
from rcon_plugins.settings.limits import Each, IoLimits, Limits
from rcon_plugins.settings.memory import Memory, OnMemory
from rcon_plugins.settings.policy import Per, Policy, PolicyName

MIB = 2**20
TENANT = Policy.make(
    "tenant",
    per="host",
    cpu="30%",
    cpu_weight=50,
    cpus="0-1",
    memory="256M",
    memory_high="200M",
    swap=0,
    io={"/srv": {"read": "10M", "write": "5M", "read_iops": 1000}},
    pids=64,
    concurrency=8,
    each={"memory": "128M", "timeout": "20s"},
)


def test_make_reads_what_a_settings_file_would_hold() -> None:
    whole = Policy(
        name="tenant",
        per=Per("host"),
        cpu=0.3,
        cpu_weight=50,
        cpus="0-1",
        memory=Memory(256 * MIB),
        memory_high=200 * MIB,
        swap=0,
        io={"/srv": IoLimits(read=10 * MIB, write=5 * MIB, read_iops=1000)},
        pids=64,
        concurrency=8,
        each=Each(memory=Memory(128 * MIB), timeout=20.0),
    )
    assert whole == TENANT


def test_keys_that_are_not_set_are_none() -> None:
    policy = Policy.make("p")
    unset = [getattr(policy, name) for name in Limits.__struct_fields__ if name != "io"]
    assert unset == [None] * len(unset)
    assert (policy.io, policy.per, policy.concurrency, policy.each) == ({}, None, None, Each())
    assert (policy.isolation, policy.max_uses) == ("auto", 1000)


def test_make_takes_values_that_are_parsed_already() -> None:
    each, memory = Each(timeout=1.0), Memory(1 * MIB)
    policy = Policy.make("p", memory=memory, each=each)
    assert policy.memory is memory
    assert policy.each is each


@pytest.mark.parametrize(
    "keys",
    [
        {"cpu": 0.3},
        {"each": {"timeout": 20}},
        {"each": {"timeout": 20.0}},
        {"cpu": "30%", "cpu_burst": 0.01},
        {"rlimits": {"cpu": 10}},
        {"umask": 27},
        {"memory": {"limit": "1M", "expand": 2.0, "up_to": "1G"}},
        {"memory": 1e6},
    ],
)
def test_make_refuses_a_number_whose_unit_would_be_a_guess(keys: dict[str, object]) -> None:
    with pytest.raises(SettingsError) as refused:
        Policy.make("p", **keys)
    assert refused.value.hint


def test_a_policy_pickles_with_its_types() -> None:
    twin = pickle.loads(pickle.dumps(TENANT))
    assert twin == TENANT
    assert (type(twin.memory), type(twin.cpu), type(twin.each.timeout)) == (Memory, float, float)


def test_policies_differ_by_any_limit() -> None:
    """A reload, and a change of live policies, compare them."""
    table: dict[str, Any] = {"cpu": "30%", "memory": "64M", "each": {"timeout": "1s", "memory": "1M"}}
    policy = Policy.make("p", **table)
    assert policy == Policy.make(
        "p", **{**table, "memory": 64 * MIB, "each": {"timeout": "1000ms", "memory": "1024K"}}
    )
    others: list[dict[str, Any]] = [
        {"cpu": "30.1%"},
        {"memory": {"limit": "64M", "expand": "2x", "up_to": "1G"}},
        {"each": {"timeout": "1001ms", "memory": "1M"}},
        {"each": {"timeout": "1s", "memory": {"limit": "1M", "expand": "2x", "up_to": "2M"}}},
    ]
    assert [policy != Policy.make("p", **{**table, **other}) for other in others] == [True] * 4


def test_a_policy_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        TENANT.pids = 65  # type: ignore[misc]


def test_the_limits_that_are_set_are_named_as_in_settings() -> None:
    policy = Policy.make("p", cpu="30%", swap=0, memory="1M", io={"/": {"read": 1}}, each={"timeout": "1s"})
    assert policy.limits_set() == ("cpu", "memory", "swap", "io", "each.timeout")
    assert policy.each.limits_set() == ("timeout",)


def test_a_policy_without_limits_names_none() -> None:
    assert Policy.make("p", per="host", concurrency=3, max_uses=1, isolation="process").limits_set() == ()


@pytest.mark.parametrize("name", ["a", "tenant", "a-b_c9", "a" * 63])
def test_valid_policy_names(name: str) -> None:
    assert Policy.make(name).name == name


@pytest.mark.parametrize(
    "name",
    [
        *("", "A", "9a", "-a", "a.b", "a/b", "..", "a~b", "a b", "é", "a\n", "a\0", "a" * 64),
        *("cgroup.procs", "tasks", "notify_on_release", "release_agent"),
    ],
)
def test_invalid_policy_names(name: str) -> None:
    with pytest.raises(SettingsError, match="cannot be the name of a policy"):
        Policy.make(name)
    with pytest.raises(SettingsError, match="cannot be the name of a policy"):
        Policy(name=name)


@pytest.mark.parametrize(
    ("written", "kept"),
    [(name, name) for name in Per.names]
    + [("header:X-Tenant", "header:x-tenant"), ("path:1", "path:1"), ("path:12", "path:12")],
)
def test_valid_attributes_for_per(written: str, kept: str) -> None:
    assert Policy.make("p", per=written).per == kept


@pytest.mark.parametrize(
    "per",
    ["hosts", "", "Host", "header:", "header:a b", "header:a\n", "path:0", "path:-1", "path:x", "user", 1],
)
def test_invalid_attributes_for_per(per: object) -> None:
    with pytest.raises(SettingsError, match=r"^policy\.p\.per: .*header:NAME"):
        Policy.make("p", per=per)


WRONG = [
    # The key in the message, a word of the problem or its remedy, and the keys of the policy.
    ("memry", "did you mean 'memory'", {"memry": "1M"}),
    ("timeout", "each = {", {"timeout": "1s"}),
    ("each.concurrency", "belongs to the policy", {"each": {"concurrency": 1}}),
    ("each.memory", 'write "128M"', {"each": {"memory": "128MB"}}),
    ("each", "expected table", {"each": 3}),
    ("memory", 'less than one page (write "256M"?)', {"memory": 256}),
    ("memory", '1024 bytes are less than one page (at least "4K")', {"memory": "1K"}),
    ("each.memory", "one page", {"each": {"memory": 0}}),
    ("cpu_burst", "set cpu too", {"cpu_burst": "10ms"}),
    ("cpu_burst", 'at most "30ms"', {"cpu": "30%", "cpu_burst": "30.001ms"}),
    ("each.cpu_burst", "set cpu too", {"cpu": "30%", "each": {"cpu_burst": "10ms"}}),
    ("each.grace", "set timeout too", {"each": {"grace": "5s"}}),
    ("each.grace", "no time at all", {"each": {"timeout": "20s", "grace": "0s"}}),
    ("memory_high", "set memory too", {"memory_high": "1M"}),
    ("memory_high", "never reached", {"memory": "1M", "memory_high": "1M"}),
    ("each.memory_high", "set memory too", {"memory": "9M", "each": {"memory_high": "1M"}}),
    ("each.memory", "at most 64M", {"memory": "64M", "each": {"memory": "128M"}}),
    ("each.cpu", "at most 30%", {"cpu": "30%", "each": {"cpu": "31%"}}),
    ("each.swap", "at most 0", {"swap": 0, "each": {"swap": 1}}),
    ("each.pids", "at most 4", {"pids": 4, "each": {"pids": 5}}),
    ("each.cpus", "not within", {"cpus": "0-1", "each": {"cpus": "1-2"}}),
    (
        'each.io."/srv".write',
        "at most 5M",
        {"io": {"/srv": {"write": "5M"}}, "each": {"io": {"/srv": {"write": "6M"}}}},
    ),
    ('io."/srv"', "sets no limit", {"io": {"/srv": {}}}),
    ('io."/srv".read', "0 bytes", {"io": {"/srv": {"read": 0}}}),
    ('io."/srv".red', "did you mean 'read'", {"io": {"/srv": {"red": 1}}}),
    ('io."/srv".read_iops', "integer >= 1", {"io": {"/srv": {"read_iops": 0}}}),
    ("io.srv", "absolute path", {"io": {"srv": {"read": 1}}}),
    ('io."254:x"', "absolute path", {"io": {"254:x": {"read": 1}}}),
    ("pids", "integer >= 1", {"pids": 0}),
    ("pids", "for example 64", {"pids": "64"}),
    ("pids", "true is refused", {"pids": True}),
    ("cpu_weight", "<= 10000", {"cpu_weight": 10001}),
    ("cpu_weight", ">= 1", {"cpu_weight": 0}),
    ("concurrency", ">= 1", {"concurrency": 0}),
    ("max_uses", ">= 1", {"max_uses": 0}),
    ("isolation", "did you mean 'process'", {"isolation": "proces"}),
    ("isolation", "one of: auto, inline", {"isolation": {"memory": "1M"}}),
    ("isolation", "each.timeout", {"isolation": "thread", "each": {"timeout": "1s"}}),
    ("isolation", "memory and memory_high", {"isolation": "thread", "memory": "2M", "memory_high": "1M"}),
    ("isolation", "swap", {"isolation": "thread", "swap": 0}),
    ("isolation", "share", {"isolation": "thread", "rlimits": {"core": 0}}),
    ("isolation", "user: a thread of the server could return", {"isolation": "inline", "user": "web"}),
    ("isolation", "user and group", {"isolation": "inline", "group": "web", "user": "web"}),
    ("isolation", "user and groups", {"isolation": "inline", "groups": [], "user": "web"}),
    ("isolation", "capabilities", {"isolation": "inline", "capabilities": []}),
    ("isolation", "owner_must_be", {"isolation": "inline", "owner_must_be": "/srv", "user": "web"}),
    ("isolation", "umask", {"isolation": "inline", "umask": "027"}),
    ("isolation", "rlimits", {"isolation": "inline", "rlimits": {"core": 0}}),
    ("group", "write the user too", {"group": "web"}),
    ("groups", "write the user too", {"groups": []}),
    ("owner_must_be", "write the user too", {"owner_must_be": "/srv"}),
    ("user", "owner:/srv/anna", {"user": "/srv/anna"}),
    ("user", "a name, a number", {"user": ""}),
    ("user", "a name, a number", {"user": -1}),
    ("user", "a name, a number", {"user": 2**32 - 1}),
    ("user", "a name, a number", {"user": 9**99}),
    ("user", "a name, a number", {"user": True}),
    ("user", "a name, a number", {"user": "a:b"}),
    ("user", "a name, a number", {"user": "a\nb"}),
    ("user", "a name, a number", {"user": "a\0"}),
    ("user", "a name, a number", {"user": "\udc80"}),
    ("user", "absolute path", {"user": "owner:srv"}),
    ("user", "did you mean 'host'", {"user": "owner:/srv/{hosts}"}),
    ("user", "did you mean 'remote_user'", {"user": "owner:/srv/{remote_addr}"}),
    ("user", "header:NAME, path:N", {"user": "owner:/srv/{path:0}"}),
    ("user", "header:NAME, path:N", {"user": "owner:/srv/{}"}),
    ("user", "brace", {"user": "owner:/srv/{host"}),
    ("user", "brace", {"user": "owner:/srv/{{host}}"}),
    ("user", "without ..", {"user": "owner:/srv/{host}/../x"}),
    ("user", "NUL", {"user": "owner:/srv/\0"}),
    ("user", "NUL", {"user": "owner:/srv/\udc80"}),
    ("user", 'write "/srv/www/{path}"', {"user": "owner:/srv/www{path}"}),
    ("owner_must_be", 'without owner: "/srv"', {"owner_must_be": "owner:/srv", "user": 1000}),
    ("groups", "a name, a number", {"groups": ["web", ""], "user": 1000}),
    ("capabilities", "net_bind_service", {"capabilities": ["net-raw"]}),
    ("capabilities", "net_bind_service", {"capabilities": [""]}),
    ("capabilities", "net_bind_service", {"capabilities": [7]}),
    ("capabilities", 'leave "all" out', {"capabilities": ["all", "chown"]}),
    ("capabilities", "net_bind_service", {"capabilities": "chown"}),
    ("umask", 'write "027"', {"umask": 27}),
    ("umask", "octal or decimal", {"umask": 0o27}),
    ("umask", 'write "027"', {"umask": "27"}),
    ("umask", 'write "027"', {"umask": "0o27"}),
    ("umask", 'write "027"', {"umask": "028"}),
    ("umask", 'write "027"', {"umask": "1027"}),
    ("umask", 'write "027"', {"umask": True}),
    ("min_uid", ">= 1", {"min_uid": 0}),
    ("min_gid", "<= 4294967294", {"min_gid": 2**32}),
    ("uid", "write user", {"uid": 1000}),
    ("nofile", "rlimits.nofile", {"nofile": 100}),
    ("as", "rlimits.as", {"as": "1G"}),
    ("rlimits.nofiles", "did you mean 'nofile'", {"rlimits": {"nofiles": 100}}),
    ("rlimits.as_", "did you mean 'as'", {"rlimits": {"as_": 100}}),
    ("rlimits.nofile", ">= 16", {"rlimits": {"nofile": 3}}),
    ("rlimits.cpu", "no unit", {"rlimits": {"cpu": 10}}),
    ("rlimits.cpu", "whole", {"rlimits": {"cpu": "500ms"}}),
    ("rlimits.fsize", 'write "10M"', {"rlimits": {"fsize": "10MB"}}),
    ("rlimits.as", "one page", {"rlimits": {"as": 1}}),
    ("rlimits.core", "negative", {"rlimits": {"core": -1}}),
    (
        "isolation",
        "memory and each.timeout",
        {"isolation": "inline", "memory": "1M", "each": {"timeout": "1s"}},
    ),
    ("isolation", "swap", {"isolation": "inline", "swap": 0}),
    ("isolation", "each.pids", {"isolation": "inline", "each": {"pids": 1}}),
    ("name", "name is that of the table", {"name": "q"}),
]


@pytest.mark.parametrize(("key", "said", "asked"), WRONG)
def test_an_invalid_policy_is_refused_with_key_and_remedy(
    key: str, said: str, asked: dict[str, object]
) -> None:
    with pytest.raises(SettingsError) as refused:
        Policy.make("p", **asked)
    assert refused.value.key == f"policy.p.{key}"
    assert said in str(refused.value)
    assert refused.value.hint


def test_keys_for_retries() -> None:
    policy = Policy.make(
        "p",
        memory="4G",
        each={"memory": "256M"},
        on_memory={"expand": "2x", "up_to": "2G"},
        max_deaths=5,
        dead_letter="dead",
    )
    assert policy.retry_keys == ("on_memory", "max_deaths", "dead_letter")
    assert policy.on_memory == OnMemory(2.0, 2048 * MIB)
    assert policy.limits_set() == ("memory", "each.memory")
    assert Policy.make("p", each={"memory": "256M"}).retry_keys == ()


@pytest.mark.parametrize(
    ("key", "said", "asked"),
    [
        ("on_memory", "needs each.memory", {"on_memory": {"expand": "2x", "up_to": "2G"}}),
        (
            "on_memory.up_to",
            "2G is not above each.memory = 2G",
            {"each": {"memory": "2G"}, "on_memory": {"expand": "2x", "up_to": "2G"}},
        ),
        (
            "on_memory.up_to",
            "2G is never reached",
            {"memory": "1G", "each": {"memory": "1M"}, "on_memory": {"expand": "2x", "up_to": "2G"}},
        ),
        (
            "on_memory",
            "expands while",
            {
                "each": {"memory": {"limit": "1M", "expand": "2x", "up_to": "1G"}},
                "on_memory": {"expand": "2x", "up_to": "2G"},
            },
        ),
        ("on_memory", "'up_to' is missing", {"each": {"memory": "1M"}, "on_memory": {"expand": "2x"}}),
        (
            "on_memory.expand",
            "is not between 1.1x",
            {"each": {"memory": "1M"}, "on_memory": {"expand": "1.0x", "up_to": "1G"}},
        ),
        ("max_deaths", ">= 1", {"max_deaths": 0}),
        ("dead_letter", "length >= 1", {"dead_letter": ""}),
        ("each.max_deaths", "unknown key", {"each": {"max_deaths": 2}}),
    ],
)
def test_invalid_keys_for_retries(key: str, said: str, asked: dict[str, object]) -> None:
    with pytest.raises(SettingsError) as caught:
        Policy.make("p", **asked)
    assert caught.value.key == f"policy.p.{key}"
    assert said in caught.value.problem


def test_each_may_have_the_whole_limit_of_the_policy() -> None:
    limits = {"cpu": "30%", "memory": "1M", "swap": 0, "pids": 4, "cpus": "0", "io": {"/": {"read": 1}}}
    assert Policy.make("p", **limits, each=limits).each.pids == 4


def test_inline_accepts_the_limits_of_threads() -> None:
    asked = {"cpu": "30%", "cpu_weight": 5, "cpus": "0", "pids": 9, "io": {"8:0": {"read": 1}}}
    assert Policy.make("p", isolation="inline", **asked).isolation == "inline"


def test_the_least_memory_is_one_page() -> None:
    assert Policy.make("p", memory=4096).memory == Memory(4096)


def test_a_changed_copy_is_checked_too() -> None:
    with pytest.raises(SettingsError, match="never reached"):
        msgspec.structs.replace(TENANT, memory=Memory(100 * MIB))


def test_a_policy_name_keeps_its_type() -> None:
    assert type(PolicyName.parse("tenant")) is PolicyName
