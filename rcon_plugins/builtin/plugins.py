"""Make the plugin manager, with the built-in plugins and the plugins that the settings name."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from importlib.metadata import entry_points
from typing import Any

import pluggy

from rcon_plugins import hookspecs
from rcon_plugins.builtin import identity, limits, seccomp
from rcon_plugins.builtin.landlock import Landlock
from rcon_plugins.builtin.log import Log
from rcon_plugins.builtin.namespaces import Namespaces
from rcon_plugins.builtin.process import BeforeIdentity, Rlimits
from rcon_plugins.builtin.routing import Routing
from rcon_plugins.errors import SettingsError
from rcon_plugins.settings.file import Settings

ENTRY_POINTS = "rcon_plugins"


def make_plugin_manager(settings: Settings, extra: Iterable[object] = ()) -> pluggy.PluginManager:
    """Return a plugin manager with the built-in plugins, those named in ``settings.plugins``, and ``extra``.

    An installed plugin is loaded only if the settings name it. Raises `SettingsError` for a name that no installed
    distribution offers, a plugin that cannot be loaded, or a hook that does not exist.
    """
    manager = pluggy.PluginManager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    manager.register(limits, "rcon.limits")
    manager.register(Log(), "rcon.log")
    manager.register(Routing(settings), "rcon.routing")
    # pluggy calls these last, in this order. Plugins that need privileges come before the identity, which drops them.
    # Rlimits come after Landlock and the identity, because these open files.
    manager.register(BeforeIdentity(), "rcon.process")
    namespaces = Namespaces()
    manager.register(namespaces, "rcon.namespaces")
    manager.register(seccomp, "rcon.seccomp")
    manager.register(Landlock(namespaces), "rcon.landlock")
    manager.register(identity, "rcon.identity")
    manager.register(Rlimits(), "rcon.rlimits")
    for name in settings.plugins:
        _register(manager, _load(name, settings.file), name, settings.file)
    for plugin in extra:
        _register(manager, plugin, None, settings.file)
    return manager


def commands_manager(names: Iterable[str], where: str) -> pluggy.PluginManager:
    """Return a plugin manager with only the installed plugins of these names. For commands, which have no settings.

    ``where`` is the source of the names, for messages. Raises `SettingsError` as `make_plugin_manager` does.
    """
    manager = pluggy.PluginManager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    for name in names:
        _register(manager, _load(name, None, where), name, None, where)
    return manager


def limits_manager() -> pluggy.PluginManager:
    """Return a plugin manager with only the built-in plugin for limits. For the options of a command."""
    manager = pluggy.PluginManager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    manager.register(limits, "rcon.limits")
    return manager


def calling(hook: pluggy.HookCaller) -> Callable[..., Any]:
    """Return a function that calls a hook with the implementations registered now.

    If there is only one implementation, return that function itself. Use it for hooks on the hot path whose first
    result counts: with one implementation or none, pluggy would take most of the time.
    """
    implementations = hook.get_hookimpls()
    if not implementations:
        return _do_nothing
    only = implementations[0]
    is_plain = not (only.wrapper or only.hookwrapper)
    if len(implementations) == 1 and is_plain and hook.spec and only.argnames == hook.spec.argnames:
        return only.function
    return hook


def _do_nothing(**_: object) -> None:
    """Do nothing. Called in place of a hook that has no implementation."""


def _load(name: str, file: str | None, key: str = "plugins") -> object:
    found = list(entry_points(group=ENTRY_POINTS, name=name))
    if not found:
        offered = sorted({point.name for point in entry_points(group=ENTRY_POINTS)})
        raise SettingsError(
            f"no installed distribution offers the plugin {name!r}",
            key=key,
            value=name,
            hint=f"install it, or remove the name; installed plugins: {', '.join(offered) or 'none'}",
            file=file,
        )
    try:
        return found[0].load()
    except Exception as error:
        raise SettingsError(
            f"the plugin {name!r} cannot be loaded: {type(error).__name__}: {error}",
            key=key,
            value=name,
            hint=f"its entry point is {found[0].value}",
            file=file,
        ) from error


def _register(
    manager: pluggy.PluginManager,
    plugin: object,
    name: str | None,
    file: str | None,
    key: str = "plugins",
) -> None:
    try:
        manager.register(plugin, name)
        manager.check_pending()
    except (pluggy.PluginValidationError, ValueError) as error:
        raise SettingsError(
            f"the plugin {name or plugin!r} does not match the hooks: {error}",
            key=key,
            value=name,
            hint="see docs/reference/hooks.md for the hooks and their parameters",
            file=file,
        ) from error
