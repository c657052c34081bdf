from __future__ import annotations

import json
import os
import pickle
import socket
import stat
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from rcon_plugins.errors import SettingsError
from rcon_plugins.settings import toml
from rcon_plugins.settings.budget import Budget
from rcon_plugins.settings.file import Settings, from_mapping, json_schema, load
from rcon_plugins.settings.limits import Each, IoLimits
from rcon_plugins.settings.memory import Memory
from rcon_plugins.settings.policy import Policy
from rcon_plugins.settings.rights import Rlimits
from rcon_plugins.settings.routing import Route, Router
from rcon_plugins.settings.units import UNITS
from rcon_plugins.work import Work

WHOLE = """
unmatched = "allow"
cgroup = "/system.slice/web.service"
plugins = ["audit"]
confinements = 10
processes = 4

[policy.tenant]
per = "host"
cpu = "30%"
cpus = "0-1"
memory = "256M"
pids = 64
io."/srv" = { read = "10M", write = "5M" }
concurrency = 8
each = { memory = "128M", timeout = "20s" }

[policy.batch]

[[route]]
host = "*.customers.example"
policy = "tenant"

[[route]]
task = ["reports.*", "mail"]
policy = "batch"
"""


def written(directory: Path, text: str | bytes) -> Path:
    file = directory / "rcon.toml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return file


def test_a_file_is_read_whole(tmp_path: Path) -> None:
    file = written(tmp_path, WHOLE)
    settings = load(file)
    assert settings == Settings(
        unmatched="allow",
        cgroup="/system.slice/web.service",
        plugins=("audit",),
        confinements=10,
        processes=4,
        policies={
            "tenant": Policy.make(
                "tenant",
                per="host",
                cpu="30%",
                cpus="0-1",
                memory="256M",
                pids=64,
                io={"/srv": {"read": "10M", "write": "5M"}},
                concurrency=8,
                each={"memory": "128M", "timeout": "20s"},
            ),
            "batch": Policy.make("batch"),
        },
        routes=(
            Route.make("tenant", host="*.customers.example"),
            Route.make("batch", task=["reports.*", "mail"]),
        ),
        file=str(file),
    )
    assert Router(settings.routes).match(Work("task", "x", {"task": "mail"})) == "batch"


def test_missing_keys_have_defaults() -> None:
    settings = from_mapping({"policy": {"default": {}}})
    assert settings == Settings(
        unmatched="refuse",
        cgroup=None,
        plugins=(),
        confinements=256,
        processes=64,
        policies={"default": Policy.make("default")},
        routes=(),
        file=None,
    )


def test_settings_pickle() -> None:
    settings = from_mapping({"policy": {"p": {"memory": "1M"}}, "route": [{"host": "*.a", "policy": "p"}]})
    assert pickle.loads(pickle.dumps(settings)) == settings


@pytest.mark.parametrize(("name", "fallback"), [("default", "default"), ("other", None)])
def test_the_policy_named_default_is_the_fallback(name: str, fallback: str | None) -> None:
    assert from_mapping({"policy": {name: {}}}).fallback == fallback


