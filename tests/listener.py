"""Plugins that take note of the events they hear of, and can answer a kind of them.

`Listener` is one for a manager of the test's own; what `install` installs is a third party's, which writes them down.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rcon_plugins import Event, Limits, hookimpl

#: Its name in settings: ``plugins = ["listener"]``.
NAME = "listener"

_MODULE = """
import os
from rcon_plugins import Limits, Memory, hookimpl

@hookimpl
def rcon_event(event):
    with open(os.environ["LISTENER_FILE"], "ab") as file:
        file.write(event.to_json() + b"\\n")
    if event.kind == os.environ.get("LISTENER_KIND"):
        return Limits(memory=Memory(os.environ["LISTENER_MEMORY"]))
"""


class Listener:
    """Takes note of all events, and answers with what it was given for a kind."""

    def __init__(self, **answers: Limits) -> None:
        self.events: list[Event] = []
        self._answers = answers

    @hookimpl
    def rcon_event(self, event: Event) -> Limits | None:
        self.events.append(event)
        return self._answers.get(event.kind)

    def of(self, kind: str, limit: str | None = None) -> list[Event]:
        """What it has heard of that kind, and of that limit where one is named."""
        return [event for event in self.events if event.kind == kind and limit in (None, event.limit)]


def install(folder: Path) -> Path:
    """Put it, as pip would, into a new directory of ``folder``, which is to be on the path of Python."""
    installed = folder / "installed"
    info = installed / "listener-1.dist-info"
    info.mkdir(parents=True)
    (installed / "listener_of_events.py").write_text(_MODULE)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: listener\nVersion: 1\n")
    (info / "entry_points.txt").write_text(f"[rcon_plugins]\n{NAME} = listener_of_events\n")
    return installed


def environ(folder: Path, kind: str = "", memory: str = "") -> dict[str, str]:
    """The environment in which it writes to `heard` in ``folder``, and answers events of a kind with more memory."""
    return {
        "LISTENER_FILE": str(folder / "heard"),
        "LISTENER_KIND": kind,
        "LISTENER_MEMORY": memory,
    }


def heard(folder: Path) -> list[dict[str, Any]]:
    """What it has heard so far."""
    file = folder / "heard"
    if not file.exists():
        return []
    whole = file.read_bytes().rpartition(b"\n")[0]  # one may be being written just now
    return [json.loads(line) for line in whole.splitlines()]
