"""Call the function that the setting ``executor_started`` names, in each new executor process."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable
from typing import Any, Self

from rcon_plugins.errors import SettingsError
from rcon_plugins.hookspecs import hookimpl
from rcon_plugins.settings.file import Settings

_KEY = "executor_started"


class Started:
    """The plugin of the setting. It runs after other plugins that have the hook."""

    def __init__(self, function: Callable[[], Any]) -> None:
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
            raise SettingsError(
                f"{name!r} cannot be imported: {type(error).__name__}: {error}",
                key=_KEY,
                value=name,
                hint="name a function that the server can import, such as shop.database:connect",
                file=settings.file,
            ) from error
        if not callable(function):
            raise SettingsError(
                f"{name!r} is a {type(function).__name__}, which cannot be called",
                key=_KEY,
                value=name,
                hint="name a function without parameters",
                file=settings.file,
            )
        return cls(function)

    @hookimpl(trylast=True)
    def rcon_executor_started(self) -> None:
        """Call the function without arguments."""
        self._function()
