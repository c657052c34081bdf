"""While a command runs: its memory limit grows, and plugins and another command (``--on-event``) are told of events."""

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

from rcon_plugins.cli.run.execution import say
from rcon_plugins.confinement.expansion import Expansion, expand
from rcon_plugins.confinement.isolation import asked_resources
from rcon_plugins.confinement.monitor import MonitoredGroup
from rcon_plugins.errors import RconError, SettingsError
from rcon_plugins.groups.events import Event
from rcon_plugins.hookspecs import hookimpl
from rcon_plugins.kernel.cgroup import change_limits
from rcon_plugins.kernel.events import Watch, watcher_of_process
from rcon_plugins.settings.policy import Policy

if TYPE_CHECKING:
    import pluggy

    from rcon_plugins.kernel.cgroup import Cgroup
    from rcon_plugins.kernel.events import Event as KernelEvent

#: As many events wait for the command that is told of them; more are dropped.
MOST_WAITING = 64
#: How long that command may take for each, in seconds, and how much it may answer, in bytes.
SECONDS = 10.0
LONGEST_ANSWER = 65536
#: How long the last events are waited for when the command has ended, in seconds.
LAST_SECONDS = 2.0
#: How long the thread that hears of them may take to pass the last on, in seconds.
FLUSH_SECONDS = 0.2


@contextlib.contextmanager
def attend(
    group: Cgroup,
    leaf: Cgroup,
    *,
    policy: Policy,
    manager: pluggy.PluginManager,
    command: str | None,
    told: bool = False,
) -> Iterator[None]:
    """Watch over a group: let its memory expand where the policy says so, and tell ``command`` of its events.

    With ``told``, the plugins of ``manager`` hear in `rcon_event` of the group and of its leaf, in which the single
    command is, and what they answer is applied, as where a server does the work. Raises KernelError where that cannot
    be.
    """
    with contextlib.ExitStack() as ending:
        teller = None
        if command is not None:
            teller = Teller(command, lambda answer: _change(group, manager.hook, answer, expansion))
            ending.callback(teller.close)
        about = Event.of_group(group, policy=policy.name if told else "")
        expansion: Expansion | None = None
        if told:
            if teller is not None:
                manager.register(_Growth(teller))
            expansion = _tell_plugins(group, leaf, policy, manager.hook, ending)
        elif policy.memory is not None and policy.memory.expands:
            tell = teller.tell if teller is not None else None
            expansion = expand(group, policy.memory, about=about, on_event=tell)
            ending.callback(expansion.close)
        if teller is not None:
            # That memory reached the mark is told by the expansion; that all have ended, by rcon's own end.
            quiet = {"empty"} | ({"memory_high", "memory_limit"} if expansion is not None else set())
            teller_of_rest = teller

            def pass_on(event: KernelEvent) -> None:
                if event.kind not in quiet:
                    teller_of_rest.tell(about.replaced(event))

            ending.callback(_finish, watcher_of_process().add(group, pass_on))
        yield


def _tell_plugins(
    group: Cgroup, leaf: Cgroup, policy: Policy, hook: pluggy.HookRelay, ending: contextlib.ExitStack
) -> Expansion | None:
    """As a server's manager does; what makes the limit of the group grow."""
    watcher = watcher_of_process()
    about = Event.of_group(group, policy=policy.name)
    together = MonitoredGroup(group, policy, policy, about, hook, watcher, None).begin()
    ending.callback(together.close)
    single = Event.of_group(leaf, group=about.group, policy=policy.name, limit="each.")
    each = MonitoredGroup(leaf, policy, policy.each, single, hook, watcher, together).begin()
    ending.callback(_flush)
    ending.callback(together.finish)
    ending.callback(each.finish)
    return together.expansion


class _Growth:
    """A plugin that tells ``--on-event`` each time that memory grows, and leaves the answer to others."""

    def __init__(self, teller: Teller) -> None:
        self._teller = teller

    @hookimpl(tryfirst=True)
    def rcon_event(self, event: Event) -> None:
        """Of all else ``--on-event`` hears elsewhere."""
        if event.next_bound is not None:
            self._teller.tell(event)


