"""The lazy group: names, helps and completion without the modules; every subcommand is where the table says."""

from __future__ import annotations

import json
import subprocess
import sys

import click
import pytest

from rcon_plugins.cli.lazy import Lazy, LazyGroup
from rcon_plugins.cli.rcon import SUBCOMMANDS, rcon


@pytest.mark.parametrize("name", SUBCOMMANDS)
def test_the_table_is_right(name: str) -> None:
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
def test_listing_and_completing_imports_no_subcommand(code: str) -> None:
    modules = {lazy.home.partition(":")[0] for lazy in SUBCOMMANDS.values()}
    assert loaded_after(code) & modules == set()


def test_a_command_that_is_added_stands_beside_them() -> None:
    @click.command(short_help="Added.")
    def added() -> None: ...

    group = LazyGroup(
        "g", subcommands={"which": Lazy("rcon_plugins.cli.machine.policy_commands:which", "Known.")}
    )
    group.add_command(added)
    context = click.Context(group)
    assert group.list_commands(context) == ["added", "which"]
    assert {item.value: item.help for item in group.shell_complete(context, "")} == {
        "added": "Added.",
        "which": "Known.",
    }
    assert group.get_command(context, "added") is added
    assert group.get_command(context, "neither") is None


def test_it_completes_names_and_options() -> None:
    context = click.Context(rcon)
    assert {item.value for item in rcon.shell_complete(context, "ch")} == {"check"}
    assert "--version" in {item.value for item in rcon.shell_complete(context, "--")}
