"""An executor process, seen from inside: it enters its cgroups, drops its rights, and serves one work after another.

No code of the application runs between its fork and the moment when it is confined, but tracers and audit hooks. Then
the application's fork hooks run, and the hook ``rcon_executor_started``. What the process says after that may be said
by the application.
"""

from __future__ import annotations

import contextlib
import gc
import os
import struct
import sys
import threading
import traceback
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, NamedTuple, NoReturn

from rcon_plugins.errors import ConfinementError, RconError
from rcon_plugins.executors.channel import CONFINED, FAILED, FULL, READY, Channel, ChannelClosed, Frame
from rcon_plugins.kernel import process
from rcon_plugins.kernel.proc import other_threads
from rcon_plugins.tree.locks import entering

if TYPE_CHECKING:
    from types import FrameType

    import pluggy

    from rcon_plugins.executors.orders import SpawnOrder
    from rcon_plugins.executors.records import RecordLog
    from rcon_plugins.kernel.cgroup import Cgroup
    from rcon_plugins.kernel.fork_hooks import Postponed
    from rcon_plugins.tree.instance import Instance

#: The function that serves one unit of work in an executor process. It is called with the first frame. If it has an
#: attribute ``end_process`` that is not None, that is called when the process ends in order: see `ending_of`.
Service = Callable[[Channel, Frame], None]

#: The content of CONFINED: the pid, and whether processes begin in their cgroup v2 here.
CONFINED_RECORD = struct.Struct("!i?")
_EXIT_NOT_CONFINED = 71
EXIT_SERVICE_RAISED = 70
#: How the names of the threads of this package begin.
_OWN_THREADS = "rcon-"
#: The longest names of threads that the first READY has, bytes.
_LONGEST_NAMES = 4096


class Template(NamedTuple):
    """What all executor processes of a fork server have in common.

    ``after_fork`` are functions for libraries that need a call after a fork. ``fork_hooks`` are those that the
    application registered. ``collects``: the host's garbage collector is on. ``records`` is the host's log of records.
    """

    instance: Instance
    hook: pluggy.HookRelay
    service: Service
    after_fork: Sequence[Callable[[], object]]
    fork_hooks: Postponed
    collects: bool
    records: RecordLog | None = None


def run_executor(
    channel: Channel,
    order: SpawnOrder,
    leaf: Cgroup,
    template: Template,
    server: int,
    *,
    cloned: bool,
    clones: bool,
    fault: BaseException | None = None,
) -> NoReturn:
    """Run an executor process: drop privileges, report that, serve one unit of work after the other, end.

    ``leaf`` is its own cgroup, ``server`` the pid of the fork server. ``cloned``: the process began in its cgroup v2.
    ``clones``: processes can begin there. ``fault`` is why it cannot be confined, if that is known already.

    A process that confined code forked may return here through the service. It ends immediately and prints nothing.
    """
    me = os.getpid()
    try:
        if fault is not None:
            raise fault
        if not _enter(order, leaf, template.instance, cloned=cloned):
            reason = f"the pids limit of {order.policy.pids} processes and threads is reached"
            channel.send((FULL, reason.encode()))
            os._exit(_EXIT_NOT_CONFINED)
        process.replace_with_closed_socket(template.instance.locks)
        template.hook.rcon_drop(policy=order.policy, target="process", identity=order.identity)
        if order.identity is not None:
            process.join_new_session_keyring()
        process.die_with_parent(server)
        _check_alone()
        channel.send((CONFINED, CONFINED_RECORD.pack(me, clones)))
        _let_application_run(order, template)
    except BaseException as error:  # noqa: BLE001 - report any exception to the host, and run no work
        with contextlib.suppress(ChannelClosed):  # the host ends, and removed the cgroup just now
            reason = str(error) if isinstance(error, RconError) else f"{type(error).__name__}: {error}"
            channel.send((FAILED, reason.encode(errors="replace")[:4096]))
        os._exit(_EXIT_NOT_CONFINED)
    status = EXIT_SERVICE_RAISED
    lasting = set(threading.enumerate())
    try:
        channel.send((READY, "\0".join(other_thread_names()).encode(errors="replace")[:_LONGEST_NAMES]))
        while True:
            template.service(channel, channel.receive())
            if os.getpid() != me:
                break
            _flush()
            channel.send((READY, b""))
    except ChannelClosed:
        status = 0
        if os.getpid() == me and (end := ending_of(template.service)) is not None:
            end()
        if order.policy.leave_children and os.getpid() == me:
            _let_threads_go_on(lasting)
    except BaseException as error:  # noqa: BLE001 - this process ends: print any exception
        if os.getpid() == me:
            traceback.print_exc()
            if isinstance(error, SystemExit):
                status = exit_status(error)
    finally:
        if os.getpid() == me:
            _flush()
        os._exit(status)