def _finish(watched: Watch) -> None:
    """Have what happened until now told: a command may have ended sooner than it could be."""
    watched.finish()
    _flush()


def _flush() -> None:
    flushed = threading.Event()
    watcher_of_process().submit(flushed.set)
    flushed.wait(FLUSH_SECONDS)


def _change(group: Cgroup, hook: pluggy.HookRelay, answer: bytes, expansion: Expansion | None) -> None:
    """Apply the limits that the command has printed, all or none. Raises `RconError`, ValueError."""
    found = json.loads(answer)
    if not isinstance(found, dict):
        raise SettingsError("it is no JSON object of limits", hint='{"memory": "1G"}')
    policy = Policy.make("on-event", **found)
    if policy.asks():
        # First the bounds, of swap too; what the memory grows to below them comes then.
        change_limits(group, asked_resources(hook, policy, policy), gather=True)
    if expansion is not None and policy.memory is not None:
        expansion.take(policy.memory)


class Teller:
    """Runs a command for each event, one after the other, in a thread of its own: nobody waits for it."""

    def __init__(self, command: str, apply: Callable[[bytes], object]) -> None:
        self._command = command
        self._apply = apply
        self._waiting: queue.Queue[Event | None] = queue.Queue(MOST_WAITING)
        self._dropped = 0
        self._running: int | None = None
        self._thread = threading.Thread(target=self._run, name="rcon-on-event", daemon=True)
        self._thread.start()

    def tell(self, event: Event) -> None:
        """Have the command told, soon; or not at all, where too many wait."""
        try:
            self._waiting.put_nowait(event)
        except queue.Full:
            self._dropped += 1

    def close(self) -> None:
        """Wait a moment for those that are still to be told."""
        with contextlib.suppress(queue.Full):
            self._waiting.put(None, timeout=LAST_SECONDS)
        self._thread.join(LAST_SECONDS)
        if self._running is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._running, signal.SIGKILL)
            self._thread.join(LAST_SECONDS)
        if self._dropped:
            say(f"--on-event: {self._dropped} events were not told: the command takes too long for each")

    def _note(self, pid: int | None) -> None:
        self._running = pid

    def _run(self) -> None:
        while (event := self._waiting.get()) is not None:
            try:
                answer = run_once(self._command, event.to_json() + b"\n", self._note)
                if answer.strip():
                    self._apply(answer)
            except (RconError, ValueError, OSError) as error:
                say(f"--on-event: {self._command}: {error}")


def run_once(command: str, told: bytes, begun: Callable[[int | None], object]) -> bytes:
    """Run a command of the shell with this on its standard input; what it wrote. Raises OSError, ValueError.

    ``begun`` is given its pid, which is that of its process group, and None when it has ended.
    """
    (reading, theirs_in), (theirs_out, writing) = _pipes()
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
    begun(pid)
    try:
        with contextlib.suppress(BrokenPipeError):
            os.write(writing, told)  # less than a pipe holds
        os.close(writing)
        return _read(reading)
    finally:
        os.close(reading)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
        begun(None)
        os.waitpid(pid, 0)


def _pipes() -> tuple[tuple[int, int], tuple[int, int]]:
    return os.pipe(), os.pipe()


def _read(descriptor: int) -> bytes:
    deadline = time.monotonic() + SECONDS
    answer = b""
    waiting = select.poll()
    waiting.register(descriptor, select.POLLIN)
    while len(answer) <= LONGEST_ANSWER:
        if not waiting.poll(max(0.0, deadline - time.monotonic()) * 1000):
            raise ValueError(f"it took longer than {SECONDS:g} s and was ended")
        piece = os.read(descriptor, LONGEST_ANSWER)
        if not piece:
            return answer
        answer += piece
    raise ValueError(f"it answered more than {LONGEST_ANSWER} bytes")
