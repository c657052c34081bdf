"""Subcommands of plugins: who is asked for them and when, and what is said of those that cannot be."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest

from rcon_plugins import hookimpl
from rcon_plugins.cli import plugin_commands
from rcon_plugins.cli.rcon import rcon, run_main
from rcon_plugins.hookspecs import rcon_commands


class Greeting:
    @hookimpl
    def rcon_commands(self, cli: click.Group) -> None:
        @cli.command(short_help="Greet.")
        @click.option("--status", type=int)
        def greet(status: int | None) -> int | None:
            """Greet whoever calls."""
            click.echo("hello")
            return status

        @cli.group(short_help="Many.")
        def many() -> None:
            """A group of its own."""

        @many.command()
        def inner() -> None:
            click.echo("within")


class Taking:
    @hookimpl
    def rcon_commands(self, cli: click.Group) -> None:
        cli.add_command(click.Command("check"))


class Broken:
    @hookimpl
    def rcon_commands(self, cli: click.Group) -> None:
        raise RuntimeError("on purpose")


class Silent:
    """A plugin for servers alone."""


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    class Point:
        group = "rcon_plugins"

        def __init__(self, name: str, plugin: object) -> None:
            self.name, self.value, self.plugin = name, name, plugin

        def load(self) -> object:
            return self.plugin

    points = [Point(one.__name__.lower(), one()) for one in (Greeting, Taking, Broken, Silent)]

    def entry_points(group: str, name: str | None = None) -> list[Any]:
        return [point for point in points if name in (None, point.name)]

    monkeypatch.setattr("rcon_plugins.builtin.plugins.entry_points", entry_points)
    plugin_commands._commands.cache_clear()
    yield
    plugin_commands._commands.cache_clear()


def test_a_command_of_a_plugin(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("RCON_PLUGINS", "greeting, silent")
    assert run_main(["greet"]) == 0
    assert run_main(["greet", "--status", "3"]) == 3
    assert run_main(["many", "inner"]) == 0
    assert capsys.readouterr().out == "hello\nhello\nwithin\n"
    assert run_main(["--help"]) == 0
    out = capsys.readouterr().out
    assert "\n  greet " in out
    assert "\n  check " in out
    context = rcon.make_context("rcon", [], resilient_parsing=True)
    assert [item.value for item in rcon.shell_complete(context, "gr")] == ["greet"]


def test_installed_is_not_active(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("RCON_PLUGINS", raising=False)
    assert run_main(["greet"]) == 2
    assert "No such command 'greet'" in capsys.readouterr().err
    assert run_main(["--help"]) == 0
    assert "greet" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("named", "says"),
    [
        (
            "nowhere",
            "rcon: RCON_PLUGINS: no installed distribution offers the plugin 'nowhere' (installed are: ",
        ),
        (
            "taking",
            "cannot add its commands: there is a command 'check' already (mend it, or take its name out)",
        ),
        ("greeting,greeting", "RCON_PLUGINS: the plugin 'greeting' does not fit: "),
        (
            "broken",
            "RCON_PLUGINS: the plugin 'broken' cannot add its commands: RuntimeError: on purpose (mend it",
        ),
    ],
)
def test_a_plugin_that_cannot_be(
    named: str, says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is said to whoever asks for its commands, and keeps nobody from the built-in ones."""
    monkeypatch.setenv("RCON_PLUGINS", named)
    assert run_main(["greet"]) == 125
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert says in err
    assert run_main(["schema"]) == 0
    context = rcon.make_context("rcon", [], resilient_parsing=True)
    assert [item.value for item in rcon.shell_complete(context, "sch")] == ["schema"]


@pytest.mark.parametrize("named", ["", "greeting"])
def test_what_nobody_asked_for_costs_nothing(named: str) -> None:
    """A built-in command loads no plugin, and nothing that plugins need."""
    program = (
        "import sys; from rcon_plugins.cli.rcon import run_main; assert run_main(['schema', '--help']) == 0\n"
        "assert not {'pluggy', 'importlib.metadata', 'rcon_plugins.builtin.plugins'} & set(sys.modules)"
    )
    subprocess.run(
        [sys.executable, "-c", program],
        env={"RCON_PLUGINS": named},
        cwd=Path(__file__).parents[3],
        stdout=subprocess.DEVNULL,
        check=True,
    )


def test_the_hook_is_told_what_to_add_to() -> None:
    assert "cli.command()" in (rcon_commands.__doc__ or "")