def exit_status(error: SystemExit) -> int:
    """Return the status with which Python ends a process that this exception reached, 0 to 255."""
    if error.code is None:
        return 0
    return error.code & 0xFF if isinstance(error.code, int) else 1


def ending_of(service: Service) -> Callable[[], object] | None:
    """Return what a service does in an executor process that ends in order; None if it does nothing.

    The host waits for it at most ``END_SECONDS`` of `rcon_plugins.executors.process`, then kills the process.
    """
    end: Callable[[], object] | None = getattr(service, "end_process", None)
    return end


def other_thread_names() -> tuple[str, ...]:
    """Return the names of the threads of Python beside the calling one, without those of this package.

    A thread that the module `threading` does not know, from ``_thread.start_new_thread``, has the name of its function.
    """
    here = threading.current_thread()
    names = [thread.name for thread in threading.enumerate() if thread is not here]
    firsts = map(_first, sys._current_frames().values())  # noqa: SLF001 - public, by the documentation of sys
    names += [f"{_module(first)}.{first.f_code.co_qualname}" for first in firsts if not _is_known(first)]
    return tuple(name for name in names if not name.startswith(_OWN_THREADS))


def _is_known(first: FrameType) -> bool:
    """Return whether a thread is the calling one, one that `threading` knows, or of gevent's pool.

    ``first`` is the frame that it began with. gevent makes the threads of its pool again after a fork.
    """
    known = ("threading", "gevent")
    this = _first(sys._getframe())  # noqa: SLF001 - public, by the documentation of sys
    return first is this or _module(first).partition(".")[0] in known


def _first(frame: FrameType) -> FrameType:
    while frame.f_back is not None:
        frame = frame.f_back
    return frame


def _module(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__"))


def _let_application_run(order: SpawnOrder, template: Template) -> None:
    """Run the code of the application that waited until the process is confined."""
    if template.collects:
        gc.enable()
    template.fork_hooks.run()
    template.hook.rcon_executor_started(policy=order.policy)


def _let_threads_go_on(lasting: Collection[threading.Thread]) -> None:
    """Wait for the threads that the work left running, as Python does at its exit. The host may kill them earlier.

    ``lasting`` are those that were there before the first work, and do not end by themselves.
    """
    for thread in threading.enumerate():
        if not thread.daemon and thread not in lasting:
            thread.join()


def _check_alone() -> None:
    """Raise `ConfinementError` if other threads of this process still have the privileges that this thread dropped."""
    if threads := other_threads():
        raise ConfinementError(
            f"threads that started before the process was confined still have the server's privileges: "
            f"{', '.join(threads)}; a plugin must not start threads in rcon_drop"
        )


def _enter(order: SpawnOrder, leaf: Cgroup, instance: Instance, *, cloned: bool) -> bool:
    """Enter the leaf. Return False if the confinement is full.

    The kernel counts processes that move in, but does not refuse them (cgroup-v2.rst, pids). So the workers of the
    server enter one at a time, under a lock. It refuses to begin a process there.
    """
    pids = order.policy.pids
    if pids is None or (cloned and leaf.counts_unified("pids")):
        leaf.enter_process(cloned=cloned)
        return True
    group = instance.policy_cgroup(order.name)
    with entering(instance.locks, order.name):
        if (group.read().pids_current or 0) >= pids:
            return False
        leaf.enter_process(cloned=cloned)
        return (group.read().pids_current or 0) <= pids


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        # Not `contextlib.suppress`: it takes longer than all the rest here, after each work.
        try:
            if stream is not None:
                stream.flush()
        except (OSError, ValueError):
            pass
