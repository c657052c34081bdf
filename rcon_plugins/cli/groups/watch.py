"""``rcon watch``: print a line for each event of a group, until the group is gone."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Collection

from rcon_plugins.cli.columns import count, percent, printable, seconds, size
from rcon_plugins.cli.exit import BadUsage, discard_output, interrupted, say
from rcon_plugins.errors import ControllerUnavailable, RconError, SettingsError
from rcon_plugins.groups.events import Event, Pressure, watch
from rcon_plugins.groups.find import Group
from rcon_plugins.kernel.events import KINDS
from rcon_plugins.settings.units import format_cpus, parse_duration, parse_size

_PRESSURE = re.compile(r"(?P<resource>cpu|memory|io)(?::(?P<stall>[^/]+)/(?P<window>.+))?")


def watch_group(
    group: Group,
    kinds: Collection[str],
    thresholds: Collection[str],
    pressure: Collection[str],
    as_json: bool,
) -> int:
    """Print the events, and return when the group is gone. Raises BadUsage, KernelError."""
    wanted = _kinds(kinds)
    sizes, triggers = _sizes(thresholds), [_trigger(text) for text in pressure]
    try:
        events = watch(group.label, kinds=wanted, thresholds=sizes, pressure=triggers)
    except (ControllerUnavailable, ValueError) as error:  # an event that this machine cannot report
        raise BadUsage(str(error)) from None
    try:
        with events:
            for event in events:
                print(event.to_json().decode() if as_json else _line(event), flush=True)
    except KeyboardInterrupt:
        return interrupted()
    except BrokenPipeError:
        discard_output()  # the reader has closed the pipe
        return 0
    say("rcon", f"group {printable(group.label)} is gone")
    return 0


def _kinds(names: Collection[str]) -> list[str] | None:
    wanted = [name.strip().replace("-", "_") for text in names for name in text.split(",")]
    for name in wanted:
        if name not in KINDS:
            raise BadUsage(f"--kind: unknown event {name!r} (choose from {', '.join(KINDS)})")
    return wanted or None


def _sizes(texts: Collection[str]) -> list[int]:
    try:
        return [parse_size(text) for text in texts]
    except SettingsError as error:
        raise BadUsage(f"--threshold: {error}") from None


def _trigger(text: str) -> Pressure:
    found = _PRESSURE.fullmatch(text)
    if not found:
        raise BadUsage(f"--pressure: {text!r} is not RESOURCE[:STALL/WINDOW] (for example memory:200ms/2s)")
    try:
        if found["stall"] is None:
            made = Pressure(found["resource"])  # type: ignore[arg-type]  # one of the three, by the pattern
        else:
            stall, window = parse_duration(found["stall"]), parse_duration(found["window"])
            made = Pressure(found["resource"], stall, window)  # type: ignore[arg-type]
        made.check()
    except (RconError, ValueError) as error:
        raise BadUsage(f"--pressure: {error}") from None
    return made


def _line(event: Event) -> str:
    moment = time.strftime("%H:%M:%S", time.localtime(event.time))
    words = printable(_words(event))
    return f"{moment}  {event.kind:<13}  {words}".rstrip()


def _words(event: Event) -> str:
    """Return the line of an event after its kind."""
    if event.kind == "pressure":
        stalled = f"{event.share} of it waited for {event.resource}"
        return stalled if event.usage is None else f"{stalled}: {percent(event.usage)} of the last 10 s"
    if event.kind == "cpu_throttled":
        quota = "" if event.bound is None else f" of {format_cpus(event.bound)}"
        waited = "" if event.usage is None else f", waited {seconds(event.usage)} s"
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
    return times if event.total in (None, event.count) else f"{times} ({event.total} in total)"