WRONG = [
    # The text, the key in the message, and other words of the message.
    ("", "policy", "everything would be refused"),
    ('unmatched = "refuse"', "policy", "[policy.default]"),
    ('polcy = "x"', "polcy", "did you mean 'policy'"),
    ("zzz = 1", "zzz", "unmatched, unmatched_status, cgroup"),
    ('unmatched = "alow"', "unmatched", "did you mean 'allow'"),
    ("unmatched = true", "unmatched", "true is refused"),
    ("unmatched = 2026-11-30", "unmatched", "2026-11-30 is refused"),
    ("unmatched = { a = [1, true] }", "unmatched", "{ a = [1, true] } is refused"),
    ('unmatched = { "a b" = [] }', "unmatched", '{ "a b" = [] } is refused'),
    ('[policy.a]\nno_new_privs = "yes"', "policy.a.no_new_privs", "for example true)"),
    ('[policy.a]\nio = "x"', "policy.a.io", 'for example { "/srv" = { read = "10M"'),
    ("[policy.a]\nmemory = 0", "policy.a.memory", 'at least "4K"'),
    (f"[policy.a]\nuser = 5\ngroups = {[5] * 65537}", "policy.a.groups", "65536"),
    (f'cgroup = "/{"x" * 256}"', "cgroup", "too long"),
    (f'cgroup = "{"/x" * 600}"', "cgroup", "too long"),
    (
        "".join(f"[policy.p{number}]\n" for number in range(1000)) + '[[route]]\npolicy = "zzz"',
        "route[1].policy",
        "p48, p49 and 950 more",
    ),
    ("unmatched_status = 200", "unmatched_status", "for example 404"),
    ('executor_started = "connect"', "executor_started", 'for example "shop.database:connect"'),
    ('plugins = "audit"', "plugins", 'for example ["audit"]'),
    ('plugins = ["a", "a"]', "plugins[2]", "named twice"),
    ("confinements = 0", "confinements", ">= 1"),
    ("processes = 1.5", "processes", "1.5"),
    ('cgroup = "rcon"', "cgroup", 'for example "/rcon"'),
    ('cgroup = "/"', "cgroup", "path of a cgroup"),
    ('cgroup = "/a/../b"', "cgroup", "path of a cgroup"),
    ('cgroup = "/a\\u0000"', "cgroup", "path of a cgroup"),
    ('cgroup = "/sys/fs/cgroup/rcon"', "cgroup", "leave the mount out"),
    ("policy = 3", "policy", "[policy.NAME]"),
    ("policy.a = 3", "policy.a", "[policy.a]"),
    ("[policy.A]", "policy", "'A'"),
    ("[policy.tasks]", "policy", "kernel has a file of that name"),
    ('[policy.a]\nname = "b"', "policy.a.name", "the name is that of the table"),
    ('[policy.a]\neach.memory = "128MB"', "policy.a.each.memory", 'write "128M"'),
    ('[policy.a]\nisolation = "thread"\nmemory = "1M"', "policy.a.isolation", "use a process"),
    ("[policy.a]\numask = 0o027", "policy.a.umask", 'write "027"'),
    ("route = 3\npolicy.a = {}", "route", "[[route]]"),
    ("route = [3]\npolicy.a = {}", "route[1]", "table"),
    ('[policy.a]\n[[route]]\nhost = "x"', "route[1]", 'for example "tenant"'),
    ('[policy.apple]\n[[route]]\npolicy = "aple"', "route[1].policy", "did you mean 'apple'"),
    ('[policy.a]\n[[route]]\npolicy = "zzz"', "route[1].policy", "one of: a"),
    ('[policy.a]\n[[route]]\npolicy = "a"\nhots = "x"', "route[1].hots", "did you mean 'host'"),
    ('[policy.a]\n[[route]]\npolicy = "a"\npath = "x"', "route[1].path", 'write "/x"'),
    (
        '[policy.a]\n[[route]]\npolicy = "a"\n[[route]]\npolicy = "a"\nhost = "x"',
        "route[2]",
        "route[1] has no condition",
    ),
]


@pytest.mark.parametrize(("text", "key", "said"), WRONG)
def test_an_error_names_file_key_and_remedy(tmp_path: Path, text: str, key: str, said: str) -> None:
    file = written(tmp_path, text)
    with pytest.raises(SettingsError) as refused:
        load(file)
    assert (refused.value.file, refused.value.key) == (str(file), key)
    assert str(refused.value).startswith(f"{file}: {key}: ")
    assert said in str(refused.value)
    assert refused.value.hint


