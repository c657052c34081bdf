"""``rcon watch``: a line for each event of a group, until that is gone."""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Callable, Collection

import click

from rcon_plugins.cli.columns import count, percent, printable, seconds, size
from rcon_plugins.cli.exit import interrupted, say
from rcon_plugins.errors import ControllerUnavailable, RconError, SettingsError
from rcon_plugins.groups.events import Event, Pressure, watch
from rcon_plugins.groups.find import Group
from rcon_plugins.kernel.events import KINDS
from rcon_plugins.settings.units import Cpus, Duration, Size

_PRESSURE = re.compile(r"(?P<resource>cpu|memory|io)(?::(?P<stall>[^/]+)/(?P<window>.+))?")


def watch_group(
    group: Group,
    kinds: Collection[str],
    thresholds: Collection[str],
    pressure: Collection[str],
    as_json: bool,
) -> int:
    """Print the events. Returns when the group is gone. Raises click.UsageError, KernelError."""
    wanted = _kinds(kinds)
    sizes, triggers = _sizes(thresholds), [_trigger(text) for text in pressure]
    try:
        events = watch(group.label, kinds=wanted, thresholds=sizes, pressure=triggers)
    except (
        ControllerUnavailable,
        ValueError,
    ) as error:  # what was asked for by name, and cannot be told here
        raise click.UsageError(str(error)) from None
    try:
        with events:
            for event in events:
                print(event.to_json().decode() if as_json else _line(event), flush=True)
    except KeyboardInterrupt:
        return interrupted()
    except BrokenPipeError:
        # Whoever read it has enough; nothing is left to be flushed at exit either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    say("rcon", f"{printable(group.label)} is gone")
    return 0


def _kinds(names: Collection[str]) -> list[str] | None:
    wanted = [name.strip().replace("-", "_") for text in names for name in text.split(",")]
    for name in wanted:
        if name not in KINDS:
            raise click.UsageError(f"--kind: there is no event {name!r} (one of: {', '.join(KINDS)})")
    return wanted or None


def _sizes(texts: Collection[str]) -> list[int]:
    try:
        return [int(Size.parse(text)) for text in texts]
    except SettingsError as error:
        raise click.UsageError(f"--threshold: {error}") from None


def _trigger(text: str) -> Pressure:
    found = _PRESSURE.fullmatch(text)
    if not found:
        raise click.UsageError(f"--pressure: {text!r} is no trigger (memory, or memory:200ms/2s; or cpu, io)")
    try:
        if found["stall"] is None:
            made = Pressure(found["resource"])  # type: ignore[arg-type]  # of the three, says the pattern
        else:
            stall, window = Duration.parse(found["stall"]), Duration.parse(found["window"])
            made = Pressure(found["resource"], float(stall), float(window))  # type: ignore[arg-type]
        made.check()
    except (RconError, ValueError) as error:
        raise click.UsageError(f"--pressure: {error}") from None
    return made


def _line(event: Event) -> str:
    moment = time.strftime("%H:%M:%S", time.localtime(event.time))
    words = printable(_words(event))
    return f"{moment}  {event.kind:<13}  {words}".rstrip()


def _words(event: Event) -> str:
    """What there is to say of it beyond its kind."""
    if event.kind == "pressure":
        told = f"{event.share} of it waited for {event.resource}"
        return told if event.usage is None else f"{told}: {percent(event.usage)} % of the last 10 s"
    if event.kind == "cpu_throttled":
        quota = "" if event.bound is None else f" of {Cpus(event.bound)}"
        waited = "" if event.usage is None else f", {seconds(event.usage)} s of waiting"
        return f"quota{quota} used up{waited}{_times(event)}"
    if event.kind == "pids_limit":
        return f"a fork failed: {_of(event, count)}{_times(event)}"
    if event.kind == "empty":
        return "the last process has ended"
    grown = "" if event.next_bound is None else f", grows to {size(event.next_bound)}"
    return f"{_of(event, size)}{grown}{_times(event)}"


def _of(event: Event, as_text: Callable[[int], str]) -> str:
    used = None if event.usage is None else as_text(int(event.usage))
    bound = None if event.bound is None else as_text(int(event.bound))
    if used is None or bound is None:
        return used or bound or "no limit"
    return f"{used} of {bound}"


def _times(event: Event) -> str:
    times = f" (x{event.count})" if event.count > 1 else ""
    return times if event.total in (None, event.count) else f"{times} ({event.total} in all)"
