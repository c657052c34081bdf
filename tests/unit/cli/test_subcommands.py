"""The group rcon: names, helps and completion without importing the subcommands."""

from __future__ import annotations

import json
import subprocess
import sys

import click
import pytest

from rcon_plugins.cli.rcon import SUBCOMMANDS, Rcon, rcon, run_main


@pytest.mark.parametrize("name", SUBCOMMANDS)
def test_the_table_matches_the_command(name: str) -> None:
    command = SUBCOMMANDS[name].load()
    assert command.name == name
    assert command.get_short_help_str(limit=200) == SUBCOMMANDS[name].short_help


def loaded_after(code: str) -> set[str]:
    whole = f"import sys, json\n{code}\nprint(json.dumps([m for m in sys.modules if m.startswith('rcon_plugins')]))"
    done = subprocess.run([sys.executable, "-c", whole], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize(
    "code",
    [
        "from rcon_plugins.cli.rcon import run_main; run_main(['--help'])",
        "from rcon_plugins.cli.rcon import rcon; rcon.shell_complete(rcon.make_context('rcon', ['check']), 'c')",
    ],
)
def test_help_and_completion_import_no_subcommand(code: str) -> None:
    modules = {command.location.partition(":")[0] for command in SUBCOMMANDS.values()}
    assert loaded_after(code) & modules == set()


@pytest.mark.parametrize("name", SUBCOMMANDS)
def test_the_help_of_each_command_has_examples_and_exit_statuses(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_main([name, "--help"]) == 0
    out = capsys.readouterr().out
    assert f"    rcon {name}" in out
    assert "  Exit status:" in out
    assert "    0    " in out or "that of COMMAND" in out


@pytest.mark.parametrize("name", [None, *SUBCOMMANDS])
def test_help_fits_into_80_columns(
    name: str | None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert run_main([*([name] if name else []), "--help"]) == 0
    assert [line for line in capsys.readouterr().out.splitlines() if len(line) > 79] == []


def test_an_added_command_is_listed_after_the_built_in_ones() -> None:
    @click.command(short_help="Added.")
    def added() -> None: ...

    group = Rcon("g")
    group.add_command(added)
    context = click.Context(group)
    assert group.list_commands(context) == [*SUBCOMMANDS, "added"]
    found = {item.value: item.help for item in group.shell_complete(context, "")}
    assert found["added"] == "Added."
    assert found["which"] == SUBCOMMANDS["which"].short_help
    assert group.get_command(context, "added") is added
    assert group.get_command(context, "neither") is None


def test_names_and_options_are_completed() -> None:
    context = click.Context(rcon)
    assert {item.value for item in rcon.shell_complete(context, "ch")} == {"check"}
    assert "--version" in {item.value for item in rcon.shell_complete(context, "--")}
