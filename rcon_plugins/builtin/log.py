"""Log one structured line for each refusal, each limit hit and each OOM kill."""

from __future__ import annotations

import json
import logging

import msgspec

from rcon_plugins.hookspecs import hookimpl
from rcon_plugins.outcome import Outcome
from rcon_plugins.work import Work

#: The logger of this project.
LOGGER = logging.getLogger("rcon")

_QUIET = frozenset({"ok", "error", "aborted"})


@hookimpl
def rcon_work_finished(work: Work, outcome: Outcome) -> None:
    """Log one line of JSON at level WARNING, unless the request, task or command ended by itself without OOM kills."""
    if outcome.ending in _QUIET and not outcome.usage.oom_kills:
        return
    line = {
        "event": outcome.ending,
        "kind": work.kind,
        "work": work.name,
        "policy": outcome.policy,
        "key": outcome.key,
        "limit": outcome.limit,
        "signal": outcome.signal,
        "detail": outcome.detail,
        "usage": msgspec.to_builtins(outcome.usage),
    }
    # json, not msgspec: names come from clients and may not be valid UTF-8
    LOGGER.warning("%s", json.dumps(line))
