"""Watch the group of ``rcon run``: expand its memory, and report its events to plugins and to ``--on-event``."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from rcon_plugins.cli.exit import say
from rcon_plugins.confinement.expansion import Expansion, expand
from rcon_plugins.confinement.isolation import resources_of
from rcon_plugins.confinement.monitor import MonitoredGroup
from rcon_plugins.errors import KernelError, RconError, SettingsError
from rcon_plugins.groups.events import Event
from rcon_plugins.hookspecs import hookimpl
from rcon_plugins.kernel import descriptors, threads
from rcon_plugins.kernel.cgroup import change_limits
from rcon_plugins.kernel.events import Watch, watcher_of_process
from rcon_plugins.settings.policy import Policy

if TYPE_CHECKING:
    import pluggy

    from rcon_plugins.kernel.cgroup import Cgroup
    from rcon_plugins.kernel.events import Event as KernelEvent

#: At most so many events wait for --on-event; further ones are dropped.
MAX_WAITING = 64
#: The time limit of --on-event for one event, in seconds, and the longest output, in bytes.
SECONDS = 10.0
MAX_OUTPUT = 65536
#: How long to wait for the last runs of --on-event when the command has ended, in seconds.
LAST_SECONDS = 2.0
#: How long to wait for the watcher's thread to pass on the last events, in seconds.
FLUSH_SECONDS = 0.2


@contextlib.contextmanager
def watched(
    group: Cgroup,
    leaf: Cgroup,
    *,
    policy: Policy,
    manager: pluggy.PluginManager,
    command: str | None,
    to_plugins: bool = False,
) -> Iterator[None]:
    """Watch a group while the context lasts: expand its memory if the policy says so, and run ``command`` for events.

    With ``to_plugins``, the plugins of ``manager`` get the events of the group and of its ``leaf`` in `rcon_event`, and
    the limits that they return are applied, as in a server. Raises KernelError where the group cannot be watched.
    """
    with contextlib.ExitStack() as stack:
        runner = None
        if command is not None:
            runner = EventCommand(command, lambda output: _change(group, manager.hook, output, expansion))
            stack.callback(runner.close)
        template = Event.of_group(group, policy=policy.name if to_plugins else "")
        expansion: Expansion | None = None
        if to_plugins:
            if runner is not None:
                manager.register(_ReportExpansion(runner))
            expansion = _watch_for_plugins(group, leaf, policy, manager.hook, stack)
        elif policy.memory is not None and policy.memory.expands:
            report = runner.submit if runner is not None else None
            expansion = expand(group, policy.memory, about=template, on_event=report)
            stack.callback(expansion.close)
        if runner is not None:
            # The expansion reports the memory events; the end of rcon itself is the event "empty".
            ignored = {"empty"} | ({"memory_high", "memory_limit"} if expansion is not None else set())
            event_command = runner

            def pass_on(event: KernelEvent) -> None:
                if event.kind not in ignored:
                    event_command.submit(template.replaced(event))

            stack.callback(_finish, watcher_of_process().add(group, pass_on))
        yield


def _watch_for_plugins(
    group: Cgroup, leaf: Cgroup, policy: Policy, hook: pluggy.HookRelay, stack: contextlib.ExitStack
) -> Expansion | None:
    """Report the events to plugins, as the manager of a server does; return what expands the memory of the group."""
    watcher = watcher_of_process()
    template = Event.of_group(group, policy=policy.name)
    whole = MonitoredGroup(group, policy, policy, template, hook, watcher, None).begin()
    stack.callback(whole.close)
    single = Event.of_group(leaf, group=template.group, policy=policy.name, limit="each.")
    each = MonitoredGroup(leaf, policy, policy.each, single, hook, watcher, whole).begin()
    stack.callback(_flush)
    stack.callback(whole.finish)
    stack.callback(each.finish)
    return whole.expansion


class _ReportExpansion:
    """A plugin that runs ``--on-event`` each time that the memory limit expands."""

    def __init__(self, runner: EventCommand) -> None:
        self._runner = runner

    @hookimpl(tryfirst=True)
    def rcon_event(self, event: Event) -> None:
        """Run it; return no limits, so that other plugins may."""
        if event.next_bound is not None:
            self._runner.submit(event)


def _finish(watched: Watch) -> None:
    """Report all events until now: a command may end before its events are read."""
    watched.finish()
    _flush()


def _flush() -> None:
    flushed = threading.Event()
    watcher_of_process().submit(flushed.set)
    flushed.wait(FLUSH_SECONDS)


def _change(group: Cgroup, hook: pluggy.HookRelay, output: bytes, expansion: Expansion | None) -> None:
    """Apply the limits that the command has printed, all or none. Raises `RconError`, ValueError."""
    found = json.loads(output)
    if not isinstance(found, dict):
        raise SettingsError("its output is not a JSON object of limits", hint='{"memory": "1G"}')
    policy = Policy.make("on-event", **found)
    if policy.limits_set():
        # The limits first, that of swap too; then the expansion, which stays below them.
        change_limits(group, resources_of(hook, policy, policy), gather=True)
    if expansion is not None and policy.memory is not None:
        expansion.take(policy.memory)


class EventCommand:
    """Runs a command of the shell for each event, one after the other, in a thread of its own."""

    def __init__(self, command: str, apply: Callable[[bytes], object]) -> None:
        self._command = command
        self._apply = apply
        self._waiting: queue.Queue[Event | None] = queue.Queue(MAX_WAITING)
        self._dropped = 0
        self._running: int | None = None
        self._thread = threading.Thread(target=self._run, name="rcon-on-event", daemon=True)
        threads.start(self._thread)

    def submit(self, event: Event) -> None:
        """Queue a run for this event; drop it where too many wait."""
        try:
            self._waiting.put_nowait(event)
        except queue.Full:
            self._dropped += 1

    def close(self) -> None:
        """Wait up to `LAST_SECONDS` for the runs that are queued, then kill the one that runs."""
        with contextlib.suppress(queue.Full):
            self._waiting.put(None, timeout=LAST_SECONDS)
        self._thread.join(LAST_SECONDS)
        if self._running is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._running, signal.SIGKILL)
            self._thread.join(LAST_SECONDS)
        if self._dropped:
            say(
                "rcon",
                f"--on-event: {self._dropped} events were dropped: the command takes too long for each",
            )

    def _note(self, pid: int | None) -> None:
        self._running = pid

    def _run(self) -> None:
        while (event := self._waiting.get()) is not None:
            try:
                output = run_once(self._command, event.to_json() + b"\n", self._note)
                if output.strip():
                    self._apply(output)
            except (RconError, ValueError, OSError) as error:
                say("rcon", f"--on-event: {self._command}: {error}")


def run_once(command: str, data: bytes, started: Callable[[int | None], object]) -> bytes:
    """Run a command of the shell with ``data`` on its standard input and return its output. Raises OSError, ValueError.

    ``started`` is called with its pid, which is also its process group, and with None when it has ended.
    """
    reading, theirs_in = descriptors.pipe()
    try:
        theirs_out, writing = descriptors.pipe()
    except KernelError:
        os.close(reading)
        os.close(theirs_in)
        raise
    try:
        pid = os.posix_spawn(
            "/bin/sh",
            ["sh", "-c", command],
            os.environ,
            file_actions=[(os.POSIX_SPAWN_DUP2, theirs_out, 0), (os.POSIX_SPAWN_DUP2, theirs_in, 1)],
            setpgroup=0,
            setsigmask=(),
            setsigdef=(signal.SIGPIPE, signal.SIGXFSZ, signal.SIGINT),
        )
    except BaseException:
        os.close(reading)
        os.close(writing)
        raise
    finally:
        os.close(theirs_in)
        os.close(theirs_out)
    started(pid)
    try:
        with contextlib.suppress(BrokenPipeError):
            os.write(writing, data)  # less than a pipe holds
        os.close(writing)
        return _read(reading)
    finally:
        os.close(reading)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
        started(None)
        os.waitpid(pid, 0)


def _read(descriptor: int) -> bytes:
    deadline = time.monotonic() + SECONDS
    output = b""
    waiting = select.poll()
    waiting.register(descriptor, select.POLLIN)
    while len(output) <= MAX_OUTPUT:
        if not waiting.poll(max(0.0, deadline - time.monotonic()) * 1000):
            raise ValueError(f"it took longer than {SECONDS:g} s and was killed")
        piece = os.read(descriptor, MAX_OUTPUT)
        if not piece:
            return output
        output += piece
    raise ValueError(f"it printed more than {MAX_OUTPUT} bytes")
