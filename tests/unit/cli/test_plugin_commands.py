"""Commands of plugins: which plugins are loaded and when, and the messages for broken ones."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest

from rcon_plugins import hookimpl
from rcon_plugins.cli.rcon import plugin_commands, rcon, run_main
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
    """A plugin without commands."""


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
    plugin_commands.cache_clear()
    yield
    plugin_commands.cache_clear()


def test_a_plugin_adds_a_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
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


def test_an_installed_plugin_is_not_active(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
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
            "rcon: RCON_PLUGINS: no installed distribution offers the plugin 'nowhere' (install it, or remove",
        ),
        (
            "taking",
            "cannot add its commands: there is already a command 'check' (fix the plugin, or remove it from",
        ),
        ("greeting,greeting", "RCON_PLUGINS: the plugin 'greeting' does not match the hooks: "),
        (
            "broken",
            "RCON_PLUGINS: plugin 'broken' cannot add its commands: RuntimeError: on purpose (fix the plugin",
        ),
    ],
)
def test_a_broken_plugin_is_reported(
    named: str, says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is reported only for commands that are not built in."""
    monkeypatch.setenv("RCON_PLUGINS", named)
    assert run_main(["greet"]) == 125
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert says in err
    assert run_main(["schema"]) == 0
    context = rcon.make_context("rcon", [], resilient_parsing=True)
    assert [item.value for item in rcon.shell_complete(context, "sch")] == ["schema"]


@pytest.mark.parametrize("named", ["", "greeting"])
def test_a_built_in_command_loads_no_plugin(named: str) -> None:
    """It loads no module that only plugins need, either."""
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


def test_the_hook_documents_the_group() -> None:
    assert "cli.command()" in (rcon_commands.__doc__ or "")
