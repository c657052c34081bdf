"""``rcon top``: what every group uses, again and again; on a terminal as a live table."""

from __future__ import annotations

import errno
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator

from rcon_plugins.cli.exit import interrupted
from rcon_plugins.cli.top import screen
from rcon_plugins.cli.top.request import Asked
from rcon_plugins.cli.top.rows import Rates, Row
from rcon_plugins.cli.top.table import SORTS, as_json, as_text, ordered, shown, summary
from rcon_plugins.errors import KernelError, RconError
from rcon_plugins.groups.find import find_groups, is_gone
from rcon_plugins.groups.sample import Sample

#: Gives a sample of each group, whenever it is called.
Source = Callable[[], Iterable[Sample]]

#: How soon a terminal shows rates for the first time, in seconds.
_SOON = 0.25
#: How often it is looked for an answer, and for how long one is waited for without a word, in seconds.
_LOOK, _SILENT = 0.05, 3.0


def local() -> Iterator[Sample]:
    """A sample of each group of this machine that can be read. Raises KernelError where no cgroups are mounted."""
    for group in find_groups().groups:
        try:
            sample = group.sample()
        except KernelError as error:
            if not is_gone(error) and error.errno not in (errno.EACCES, errno.EPERM):
                raise
            continue  # gone meanwhile, or closed to this user, which `rcon ls` tells
        yield sample


def show(
    source: Source,
    *,
    sort: str = "cpu",
    interval: float = 2.0,
    iterations: int | None = None,
    to_json: bool = False,
) -> int:
    """Show the samples of ``source`` every ``interval`` seconds, ``iterations`` times; the exit status."""
    if to_json or not screen.can_be_taken():
        return _print(source, sort, interval, iterations, to_json)
    try:
        with screen.Screen() as taken:
            _Live(taken, source, sort, interval, iterations).run()
    except screen.Ended as ended:
        return 128 + ended.number
    except KeyboardInterrupt:
        pass  # as good as q
    return 0


def _print(source: Source, sort: str, interval: float, iterations: int | None, to_json: bool) -> int:
    rates = Rates()
    rates.rows(source())
    due = time.monotonic()
    done = 0
    try:
        while iterations is None or done < iterations:
            due += interval
            time.sleep(screen.wait_until(due))
            rows = ordered(rates.rows(source()), sort)
            if to_json:
                print(json.dumps({"time": time.time(), "groups": [as_json(row) for row in rows]}), flush=True)
            else:
                print(f"{summary(rows, sort, interval)}\n{as_text(rows)}\n", flush=True)
            done += 1
    except KeyboardInterrupt:
        return interrupted()
    except BrokenPipeError:
        # Whoever read it has enough; nothing is left to be flushed at exit either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


class _Live:
    """The loop on a terminal."""

    def __init__(
        self, taken: screen.Screen, source: Source, sort: str, interval: float, iterations: int | None
    ) -> None:
        self._screen = taken
        self._source = source
        self._sort = sort
        self._interval = interval
        self._left = iterations
        self._backwards = False
        self._first = 0
        self._rates = Rates()
        self._rows: list[Row] = []
        self._asked = Asked(source)
        #: What is wrong with the source, once it has answered; and whether it has.
        self._fault = ""
        self._answered = False

    def run(self) -> None:
        """Until q, or so often as was asked for."""
        due = time.monotonic()
        while True:
            happened = self._screen.wait(screen.wait_until(due))
            if "q" in happened:
                return
            for one in happened:
                self._react(one)
            if self._asked.waits is None and screen.wait_until(due) <= 0:
                if self._left is not None and self._answered:
                    if self._left <= 0:
                        return
                    self._left -= 1
                self._asked.ask()
            first = not self._answered
            if self._hear():
                due = time.monotonic() + (min(_SOON, self._interval) if first else self._interval)
            elif self._asked.waits is not None:
                silent = self._asked.waits >= _SILENT
                due = time.monotonic() + (_LOOK * 10 if silent else _LOOK)
                if not happened and not silent:
                    continue
            self._draw()

    def _hear(self) -> bool:
        """Take the answer of the source, if there is one. What is wrong at first is raised, later it is shown."""
        try:
            samples = self._asked.answer()
        except RconError as error:
            if not self._answered:
                raise
            self._fault = " ".join(str(error).split())
            return True
        if samples is None:
            return False
        self._rows, self._fault, self._answered = self._rates.rows(samples), "", True
        return True

    def _react(self, key: str) -> None:
        letters = {sort.letter: name for name, sort in SORTS.items()}
        page = max(1, self._screen.size[1] - 5)
        steps = {"up": -1, "down": 1, "page up": -page, "page down": page}
        if key == "suspend":
            self._screen.suspend()
        elif key == "R":
            self._backwards = not self._backwards
        elif key in letters:
            self._sort, self._first = letters[key], 0
        elif key in steps:
            self._first = max(0, min(self._first + steps[key], len(self._rows) - page))

    def _draw(self) -> None:
        width, height = self._screen.size
        rows = ordered(self._rows, self._sort, self._backwards)
        self._first = max(0, min(self._first, len(rows) - 1))
        title, waits = summary(rows, self._sort, self._interval), self._asked.waits or 0
        if self._fault or (waits >= _SILENT and self._answered):
            title = f"as it was: {self._fault or f'no answer for {waits:.0f} s'}"
        elif not self._answered:
            title = "no answer yet"
        self._screen.draw(shown(rows, self._sort, title, self._first, width, height))
