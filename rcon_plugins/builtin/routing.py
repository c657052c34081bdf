"""Select a policy by the routes of the settings file. Runs after all other plugins that select a policy."""

from __future__ import annotations

from rcon_plugins.hookspecs import hookimpl
from rcon_plugins.settings.file import Settings
from rcon_plugins.settings.routing import Router
from rcon_plugins.work import Work


class Routing:
    """Selects the policy by the routes of the settings. The first match wins."""

    def __init__(self, settings: Settings) -> None:
        self._router = Router(settings.routes)

    @hookimpl(trylast=True)
    def rcon_select_policy(self, work: Work) -> str | None:
        """Return the policy of the first route that matches."""
        return self._router.match(work)
