"""Log one structured line for each refusal, each limit hit, each OOM kill, and what a unit of work left behind."""

from __future__ import annotations

import json
import logging
import re
import threading
import time
from collections import OrderedDict

import msgspec

from rcon_plugins.errors import on_one_line
from rcon_plugins.hookspecs import hookimpl
from rcon_plugins.outcome import Outcome
from rcon_plugins.work import Work

#: The logger of this project.
LOGGER = logging.getLogger("rcon")

_QUIET = frozenset({"ok", "error", "aborted"})
#: How long nothing more is logged of the same host or key, after a line about it, seconds.
_PAUSE = 60.0
#: Of so many names a line is logged in that time. Clients may invent names, so one more line stands for all others.
_MOST_HOSTS = 64
#: The longest key and the longest other text of a record, characters: clients and confined code choose them.
_LONGEST_KEY = 512
_LONGEST_TEXT = 2048
#: A value that the line shows without quotes.
_PLAIN = re.compile(r"[\w.~@/:+-]+", re.ASCII)
#: The fields before the detail of a line, in this order.
_SHOWN = ("policy", "key", "limit", "signal", "request_id", "client", "count")


class Log:
    """The plugin. Thread-safe.

    The message is one line for people: ``rcon: EVENT FIELD=VALUE …: DETAIL``. Each record has the fields as a
    dictionary in its attribute ``rcon``, from `logging`'s ``extra``, so that a JSON formatter nests them.
    """

    def __init__(self) -> None:
        self._unroutable = _OncePerMinute()
        self._left_behind = _OncePerMinute()

    @hookimpl
    def rcon_work_finished(self, work: Work, outcome: Outcome) -> None:
        """Log one line at level WARNING, unless the work ended by itself, without OOM kills, and left nothing behind.

        Of requests that no route names, log one for each host and minute. Of those that only left processes behind,
        log one for each policy, key and minute.
        """
        count = 1
        if outcome.ending in _QUIET and not outcome.usage.oom_kills:
            if not outcome.left_behind:
                return
            count = self._left_behind.count(f"{outcome.policy} {outcome.key}")
        elif outcome.ending == "unroutable":
            # Tasks have no host: there it is the name of the task.
            count = self._unroutable.count(work.attributes.get("host") or work.name)
        if count:
            fields = _fields(work, outcome, count)
            LOGGER.warning("%s", _line(fields), extra={"rcon": fields})


class _OncePerMinute:
    """Which names are worth a line now, and for how many units of work the line stands. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        #: When a name was logged (`time.monotonic`), and how often it was counted since. The oldest first.
        self._names: OrderedDict[str, tuple[float, int]] = OrderedDict()

    def count(self, name: str) -> int:
        """Count one more. Return how many a line about the name stands for now; 0 if it is not time for one."""
        now = time.monotonic()
        with self._lock:
            if name not in self._names and len(self._names) >= _MOST_HOSTS:
                self._forget(now - _PAUSE)
                name = name if len(self._names) < _MOST_HOSTS else ""
            logged, more = self._names.get(name, (now - _PAUSE, 0))
            if logged > now - _PAUSE:
                self._names[name] = (logged, more + 1)
                return 0
            self._names[name] = (now, 0)
            self._names.move_to_end(name)
            return more + 1

    def _forget(self, latest: float) -> None:
        """Forget the names that were logged until then. What was not told of them counts with the other names."""
        for name, (logged, more) in list(self._names.items()):
            if logged <= latest and name:
                del self._names[name]
                if more:
                    others, count = self._names.get("", (latest, 0))
                    self._names[""] = (others, count + more)


def _fields(work: Work, outcome: Outcome, count: int) -> dict[str, object]:
    """Return the fields of a record: plain values, each of bounded length. None is "does not apply here"."""
    attributes = work.attributes
    return {
        "event": outcome.ending,
        "kind": work.kind,
        "work": _bounded(work.name, _LONGEST_TEXT),
        "policy": outcome.policy,
        "key": _bounded(outcome.key, _LONGEST_KEY),
        "limit": outcome.limit,
        "signal": outcome.signal,
        "needed_kill": outcome.needed_kill,
        "request_id": attributes.get("request_id"),
        "client": _bounded(attributes.get("remote_addr"), _LONGEST_KEY),
        "detail": _bounded(outcome.detail, _LONGEST_TEXT),
        "left_behind": outcome.left_behind,
        "count": count,
        "usage": msgspec.to_builtins(outcome.usage),
    }


def _line(fields: dict[str, object]) -> str:
    """Return the line for people. The fields stand before the detail, whose text may look like more of them."""
    name, detail = str(fields["work"]), str(fields["detail"])
    if name not in detail:  # a refusal tells of the limit alone
        detail = f"{name}: {detail}" if detail else name
    shown = [f"{name}={_word(fields[name])}" for name in _SHOWN if _is_worth_showing(name, fields[name])]
    return f"rcon: {' '.join([str(fields['event']), *shown])}: {on_one_line(detail)}"


def _is_worth_showing(name: str, value: object) -> bool:
    return value is not None and value != "" and not (name == "count" and value == 1)


def _word(value: object) -> str:
    text = str(value)
    # json, not msgspec: the names that clients choose may not be valid UTF-8.
    return text if _PLAIN.fullmatch(text) else json.dumps(text)


def _bounded(text: str | None, most: int) -> str | None:
    return text if text is None or len(text) <= most else f"{text[:most]}…"
