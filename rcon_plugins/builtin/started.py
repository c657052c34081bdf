"""Call the function that the setting ``executor_started`` names, in each new executor process."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable
from typing import Any, Self

from rcon_plugins.errors import ConfinementError, SettingsError
from rcon_plugins.hookspecs import hookimpl
from rcon_plugins.settings.file import Settings

_KEY = "executor_started"


class Started:
    """The plugin of the setting. It runs after other plugins that have the hook."""

    def __init__(self, name: str, function: Callable[[], Any]) -> None:
        self._name = name
        self._function = function

    @classmethod
    def of(cls, settings: Settings) -> Self | None:
        """Import the function, where the application is loaded. Return None without the setting.

        Raises `SettingsError` if there is no such function.
        """
        name = settings.executor_started
        if name is None:
            return None
        try:
            function = pkgutil.resolve_name(name)
        except Exception as error:
            problem = f"cannot be imported: {type(error).__name__}: {error}"
            hint = "name a function that the server can import, such as shop.database:connect"
            raise _wrong(settings, problem, hint) from error
        if not callable(function):
            problem = f"is a {type(function).__name__}, which cannot be called"
            raise _wrong(settings, problem, "name a function without parameters")
        return cls(name, function)

    @hookimpl(trylast=True)
    def rcon_executor_started(self) -> None:
        """Call the function without arguments. Raises `ConfinementError` with what it raised."""
        try:
            self._function()
        except Exception as error:
            raise ConfinementError(f"{_KEY} {self._name!r} raised {type(error).__name__}: {error}") from error


def _wrong(settings: Settings, problem: str, hint: str) -> SettingsError:
    name = settings.executor_started
    return SettingsError(f"{name!r} {problem}", key=_KEY, value=name, hint=hint, file=settings.file)
