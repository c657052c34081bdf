"""rcon's command line: check, which, schema, help, completion and bad usage. None of it needs root."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rcon_plugins.cli.exit import shortened
from rcon_plugins.cli.machine import check, which
from rcon_plugins.cli.rcon import run_main
from rcon_plugins.errors import DelegationError, SettingsError
from rcon_plugins.settings.file import json_schema

Write = Callable[[str], str]
ROUTES = """
[policy.web]
pids = 8
[policy.customer]
per = "host"
user = "owner:/etc/{host}"
allow_root = true
[policy.strict]
user = "owner:/etc/{host}"
[[route]]
host = ["passwd", "no-such-file"]
policy = "customer"
[[route]]
host = "group"
policy = "strict"
[[route]]
task = "reports.*"
policy = "web"
[[route]]
path = "/img"
method = "GET"
policy = "web"
[[route]]
queue = "slow"
policy = "customer"
[[route]]
command = "convert"
policy = "web"
"""


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Return a function that writes a settings file and returns its path."""

    def written(text: str) -> str:
        (tmp_path / "rcon.toml").write_text(text)
        return str(tmp_path / "rcon.toml")

    return written


def test_help_lists_the_commands_in_sections(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_main(["--help"]) == 0
    out = capsys.readouterr().out
    assert "Usage: rcon " in out
    sections = ["Run:", "Look:", "Change:", "Settings:", "Machine:"]
    assert [line for line in out.splitlines() if line in sections] == sections
    assert all(f"\n  {command} " in out for command in ("run", "ls", "set", "check", "doctor"))
    assert "..." not in out.partition("\nRun:")[2]  # each help text fits on its line
    assert all(f"\n    {status} " in out for status in (0, 1, 2, 125))


def test_without_a_command_it_prints_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_main([]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("Usage: rcon [OPTIONS] COMMAND")
    assert "\n  check   Check a policy file " in err


def test_help_leaves_out_options_that_are_always_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for command, there in (("run", True), ("attach", True), ("set", False)):
        assert run_main([command, "--help"]) == 0
        assert ("--expand" in capsys.readouterr().out) == there


@pytest.mark.parametrize(
    ("subcommand", "words"),
    [
        (
            "check",
            [
                "FILE",
                "--server [sync|gthread|gevent|celery]",
                "--json",
                "A note says",
                "rcon check /etc/rcon.toml",
            ],
        ),
        (
            "which",
            ["FILE", "--host", "--task", "--attribute NAME=VALUE", "--json", "rcon which /etc/rcon.toml"],
        ),
        ("schema", ["JSON schema"]),
    ],
)
def test_help(subcommand: str, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run_main([subcommand, "--help"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert f"Usage: rcon {subcommand} " in out
    assert [word for word in words if word not in " ".join(out.split())] == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["chek", "f"], "'check'"),
        (["check"], "Missing argument 'FILE'"),
        (["check", "--srver", "sync", "f"], "Did you mean '--server'?"),
        (["check", "--server", "gtread", "f"], "'gtread' is not one of"),
        (["check", "f", "g"], "unexpected extra argument"),
        (["which", "f"], "no attribute given: add --host, --path, --task"),
        (["which", "f", "--attribute", "remote_addr"], "--attribute: 'remote_addr' is not NAME=VALUE"),
        (["which", "f", "--attribute", "=x"], "'=x' is not NAME=VALUE"),
        (["schema", "f"], "unexpected extra argument"),
    ],
)
def test_bad_usage_is_one_line_with_a_remedy(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_main(arguments) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith("rcon: ")
    assert err.endswith(" --help)\n")
    assert words in err


BAD = {
    "not TOML": ("[policy.web\n", None, "is not TOML", "on a line of its own"),
    "unknown key": (
        '[policy.web]\nmemry = "1G"',
        "policy.web.memry",
        "unknown key",
        "did you mean 'memory'?",
    ),
    "no size": ('[policy.web]\nmemory = "1GB"', "policy.web.memory", "is not a size", "1024"),
    "no policy": ('unmatched = "refuse"', "policy", "there is no policy", "[policy.default]"),
    "route to nowhere": (
        '[policy.web]\npids = 5\n[[route]]\npolicy = "wbe"',
        "route[1].policy",
        "there is no policy 'wbe'",
        "did you mean 'web'?",
    ),
    "isolation that cannot": (
        '[policy.web]\nisolation = "inline"\nmemory = "1G"',
        "policy.web.isolation",
        "use a process",
        '"auto"',
    ),
    "unknown plugin": (
        'plugins = ["no-such-plugin"]\n[policy.web]\npids = 5',
        "plugins",
        "no-such-plugin",
        "",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_wrong_file_is_refused(name: str, write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    text, key, reason, remedy = BAD[name]
    file = write(text)
    assert run_main(["check", file]) == 1
    out, err = capsys.readouterr()
    assert err == ""
    assert out.count("\n") == 1  # one line, however long
    said = " ".join(out.split())
    assert said.startswith(f"REFUSED: {file}: ")
    assert [word for word in (key or "", reason, remedy) if word not in said] == []

    assert run_main(["check", "--json", file]) == 1
    found = json.loads(capsys.readouterr().out)
    problem = found.pop("problem")
    assert found == {"file": file, "good": False, "cgroup": None, "policies": {}, "notes": []}
    assert problem.keys() == {"key", "reason", "remedy"}
    assert problem["key"] == key
    assert reason in problem["reason"]
    assert remedy in (problem["remedy"] or "")

    assert run_main(["which", file, "--host", "x"]) == 125
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith(f"rcon: {file}: ")


def test_check_refuses_a_policy_larger_than_the_budget(
    write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write('[budget]\nmemory = "100M"\n[policy.p]\nmemory = "1G"\n')
    assert run_main(["check", file]) == 1
    said = " ".join(capsys.readouterr().out.split())
    assert "policy.p.memory" in said
    assert "1G never fits: the whole budget is 100M here" in said


def test_a_missing_file_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_main(["check", str(tmp_path / "no.toml")]) == 1
    assert "no.toml: cannot be read: No such file or directory" in " ".join(capsys.readouterr().out.split())


def test_check_refuses_what_cannot_be_enforced_by_key(
    write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    """It refuses limits and users, and lists all of them, not only the first."""
    file = write(
        """
[policy.web]
cpus = "4000-4002"
[policy.web.each]
cpus = "4001"
[policy.site]
user = "nobdy"
[policy.good]
pids = 8
"""
    )
    assert run_main(["check", "--json", "--server", "sync", file]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found.keys() == {"file", "good", "cgroup", "policies", "notes", "problem"}
    assert (found["good"], found["cgroup"], found["problem"]) == (False, None, None)
    policies = found["policies"]
    assert list(policies) == ["web", "site", "good"]
    assert all(one.keys() == {"isolation", "why", "caveat", "problems"} for one in policies.values())
    problems = {
        name: {problem["limit"]: problem for problem in one["problems"]} for name, one in policies.items()
    }
    assert problems["web"].keys() == {"cpus", "each.cpus"}
    assert "CPUs 4000-4002 do not exist" in problems["web"]["cpus"]["reason"]
    assert problems["web"]["cpus"]["remedy"].startswith("choose from 0")
    assert problems["site"]["user"]["reason"] == "there is no user 'nobdy'"
    assert problems["site"]["user"]["remedy"] == "did you mean 'nobody'?"
    assert problems["good"] == {}
    assert (policies["good"]["isolation"], policies["site"]["isolation"]) == ("inline", "process")

    assert run_main(["check", "--server", "sync", file]) == 1
    lines = capsys.readouterr().out.splitlines()
    (cpus,) = (line for line in lines if line.startswith("    REFUSED: cpus: CPUs 4000-4002 do not exist"))
    assert cpus.endswith(f"({problems['web']['cpus']['remedy']})")  # one line, however long
    assert "    REFUSED: user: there is no user 'nobdy' (did you mean 'nobody'?)" in lines
    assert lines[-1] == f"{file}: 2 of 3 policies cannot be enforced here"


def test_a_note_names_policies_that_contain_no_untrusted_code(
    write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write('[policy.web]\npids = 8\n[policy.site]\nuser = "nobdy"')
    run_main(["check", file])
    lines = capsys.readouterr().out.splitlines()
    place = next(number for number, line in enumerate(lines) if line.startswith("web: inline - "))
    assert lines[place + 1].startswith("    note: ")
    assert "guards against accidents only" in lines[place + 1]
    # The end has only the notes about several policies. A note beside a policy is not repeated.
    last = [line for line in lines if line.startswith("note: ")]
    assert [line.startswith("note: policy web: the code runs in the server's process") for line in last] == [
        True
    ]


@pytest.mark.parametrize(
    ("server", "isolation"),
    [("sync", "inline"), ("gthread", "inline"), ("gevent", "process"), ("celery", "process")],
)
def test_isolation_depends_on_the_kind_of_server(
    server: str, isolation: str, write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write('[policy.web]\npids = 8\n[policy.site]\nuser = "nobdy"')
    run_main(["check", "--json", "--server", server, file])
    assert json.loads(capsys.readouterr().out)["policies"]["web"]["isolation"] == isolation


def test_a_remedy_of_several_steps_has_a_line_for_each() -> None:
    """Commands are not wrapped, so that they can be copied."""
    long = "mkdir -p /a && chown nobody " + " ".join(f"/a/file-{number}" for number in range(20))
    hint = f'run the server as root, or run once as root: {long}; echo 1 > /a/b; and set cgroup = "/rcon"'
    problem = check._problem(DelegationError("no cgroup is delegated to this process", hint=hint))
    assert check._refused("rcon.toml", problem) == [
        "REFUSED: rcon.toml: no cgroup is delegated to this process",
        "    run the server as root, or run once as root:",
        f"        {long}",
        "        echo 1 > /a/b",
        '    and set cgroup = "/rcon"',
    ]
    several = check._problem(SettingsError("is wrong", key="a", hint="first; " * 40 + "last"))
    assert check._refused("f", several) == [f"REFUSED: f: a: is wrong ({'first; ' * 40}last)"]
    one = check._problem(SettingsError("is wrong", key="a", hint="mend it"))
    assert check._refused("f", one) == ["REFUSED: f: a: is wrong (mend it)"]
    none = check._problem(SettingsError("is wrong", key="a"))
    assert check._refused("f", none) == ["REFUSED: f: a: is wrong"]


OWNER = Path("/etc/passwd").stat()
NOTHING = {
    "route": None,
    "policy": None,
    "per": None,
    "key": None,
    "cgroup": None,
    "identity": None,
    "problem": None,
}
WEB = {"policy": "web", "cgroup": "web"}
CUSTOMER = {"route": 1, "policy": "customer", "per": "host", "key": "passwd", "cgroup": "customer~passwd"}


@pytest.mark.parametrize(
    ("work", "expected"),
    [
        (["--task", "reports.monthly"], {"route": 3, **WEB}),
        (["--path", "/img/logo.png", "--method", "GET"], {"route": 4, **WEB}),
        (["--command", "/usr/bin/convert"], {"route": 6, **WEB}),
        (["--attribute", "task=reports.daily"], {"route": 3, **WEB}),
        (["--host", "PASSWD:8080"], CUSTOMER),
    ],
)
def test_which(
    work: list[str], expected: dict[str, Any], write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_main(["which", write(ROUTES), "--json", *work]) == 0
    found = json.loads(capsys.readouterr().out)
    identity = found.pop("identity")
    assert found == {name: value for name, value in {**NOTHING, **expected}.items() if name != "identity"}
    assert (identity is None) == (expected is not CUSTOMER)
    if identity is not None:
        assert (identity["uid"], identity["gid"]) == (OWNER.st_uid, OWNER.st_gid)


@pytest.mark.parametrize(
    ("work", "words"),
    [
        (["--host", "no-such-file"], "there is no '/etc/no-such-file'"),
        (["--host", "group"], "root"),
        (["--queue", "slow"], "host"),
        (["--path", "/img", "--method", "PUT"], "no route matches, and there is no policy named default"),
        (["--attribute", "remote_addr=192.0.2.1"], "no route matches"),
    ],
)
def test_which_refuses(work: list[str], words: str, write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(ROUTES)
    assert run_main(["which", file, "--json", *work]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found.keys() == NOTHING.keys()
    assert found["identity"] is None
    assert words in found["problem"]
    assert run_main(["which", file, *work]) == 1
    out, err = capsys.readouterr()
    assert "\nREFUSED: " in out
    assert " as " not in out.splitlines()[0]
    assert err == ""


@pytest.mark.parametrize(
    ("text", "work", "expected"),
    [
        ('unmatched = "allow"', ["--host", "x"], "no route, no policy\nit runs without limits"),
        (
            "[policy.default]\npids = 5",
            ["--host", "x"],
            "no route, policy default\nin the cgroup default\nas the user of the server",
        ),
        (
            ROUTES,
            ["--task", "reports.x"],
            "route 3, policy web\nin the cgroup web\nas the user of the server\n",
        ),
        (
            ROUTES,
            ["--host", "passwd"],
            "route 1, policy customer\nkey 'passwd', in the cgroup customer~passwd\nas uid ",
        ),
        (
            '[policy.default]\nper = "host"\npids = 5',
            ["--path", "/"],
            "no route, policy default\nno key, because it has no host, in the cgroup default\n",
        ),
    ],
)
def test_which_as_text(
    text: str, work: list[str], expected: str, write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_main(["which", write(text), *work]) == 0
    assert capsys.readouterr().out.startswith(expected)


def test_segments_of_a_path_are_attributes() -> None:
    found = which.attributes_of({"path": "/shop//img", "host": "Shop.Example.:80"}, ("header:X-Tenant=a=b",))
    assert found == {
        "path": "/shop//img",
        "host": "shop.example",
        "header:X-Tenant": "a=b",
        "path:1": "shop",
        "path:3": "img",
    }


def test_schema(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_main(["schema"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads(json.dumps(json_schema()))
    assert printed["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    references = {node["$ref"] for node in nodes(printed) if "$ref" in node}
    assert references
    assert references <= {f"#/$defs/{name}" for name in printed["$defs"]}
    known = {"object", "array", "string", "integer", "number", "boolean", "null"}
    assert {node["type"] for node in nodes(printed) if isinstance(node.get("type"), str)} <= known


def nodes(part: Any) -> list[dict[str, Any]]:
    below = part.values() if isinstance(part, dict) else part if isinstance(part, list) else ()
    own = [part] if isinstance(part, dict) else []
    return own + [node for inner in below for node in nodes(inner)]


def test_completion_loads_no_implementation() -> None:
    script = """
import atexit, sys
atexit.register(lambda: print(*sys.modules))
from rcon_plugins.cli.rcon import main
main()
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={
            **os.environ,
            "_RCON_COMPLETE": "bash_complete",
            "COMP_WORDS": "rcon check --server g",
            "COMP_CWORD": "3",
        },
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    *completed, loaded = done.stdout.splitlines()
    assert completed == ["plain,gthread", "plain,gevent"]
    modules = set(loaded.split())
    assert {"click", "rcon_plugins.cli.rcon"} <= modules
    heavy = {
        "msgspec",
        "pluggy",
        "ctypes",
        "rcon_plugins.confinement.manager",
        "rcon_plugins.kernel",
        "rcon_plugins.cli.machine.check",
    }
    assert modules & heavy == set()


@pytest.mark.parametrize(
    ("words", "completed"),
    [
        ("rcon watch --kind oom_kill,memory_h", ["plain,oom_kill,memory_high"]),
        ("rcon run --cpu 30% -- printen", ["plain,printenv"]),
        ("rcon run printenv rc", ["file,rc"]),
        ("rcon run -- ./jo", ["file,./jo"]),
        ("rcon set --exp", []),
    ],
)
def test_words_are_completed(
    words: str, completed: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("_RCON_COMPLETE", "bash_complete")
    monkeypatch.setenv("COMP_WORDS", words)
    monkeypatch.setenv("COMP_CWORD", str(len(words.split()) - 1))
    with pytest.raises(SystemExit):
        run_main([])
    assert capsys.readouterr().out.split() == completed


@pytest.mark.parametrize(
    ("hint", "uid", "shown"),
    [
        ("systemctl edit a.service: [Service] Delegate=cpu; or, to get a scope: b; c; or d", 1000, None),
        (
            "run once as root: mkdir /a && chown me /a; echo 1 > /a/b; and set cgroup",
            1000,
            "rcon doctor shows how to get one",
        ),
        ("do one thing", 1000, "do one thing"),
        ("run once as root: mkdir /a; echo 1 > /a/b", 0, "run once as root: mkdir /a; echo 1 > /a/b"),
    ],
)
def test_a_user_gets_one_way_to_a_cgroup(
    hint: str, uid: int, shown: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: uid)
    first = "systemctl edit a.service: [Service] Delegate=cpu; rcon doctor shows other ways"
    assert shortened(DelegationError("none", hint=hint)) == f"none ({shown or first})"