NOT_TOML = [
    # The text, what is wrong, and the remedy.
    ("a = \n\n", "line 1, column 5: 'a =': Invalid value", "text needs quotes"),
    ("[policy.a]\nmemory = 256M", "line 2, column 13: 'memory = 256M'", "text needs quotes"),
    ("[policy.a]\n[policy.a]", "line 2, column 10: '[policy.a]': Cannot declare a table twice", "once"),
    ("[policy.a]\npids = 1\npids = 2", "line 3: 'pids = 2'", "each key once"),
    ("[policy.a]\nuser = 'a\nb'", 'line 2, column 10: "user = \'a"', "close each text"),
    ("[policy.a\npids = 1", "line 1, column 10: '[policy.a'", "on a line of its own"),
    ("plugins = ['a',", "plugins = ['a',", "complete this line"),
    ("plugins", "line 1: 'plugins'", "KEY = VALUE"),
    (f"a = {'[' * 20_000}", "nested too deeply", "fewer tables and arrays"),
    (f"{'a.' * 20_000}b = 1", "line 1: 'a.a.a.a", "at most six"),
    (f"policy.b.pids = 1\npolicy.a.{'a . ' * 20_000}b = 1", "line 2: 'policy.a.a . a", "at most six"),
    (f"""["a".'{"b" * 9}'{".c" * 99}]""", "more than 64 parts", "at most six"),
    (f"a = {'9' * 5000}", "more than 4300 digits", "smaller"),
    (b"a = '\xff'", "byte 5 is not UTF-8", "as UTF-8"),
    ("a = 1".encode("utf-16-le"), "byte 1 is NUL", "UTF-8"),
    ("a = 1".encode("utf-8-sig"), "byte order mark", "UTF-8 without one"),
    (f"# {'x' * 2**22}", "longer than 4 MiB", "file with policies"),
]


@pytest.mark.parametrize(("text", "problem", "remedy"), NOT_TOML)
def test_a_file_that_is_not_toml(tmp_path: Path, text: str | bytes, problem: str, remedy: str) -> None:
    file = written(tmp_path, text)
    began = time.process_time()
    with pytest.raises(SettingsError) as refused:
        load(file)
    said = str(refused.value)
    assert said.startswith(f"{file}: ")
    assert said.isprintable()
    assert len(said) < len(str(file)) + 400
    assert problem in said
    assert remedy in (refused.value.hint or "")
    assert time.process_time() - began < 1


def test_dots_in_texts_and_comments_are_no_parts_of_a_key(tmp_path: Path) -> None:
    hosts = [f"{number}.customers.example" for number in range(100)]
    file = written(tmp_path, f"[policy.a]\n[[route]] # {'.' * 100}\nhost = {hosts}\npolicy = 'a'")
    assert len(load(file).routes) == 1


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "loop").symlink_to("loop")
    for name, said in (
        ("missing.toml", "No such file"),
        (".", "Is a directory"),
        ("loop", "Too many levels of symbolic links"),
        ("a\0b", "null byte"),
        ("x" * 300, "File name too long"),
        ("fifo", "there is no policy"),  # nothing writes to it
    ):
        with pytest.raises(SettingsError, match=said) as refused:
            load(tmp_path / name)
        assert refused.value.file == str(tmp_path / name)
        assert refused.value.hint
    with pytest.raises(SettingsError, match="longer than 4 MiB"):
        load(written(tmp_path, "#" * (4 * 2**20 + 1)))


@pytest.mark.parametrize("path", ["/dev/zero", "/dev/null", "/dev/tty", "/dev/random"])
def test_a_device_is_refused_at_once(path: str) -> None:
    with pytest.raises(SettingsError, match=r"is not a regular file|No such device") as refused:
        load(path)
    assert refused.value.hint


def test_a_file_of_the_kernel_that_would_wait_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """As /proc/kmsg, which is a regular file for stat(2): to read it would take what it holds from others."""
    first, second = socket.socketpair()
    with first, second:
        first.setblocking(False)
        monkeypatch.setattr(toml, "_open", lambda path, flags: os.dup(first.fileno()))
        monkeypatch.setattr(toml, "stat", SimpleNamespace(S_ISREG=lambda mode: True, S_ISFIFO=stat.S_ISFIFO))
        with pytest.raises(SettingsError, match="temporarily unavailable"):
            load("/proc/kmsg")


