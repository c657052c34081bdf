"""Log one structured line for each refusal, each limit hit and each OOM kill."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections import OrderedDict

import msgspec

from rcon_plugins.hookspecs import hookimpl
from rcon_plugins.outcome import Outcome
from rcon_plugins.work import Work

#: The logger of this project.
LOGGER = logging.getLogger("rcon")

_QUIET = frozenset({"ok", "error", "aborted"})
#: How long nothing is logged of a host that no route names, after a line about it, seconds.
_PAUSE = 60.0
#: Of so many hosts a line is logged in that time. Clients may invent hosts, so one more line stands for all others.
_MOST_HOSTS = 64


class Log:
    """The plugin. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        #: When a host was logged (`time.monotonic`), and how many of its requests were refused since. The oldest first.
        self._hosts: OrderedDict[str, tuple[float, int]] = OrderedDict()

    @hookimpl
    def rcon_work_finished(self, work: Work, outcome: Outcome) -> None:
        """Log one line of JSON at level WARNING, unless the work ended by itself without OOM kills.

        Of requests that no route names, log one for each host and minute.
        """
        if outcome.ending in _QUIET and not outcome.usage.oom_kills:
            return
        count = self._unroutable(work) if outcome.ending == "unroutable" else 1
        if not count:
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
            "needed_kill": outcome.needed_kill,
            "usage": msgspec.to_builtins(outcome.usage),
        }
        if count > 1:
            line["count"] = count
        # json, not msgspec: names come from clients and may not be valid UTF-8
        LOGGER.warning("%s", json.dumps(line))

    def _unroutable(self, work: Work) -> int:
        """Return how many refusals a line about a host stands for now; 0 if it is not time for one.

        Tasks have no host: there it is the name of the task.
        """
        host, now = work.attributes.get("host") or work.name, time.monotonic()
        with self._lock:
            if host not in self._hosts and len(self._hosts) >= _MOST_HOSTS:
                self._forget(now - _PAUSE)
                host = host if len(self._hosts) < _MOST_HOSTS else ""
            logged, more = self._hosts.get(host, (now - _PAUSE, 0))
            if logged > now - _PAUSE:
                self._hosts[host] = (logged, more + 1)
                return 0
            self._hosts[host] = (now, 0)
            self._hosts.move_to_end(host)
            return more + 1

    def _forget(self, latest: float) -> None:
        """Forget the hosts that were logged until then. What was not told of them counts with the other hosts."""
        for host, (logged, more) in list(self._hosts.items()):
            if logged <= latest and host:
                del self._hosts[host]
                if more:
                    others, count = self._hosts.get("", (latest, 0))
                    self._hosts[""] = (others, count + more)
