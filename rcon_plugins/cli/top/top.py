"""``rcon top``: print the table again and again, or show it live on a terminal."""

from __future__ import annotations

import json
import time

from rcon_plugins.cli.exit import discard_output, interrupted
from rcon_plugins.cli.top.samples import Rates, Sampler, Source, View
from rcon_plugins.cli.top.screen import Ended, Screen, is_available, seconds_until
from rcon_plugins.cli.top.table import (
    SORTS,
    as_json,
    as_text,
    help_screen,
    ordered,
    screen,
    server_as_json,
    summary,
)
from rcon_plugins.errors import RconError

#: When a terminal shows the first rates, in seconds.
_FIRST_RATES = 0.25
#: How often a running source is looked at, and after how long it counts as silent, in seconds.
_POLL, _SILENT = 0.05, 3.0


def top(
    source: Source,
    *,
    sort: str = "cpu",
    interval: float = 2.0,
    iterations: int | None = None,
    to_json: bool = False,
) -> int:
    """Show the samples of ``source`` every ``interval`` seconds, ``iterations`` times; return the exit status."""
    if to_json or not is_available():
        return _print(source, sort, interval, iterations, to_json)
    try:
        with Screen() as terminal:
            _Live(terminal, source, sort, interval, iterations).run()
    except Ended as ended:
        return 128 + ended.number
    except KeyboardInterrupt:
        pass  # the same as q
    return 0


def _print(source: Source, sort: str, interval: float, iterations: int | None, to_json: bool) -> int:
    rates = Rates()
    rates.view(source())
    due = time.monotonic()
    done = 0
    try:
        while iterations is None or done < iterations:
            due += interval
            time.sleep(seconds_until(due))
            view = rates.view(source())
            rows = ordered(view.rows, sort)
            if to_json:
                groups, servers = map(as_json, rows), map(server_as_json, view.servers)
                found = {"time": time.time(), "groups": list(groups), "servers": list(servers)}
                print(json.dumps(found), flush=True)
            else:
                print(f"{summary(view, sort, interval)}\n{as_text(rows)}\n", flush=True)
            done += 1
    except KeyboardInterrupt:
        return interrupted()
    except BrokenPipeError:
        discard_output()  # the reader has closed the pipe
    return 0


class _Live:
    """The loop on a terminal."""

    def __init__(
        self, terminal: Screen, source: Source, sort: str, interval: float, iterations: int | None
    ) -> None:
        self._terminal = terminal
        self._sampler = Sampler(source)
        self._sort = sort
        self._interval = interval
        self._left = iterations
        self._backwards = False
        self._help = False
        self._first = 0
        self._rates = Rates()
        self._view = View([], [])
        #: Whether there are samples yet, and the error of the last call of the source.
        self._sampled = False
        self._error = ""

    def run(self) -> None:
        """Run until q is pressed, or all iterations are done."""
        due = time.monotonic()
        while True:
            happened = self._terminal.wait(seconds_until(due))
            if "q" in happened:
                return
            for one in happened:
                self._react(one)
            if self._sampler.waiting is None and seconds_until(due) <= 0:
                if self._left is not None and self._sampled:
                    if self._left <= 0:
                        return
                    self._left -= 1
                self._sampler.start()
            first = not self._sampled
            if self._take_samples():
                due = time.monotonic() + (min(_FIRST_RATES, self._interval) if first else self._interval)
            elif self._sampler.waiting is not None:
                silent = self._sampler.waiting >= _SILENT
                due = time.monotonic() + (_POLL * 10 if silent else _POLL)
                if not happened and not silent:
                    continue
            self._draw()

    def _take_samples(self) -> bool:
        """Take the result of the source, if it has one. The first call raises its error; later ones show it."""
        try:
            samples = self._sampler.result()
        except RconError as error:
            if not self._sampled:
                raise
            self._error = " ".join(str(error).split())
            return True
        if samples is None:
            return False
        self._view, self._error, self._sampled = self._rates.view(samples), "", True
        return True

    def _react(self, key: str) -> None:
        letters = {sort.letter: name for name, sort in SORTS.items()}
        page = max(1, self._terminal.size[1] - 5)
        steps = {"up": -1, "down": 1, "page up": -page, "page down": page}
        if key == "suspend":
            self._terminal.suspend()
        elif key == "resize":
            pass  # the next drawing has the new size
        elif self._help or key == "?":
            self._help = not self._help
        elif key == "R":
            self._backwards = not self._backwards
        elif key in letters:
            self._sort, self._first = letters[key], 0
        elif key in steps:
            self._first = max(0, min(self._first + steps[key], len(self._view.rows) - page))

    def _draw(self) -> None:
        if self._help:
            self._terminal.draw(help_screen())
            return
        width, height = self._terminal.size
        rows = ordered(self._view.rows, self._sort, self._backwards)
        self._first = max(0, min(self._first, len(rows) - 1))
        title, waiting = summary(self._view, self._sort, self._interval), self._sampler.waiting or 0
        if self._error or (waiting >= _SILENT and self._sampled):
            title = f"old data: {self._error or f'no answer for {waiting:.0f} s'}"
        elif not self._sampled:
            title = "waiting for the first answer"
        self._terminal.draw(screen(rows, self._sort, title, self._first, width, height))