def test_a_pipe_is_read_to_its_end(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    command = "printf '[policy.a]\\n'; sleep 0.3; printf 'pids = 5\\n'"
    with (
        subprocess.Popen(["sh", "-c", f"exec >{tmp_path}/fifo; {command}"]),
        (tmp_path / "fifo").open("rb") as kept,
    ):
        settings = load(f"/proc/self/fd/{kept.fileno()}")
    assert settings.policies["a"].pids == 5


@pytest.mark.parametrize(
    ("faults", "first"),
    [
        (["confinements = 0", 'unmatched = "x"'], "confinements"),
        (['unmatched = "x"', "confinements = 0"], "unmatched"),
        (["policy.b.pids = 0", "policy.a.memry = 1"], "policy.b.pids"),
        (["policy.a.memry = 1", "policy.b.pids = 0"], "policy.a.memry"),
        (["policy.a.each.pids = 0", "policy.a.cpu = 30"], "policy.a.each.pids"),
        (["policy.a.cpu = 30", "policy.a.each.pids = 0"], "policy.a.cpu"),
        (['route = [{ policy = "a", path = "x" }]', "policy.a.pids = 0"], "route[1].path"),
    ],
)
def test_the_first_error_of_the_file_is_reported(tmp_path: Path, faults: list[str], first: str) -> None:
    with pytest.raises(SettingsError) as refused:
        load(written(tmp_path, "\n".join(faults)))
    assert refused.value.key == first


def test_without_policies_unmatched_may_be_allowed() -> None:
    assert from_mapping({"unmatched": "allow"}).policies == {}


def test_plugins_may_contribute_the_policies_that_routes_lead_to() -> None:
    settings = from_mapping({"plugins": ["database"], "route": [{"policy": "later"}]}, file="rcon.toml")
    assert set(settings.with_policies([Policy.make("later")]).policies) == {"later"}
    with pytest.raises(SettingsError, match=r"^rcon\.toml: route\[1\]\.policy: there is no policy 'later'"):
        settings.with_policies([])


def test_a_plugin_cannot_replace_a_policy() -> None:
    with pytest.raises(SettingsError, match=r"^policy\.a: there is a policy of that name"):
        from_mapping({"policy": {"a": {}}}).with_policies([Policy.make("a")])


def objects(schema: object) -> list[Mapping[str, Any]]:
    """Return every object with properties in a JSON schema."""
    if isinstance(schema, list):
        return [found for part in schema for found in objects(part)]
    if not isinstance(schema, Mapping):
        return []
    own = [schema] if "properties" in schema else []
    return own + [found for part in schema.values() for found in objects(part)]


def test_the_schema_describes_the_file() -> None:
    schema = json.loads(json.dumps(json_schema()))
    assert set(schema["properties"]) == {
        *(
            "unmatched",
            "unmatched_status",
            "cgroup",
            "plugins",
            "executor_started",
            "confinements",
            "processes",
            "threads",
            "budget",
        ),
        *("policy", "route"),
    }
    assert "name" not in schema["$defs"]["Policy"]["properties"]
    assert all(found["additionalProperties"] is False for found in objects(schema))
    # two of them have memory, which may be a table
    assert len(objects(schema)) == 10


def test_the_schema_has_text_in_place_of_numbers_in_units() -> None:
    text = json.dumps(json_schema())
    assert '"type": "number"' not in text  # all floats have a unit
    assert "x-text" not in text
    policy = json_schema()["$defs"]["Policy"]["properties"]
    assert policy["cpu"]["anyOf"][0] == UNITS["share"].schema
    assert policy["memory"]["anyOf"][0] == Memory.schema


def test_every_key_of_the_schema_has_a_description_and_an_example() -> None:
    for found in objects(json_schema()):
        for key, schema in found["properties"].items():
            assert {"description", "examples"} <= set(schema), key


@pytest.mark.parametrize("kind", [Policy, Each, Budget, IoLimits, Rlimits, Route])
def test_every_example_of_the_schema_can_be_written(kind: type[msgspec.Struct]) -> None:
    properties = json_schema()["$defs"][kind.__name__]["properties"]
    for key, schema in properties.items():
        table = {key: schema["examples"][0]}
        if kind is Route:
            from_mapping({"policy": {"tenant": {}}, "route": [{"policy": "tenant", **table}]})
        elif kind is Budget:
            from_mapping({"budget": {"memory": "80%", **table}, "policy": {"tenant": {}}})
        elif kind is IoLimits:
            Policy.make("p", io={"/": table})
        elif kind is Rlimits:
            Policy.make("p", rlimits=table)
        else:
            table |= {"cpu": "30%"} if key == "cpu_burst" else {}
            table |= {"memory": "256M"} if key == "memory_high" else {}
            table |= {"timeout": "20s"} if key == "grace" else {}
            table |= {"each": {"memory": "256M"}} if key == "on_memory" else {}
            table |= {"user": "web"} if key in ("group", "groups", "owner_must_be", "keep_files") else {}
            Policy.make("p", **(table if kind is Policy else {"each": table}))
