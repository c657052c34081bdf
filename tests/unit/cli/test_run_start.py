"""The start of rcon run: the modules it loads, and the `Order` that results from its options."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rcon_plugins.cli.capcon.commands import capcon
from rcon_plugins.cli.exit import BadUsage
from rcon_plugins.cli.options import (
    CAPCON_OPTIONS,
    EXPLAIN_OPTIONS,
    RUN_OPTIONS,
    HelpRequested,
    Option,
    parse,
)
from rcon_plugins.cli.run import commands, policy
from rcon_plugins.cli.run import run as rcon_run
from rcon_plugins.command.run import Order

DISK = "/var/tmp"
HEAVY = {
    *(
        "click",
        "msgspec",
        "pluggy",
        "dataclasses",
        "inspect",
        "json",
        "pathlib",
        "threading",
        "random",
        "ctypes",
    ),
}
LIMITS = [
    [],
    ["--cpu", "30%"],
    ["--cpu=150%", "--cpu-weight", "50", "--cpus", "0"],
    ["--memory", "64M", "--swap", "0", "--pids", "8"],
    ["--memory", "64M", "--memory", "128M"],
    ["--write", "5M", "--read", "1M", "--read-iops", "7", "--write-iops", "9", "--device", DISK],
]


class Caught(Exception):
    def __init__(self, order: Order) -> None:
        self.order = order


def order_of(words: list[str], monkeypatch: pytest.MonkeyPatch) -> Order:
    """Return the `Order` that results from a command line."""

    def execute(order: Order, *_: Any, **__: Any) -> int:
        raise Caught(order)

    monkeypatch.setattr(rcon_run, "execute", execute)
    with pytest.raises(Caught) as caught:
        rcon_run.run(words)
    return caught.value.order


@pytest.mark.parametrize("options", LIMITS, ids=" ".join)
def test_limits_are_those_of_a_policy(options: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """An option gives the same kernel limit directly and by way of a policy."""
    order = order_of([*options, "--", "sh", "-c", "exit 3", "--memory"], monkeypatch)
    parsed = parse([*options, "true"], RUN_OPTIONS).options
    assert order.resources == policy.limit_fields(parsed)["resources"]
    assert order.arguments == ("sh", "-c", "exit 3", "--memory")
    assert order.program.endswith("/sh")


def test_other_options_come_to_the_order(monkeypatch: pytest.MonkeyPatch) -> None:
    order = order_of(["--timeout", "1.5m", "--group", "nobody-has-this-name", "true"], monkeypatch)
    assert (order.timeout, order.group) == (90, "nobody-has-this-name")
    assert order.become is None
    order = order_of(["--cap=net_raw", "true"], monkeypatch)
    assert order.become is not None


def test_a_plain_command_loads_little() -> None:
    """This holds with limits, too, which need only the module for units in addition."""
    code = (
        "import sys\n"
        "from rcon_plugins.cli.run import run\n"
        "run.execute = lambda *_, **__: 0\n"
        "run.run(sys.argv[1:])\n"
        "print(*sys.modules)"
    )
    for options in LIMITS:
        words = [sys.executable, "-c", code, *options, "--timeout", "1m", "--", "true"]
        done = subprocess.run(words, capture_output=True, text=True, check=True)
        assert set(done.stdout.split()) & HEAVY == set()


@pytest.mark.parametrize("module", ["rcon_plugins.cli.run.run", "rcon_plugins.cli.capcon.run"])
def test_neither_parser_loads_click(module: str) -> None:
    code = f"import sys, {module}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) & {"click", "msgspec", "pluggy"} == set()


@pytest.mark.parametrize(
    ("command", "options"),
    [
        (commands.run, RUN_OPTIONS),
        (capcon.commands["run"], CAPCON_OPTIONS),
        (capcon.commands["explain"], EXPLAIN_OPTIONS),
    ],
    ids=["rcon run", "capcon run", "capcon explain"],
)
def test_click_declares_the_options_of_the_parser(command: Any, options: tuple[Option, ...]) -> None:
    """Help and completion come from click: they list the same flags, values and texts."""
    declared = [one for one in command.params if one.param_type_name == "option"]
    assert [tuple(sorted((*one.opts, *one.secondary_opts))) for one in declared] == [
        tuple(sorted(option.flags)) for option in options
    ]
    for one, option in zip(declared, options, strict=True):
        assert (one.name, one.help, one.hidden) == (option.name, option.help, option.hidden)
        assert one.is_flag == (not option.metavar)
        assert one.multiple == option.several
        assert one.is_flag or one.metavar == option.metavar


@pytest.mark.parametrize(
    ("words", "given", "command"),
    [
        (["true"], {}, ("true",)),
        (["--", "--user"], {}, ("--user",)),
        (["-", "x"], {}, ("-", "x")),
        (["--user", "a", "--user=b", "x", "--", "y"], {"user": "b"}, ("x", "--", "y")),
        (["-ua", "-c", "kill", "-cchown", "x"], {"user": "a", "cap": ["kill", "chown"]}, ("x",)),
        (["--drop-all", "--user", "--help", "x"], {"drop_all": True, "user": "--help"}, ("x",)),
        (["--user=", "x"], {"user": ""}, ("x",)),
    ],
)
def test_words_are_parsed(words: list[str], given: dict[str, Any], command: tuple[str, ...]) -> None:
    assert parse(words, CAPCON_OPTIONS) == (given, command)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "the command is missing (name a program after --)"),
        (["--drop-all", "--"], "the command is missing (name a program after --)"),
        (["--", ""], "the command is empty (name a program after --)"),
        (["--usr", "x"], "unknown option '--usr' (did you mean --user?)"),
        (["--zzz"], "unknown option '--zzz' (a command goes after --)"),
        (["-x"], "unknown option '-x' (a command goes after --)"),
        (["--user"], "--user needs a value (--user NAME|UID)"),
        (["-u"], "-u needs a value (-u NAME|UID)"),
        (["--drop-all=x", "y"], "--drop-all takes no value (leave out 'x')"),
    ],
)
def test_wrong_words_are_refused(words: list[str], message: str) -> None:
    with pytest.raises(BadUsage) as caught:
        parse(words, CAPCON_OPTIONS)
    assert str(caught.value) == message


@pytest.mark.parametrize("words", [["--help"], ["-h"], ["--user", "x", "--help", "y"]])
def test_help_is_not_parsed_further(words: list[str]) -> None:
    with pytest.raises(HelpRequested):
        parse(words, RUN_OPTIONS if words[0] != "-h" else CAPCON_OPTIONS)


@pytest.mark.parametrize(("name", "main"), [("rcon", "main"), ("capcon", "capcon_main")])
def test_the_scripts_start_without_click(name: str, main: str) -> None:
    text = (Path(__file__).resolve().parents[3] / "scripts" / name).read_text()
    assert text.endswith(f"\n{main}()\n")
    assert [line for line in text.splitlines() if "import" in line.split()] == [
        "import sys",
        f"        from rcon_plugins.cli.start import {main}",
        "        import site",
        f"        from rcon_plugins.cli.start import {main}",
    ]
