"""Plugins that record the events they get, and can return limits for one kind of event.

`Listener` is a plugin for a manager in the test itself. `install` installs a third-party plugin that writes the events
to a file.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rcon_plugins import Event, Limits, hookimpl

#: The name of the plugin in settings: ``plugins = ["listener"]``.
NAME = "listener"

_MODULE = """
import os
from rcon_plugins import Limits, Memory, hookimpl

@hookimpl
def rcon_event(event):
    with open(os.environ["LISTENER_FILE"], "ab") as file:
        file.write(event.to_json() + b"\\n")
    if event.kind == os.environ.get("LISTENER_KIND"):
        return Limits(memory=Memory.parse(os.environ["LISTENER_MEMORY"]))
"""


class Listener:
    """Records all events, and returns the limits it was given for a kind."""

    def __init__(self, **answers: Limits) -> None:
        self.events: list[Event] = []
        self._answers = answers

    @hookimpl
    def rcon_event(self, event: Event) -> Limits | None:
        self.events.append(event)
        return self._answers.get(event.kind)

    def of(self, kind: str, limit: str | None = None) -> list[Event]:
        """Return the recorded events of a kind; with ``limit``, only those of that limit."""
        return [event for event in self.events if event.kind == kind and limit in (None, event.limit)]


def install(folder: Path) -> Path:
    """Install the plugin, as pip would, into a new directory of ``folder``. Put the returned path on Python's path."""
    installed = folder / "installed"
    info = installed / "listener-1.dist-info"
    info.mkdir(parents=True)
    (installed / "listener_of_events.py").write_text(_MODULE)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: listener\nVersion: 1\n")
    (info / "entry_points.txt").write_text(f"[rcon_plugins]\n{NAME} = listener_of_events\n")
    return installed


def environ(folder: Path, kind: str = "", memory: str = "") -> dict[str, str]:
    """Return the plugin's environment: it writes to the file `heard`, and returns ``memory`` for a kind of event."""
    return {
        "LISTENER_FILE": str(folder / "heard"),
        "LISTENER_KIND": kind,
        "LISTENER_MEMORY": memory,
    }


def heard(folder: Path) -> list[dict[str, Any]]:
    """Return the events that the plugin has recorded so far."""
    file = folder / "heard"
    if not file.exists():
        return []
    whole = file.read_bytes().rpartition(b"\n")[0]  # the last line may still be incomplete
    return [json.loads(line) for line in whole.splitlines()]
