"""Hooks that each work asks: called directly where that is the same."""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any

import pluggy
import pytest

from rcon_plugins import hookspecs
from rcon_plugins.builtin.plugins import calling
from rcon_plugins.hookspecs import hookimpl
from rcon_plugins.work import Work

WORK = Work("call", "x")


class One:
    @hookimpl
    def rcon_select_policy(self, work: Work) -> str | None:
        return work.name


class Silent:
    @hookimpl(tryfirst=True)
    def rcon_select_policy(self, work: Work) -> str | None:
        return None


class Careless:
    @hookimpl
    def rcon_select_policy(self) -> str | None:
        return "careless"


class Around:
    @hookimpl(wrapper=True)
    def rcon_select_policy(self, work: Work) -> Generator[None, str, str]:
        return f"around {(yield)}"


def select(*plugins: object) -> Callable[..., Any]:
    manager = pluggy.PluginManager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    for plugin in plugins:
        manager.register(plugin)
    return calling(manager.hook.rcon_select_policy)


@pytest.mark.parametrize(
    ("plugins", "found"),
    [
        ([], None),
        ([One()], "x"),
        ([Careless()], "careless"),
        ([One(), Silent()], "x"),
        ([Careless(), One()], "x"),
        ([Around()], "around None"),
        ([One(), Around()], "around x"),
    ],
)
def test_the_first_policy_that_a_plugin_selects_counts(plugins: list[object], found: str | None) -> None:
    assert select(*plugins)(work=WORK) == found


def test_a_single_plugin_is_called_directly() -> None:
    plugin = One()
    assert select(plugin) == plugin.rcon_select_policy
    for plugins in ([Careless()], [Around()], [plugin, Silent()]):
        assert isinstance(select(*plugins), pluggy.HookCaller)
