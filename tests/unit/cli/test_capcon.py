"""capcon's command line: bad usage, help, completion and the table."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rcon_plugins.cli.capcon import run, show
from rcon_plugins.cli.capcon.commands import run_main
from rcon_plugins.cli.exit import Refused
from rcon_plugins.cli.program import find_program
from rcon_plugins.cli.request import Request, look_up
from rcon_plugins.kernel.capability import Capabilities, Identity, Ids, State, read_state


def request(*command: str, identity: Identity | None = None, keep: Capabilities | None = None) -> Request:
    return Request(command or ("true",), identity, keep)


def state(held: Capabilities, *, uid: int = 1000, permitted: Capabilities | None = None) -> State:
    none = Capabilities.none()
    ids = Ids.all(uid)
    permitted = held if permitted is None else permitted
    return State(permitted, held, none, none, Capabilities.known(), 0, False, ids, ids, (uid,))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run", "--user", "nobdy", "--", "true"], "unknown user 'nobdy' (did you mean nobody?"),
        (["run", "--user", "%", "--", "true"], "unknown user '%'"),
        (["run", "--user", "", "--", "true"], "unknown user ''"),
        (["run", "--user", "4294967295", "--", "true"], "4294967295 is not a user or group id"),
        (
            ["run", "--user", "9" * 5000, "--", "true"],
            "is not a user or group id (the highest is 4294967294",
        ),
        (["run", "--user", "-1", "--", "true"], "unknown user '-1'"),
        (
            ["run", "--user", "4242", "--", "true"],
            "uid 4242 has no account, and so no group (add --group; see",
        ),
        (["run", "--user", "nobody", "--group", "deamon", "--", "true"], "did you mean daemon?"),
        (["run", "--user", "nobody", "--groups", "mail,?", "--", "true"], "unknown group '?'"),
        (["run", "--group", "mail", "--", "true"], "need --user"),
        (["run", "--cap", "net_bind_servce", "--", "true"], "did you mean net_bind_service?"),
        (["run", "--cap", "CAP_NET_ROW", "--", "true"], "did you mean net_raw?"),
        (["run", "--cap", "?", "--", "true"], "unknown capability '?' (capabilities(7) lists them"),
        (["run", "--cap", "63", "--", "true"], "this kernel has no capability 63"),
        (["run", "--cap", "64", "--", "true"], "unknown capability '64'"),
        (
            ["run", "--cap", "net_raw", "--drop-all", "--", "true"],
            "exclude each other (leave out one of them; see",
        ),
        (["run", "--write", "/tmp", "--", "true"], "need --no-new-privs"),
        (["run", "--no-new-privs", "--read-only", "", "--", "true"], "the path is empty"),
        (["run", "--", ""], "the command is empty"),
        (["run", "--drop-all", "--"], "the command is missing"),
        (["run", "--usr", "nobody", "--", "true"], "unknown option '--usr' (did you mean --user? see"),
        (["explain", "--cap", "x y\nz", "--", "true"], "unknown capability"),
        (["show", "self"], "'self' is not a valid integer"),
        (["show", "0"], "0 is not in the range"),
        (["shwo"], "No such command"),
    ],
)
def test_bad_usage_is_one_line_with_a_remedy(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("capcon: ")
    assert err.endswith(" --help)\n")
    assert err.count("\n") == 1
    assert words in err


@pytest.mark.parametrize(
    ("command", "status"),
    [("no-such-command", 127), ("/no/such/file", 127), ("/etc/passwd", 126), ("/etc", 126), ("a\0b", 127)],
)
@pytest.mark.parametrize("subcommand", ["run", "explain"])
def test_a_program_that_is_missing_or_not_executable(
    subcommand: str, command: str, status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_main([subcommand, "--", command]) == status
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)


@pytest.mark.parametrize("subcommand", [[], ["run"], ["explain"], ["show"]])
def test_help_has_examples(subcommand: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run_main([*subcommand, "--help"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert f"Usage: {' '.join(['capcon', *subcommand])} " in out
    assert "..." not in out.partition("\nCommands:")[2]  # each help text fits on its line
    assert "      capcon " in out or "    capcon " in out or "capcon run" in out or "_CAPCON_COMPLETE" in out


def test_options_after_the_command_belong_to_it(tmp_path: Path) -> None:
    """This holds without --, too."""
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "from rcon_plugins.cli.capcon.commands import main; main()",
            "run",
            "echo",
            "--user",
            "--",
            "x",
        ],
        stdout=subprocess.PIPE,
        cwd=tmp_path,
        check=True,
    )
    assert done.stdout == b"--user -- x\n"


@pytest.mark.parametrize(
    ("words", "completed"),
    [
        ("capcon run --cap net_b", ["net_bind_service", "net_broadcast"]),
        ("capcon run --cap chown,net_bi", ["chown,net_bind_service"]),
        ("capcon run --user nobo", ["nobody"]),
        ("capcon run --groups mail,daem", ["mail,daemon"]),
        ("capcon run --user nobody -- printen", ["printenv"]),
        ("capcon ex", ["explain"]),
    ],
)
def test_words_are_completed(
    words: str, completed: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("_CAPCON_COMPLETE", "bash_complete")
    monkeypatch.setenv("COMP_WORDS", words)
    monkeypatch.setenv("COMP_CWORD", str(len(words.split()) - 1))
    with pytest.raises(SystemExit):
        run_main([])
    assert capsys.readouterr().out.split() == [f"plain,{word}" for word in completed]


def test_help_loads_no_implementation() -> None:
    script = "import sys; from rcon_plugins.cli.capcon import commands; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, check=True)
    loaded = set(done.stdout.split())
    assert {"click", "rcon_plugins.errors"} <= loaded
    heavy = {"msgspec", "pluggy", "ctypes", "rcon_plugins.kernel", "rcon_plugins.cli.capcon.run"}
    assert loaded & heavy == set()


def test_accounts_are_looked_up_in_the_databases() -> None:
    assert look_up("root", None, "") == Identity(0, 0, ())
    assert look_up("0", "mail", "9,mail,9") == Identity(0, 8, (8, 9))
    assert look_up("nobody", None, None).groups == (look_up("nobody", None, None).gid,)
    assert look_up("4242", "7", None) == Identity(4242, 7, ())


def test_a_program_is_looked_for_as_a_shell_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "program").write_text("#!/bin/sh\n")
    monkeypatch.setenv("PATH", f"{tmp_path}/none:{tmp_path}/first:{tmp_path}/second")
    with pytest.raises(Refused, match=r"first/program is not executable \(chmod \+x"):
        find_program("program")
    (tmp_path / "second" / "program").chmod(0o755)
    assert find_program("program") == f"{tmp_path}/second/program"
    monkeypatch.chdir(tmp_path / "second")
    assert find_program("./program") == "./program"
    monkeypatch.setenv("PATH", f"{tmp_path}")
    with pytest.raises(Refused, match="program: not found"):
        find_program("program")


def test_problems_name_each_difference() -> None:
    raw, kill = Capabilities.of("net_raw"), Capabilities.of("kill")
    who = Identity(1000, 1000, ())
    assert run.problems(request(identity=who, keep=raw), state(raw)) == []
    assert run.problems(request(), state(raw, uid=0)) == []  # nothing was requested
    assert run.problems(request(identity=who, keep=raw), state(kill, uid=0)) == [
        "will run with uid 0, not 1000 alone",
        "will run with gid 0, not 1000 alone",
        "will not hold cap_net_raw",
        "will hold cap_kill, which was not requested",
    ]
    permitted_alone = state(Capabilities.none(), permitted=raw)
    assert run.problems(request(keep=raw), permitted_alone) == ["will not hold cap_net_raw"]


def test_a_long_list_names_what_is_missing() -> None:
    known = Capabilities.known()
    assert show.listed(known) == f"all {len(known)} capabilities"
    assert show.listed(known - Capabilities.of("kill")) == "all capabilities but cap_kill"
    assert show.listed(Capabilities.of("net_raw", "kill")) == "cap_kill, cap_net_raw"
    assert show.listed(Capabilities.none()) == "none"


def test_the_table_and_the_json_of_a_state(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    names = ("chown", "fowner", "kill", "net_raw", "net_admin")
    shown = state(Capabilities.of(*names))._replace(
        securebits=0b1 | 1 << 6 | 1 << 9, uids=Ids(0, 65534, 0, 65534), gids=Ids.all(424242), groups=()
    )
    assert show.table(shown).splitlines() == [
        "uid           real 0 (root), effective 65534 (nobody), saved",
        "              0 (root), fs 65534 (nobody)",
        "gid           424242",
        "groups        none",
        "permitted     cap_chown, cap_fowner, cap_kill,",
        "              cap_net_admin, cap_net_raw",
        "effective     cap_chown, cap_fowner, cap_kill,",
        "              cap_net_admin, cap_net_raw",
        "inheritable   none",
        "ambient       none",
        f"bounding      all {len(Capabilities.known())} capabilities",
        "securebits    noroot, no_cap_ambient_raise, 0x200",
        "no_new_privs  no",
    ]
    data = json.loads(json.dumps(show.data(shown)))
    assert data["permitted"] == ["cap_chown", "cap_fowner", "cap_kill", "cap_net_admin", "cap_net_raw"]
    assert data["uid"] == {"real": 0, "effective": 65534, "saved": 0, "fs": 65534}
    assert data["securebits"] == ["noroot", "no_cap_ambient_raise", "0x200"]


def test_show_without_pid_shows_this_process(capsys: pytest.CaptureFixture[str]) -> None:
    mine = read_state()
    assert run_main(["show", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["uid"]["effective"] == os.geteuid()
    assert shown["bounding"] == list(mine.bounding.names())
    assert run_main(["show", str(os.getpid())]) == 0
    assert "securebits    " in capsys.readouterr().out


def test_a_closed_pipe_is_no_error() -> None:
    script = "from rcon_plugins.cli.capcon.commands import main; main()"
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-c", script, "show"], stdout=writing, stderr=subprocess.PIPE, check=False
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, b"")
