"""Run one command in a group of its own. The limits hold before its first instruction.

When the command ends, all processes that it started are killed. The group is ``work/<name>`` of an instance that
belongs to the calling process; the command runs in its leaf ``main``. This module imports little, because ``rcon run``
starts with it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import posix
import resource
import signal
import struct
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from rcon_plugins.command.job_control import Caller
from rcon_plugins.command.oom import OomGuard
from rcon_plugins.ending import Bounds, Cause, End, LimitsInForce, Snapshot, explain_end, format_memory
from rcon_plugins.errors import ControllerUnavailable, KernelError, RconError, fork_refused
from rcon_plugins.kernel import descriptors, proc
from rcon_plugins.kernel.cgroup import Hierarchy, Reading, Resources, read_limits
from rcon_plugins.kernel.cgroup.branch import check_name
from rcon_plugins.tree.instance import Instance
from rcon_plugins.tree.owner import INSTANCE_NAME

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from rcon_plugins.kernel.cgroup import Cgroup
    from rcon_plugins.outcome import Outcome
    from rcon_plugins.tree.shared import SharedGroup

#: The leaf of the group that the command starts in.
LEAF = "main"
#: Exit statuses, as in env(1), nohup(1) and chroot(1); for a signal, as in a shell.
NOT_EXECUTABLE, NOT_FOUND, SIGNALLED = 126, 127, 128
_LONGEST_NAME = 40
#: How a new process says that it executes the command now, and which resident set it had until then, bytes.
_EXECUTES = struct.Struct("!cQ")
_MARK = b"E"
#: What execve(2) itself may add to the resident set after that, bytes.
_RSS_OF_EXECVE = 1 << 20
#: How long to try to kill what a command left, seconds. After that the next start does it.
_KILL_SECONDS = 5.0
#: How long to wait before the next look at a group in its grace, seconds.
_GRACE_PAUSE = 0.01


class Order(NamedTuple):
    """A command to run, and its group.

    ``program`` is the file, ``arguments`` is argv, ``variables`` is the environment. ``group`` is the name of the
    group. ``resources`` are the limits of ``work/<group>``, ``each`` those of the single command. With ``shared``, the
    name of a group of several commands, ``resources`` are the limits of that one, and ``work/<group>`` has none. The
    new process calls ``become`` inside its cgroup, to drop privileges. ``delegate_to`` is the (uid, gid) that may make
    cgroups below the group. ``timeout`` is in seconds of wall time. ``grace`` are the seconds between SIGTERM and
    SIGKILL after that; None for SIGKILL at once. ``keep`` are descriptors that the caller needs afterwards. ``watch``
    watches the group and its leaf in threads, from before the command's first instruction until its end.
    ``memory_note`` is added to the message about the memory limit. ``oom_group``: an OOM kill of one of its processes
    ends the whole command. ``cpu_time`` is the RLIMIT_CPU that ``become`` sets, in seconds.
    """

    program: str
    arguments: tuple[str, ...]
    variables: Mapping[bytes, bytes]
    group: str
    resources: Resources
    each: Resources = Resources()
    become: Callable[[], object] | None = None
    delegate_to: tuple[int, int] | None = None
    timeout: float | None = None
    grace: float | None = None
    keep: Sequence[int] = ()
    watch: Callable[[Cgroup, Cgroup], AbstractContextManager[None]] | None = None
    memory_note: str = ""
    oom_group: bool = True
    cpu_time: float | None = None
    shared: str | None = None


class NotRun(RconError):
    """Raised when the command could not be executed. ``status`` is the exit status that a shell would return.

    ``interpreter`` is the interpreter of a script, if that could not be executed.
    """

    def __init__(self, error: OSError, interpreter: str | None = None) -> None:
        super().__init__(os.strerror(error.errno or errno.EIO))
        self.interpreter = interpreter
        self.errno = error.errno or errno.EIO
        self.status = NOT_FOUND if self.errno == errno.ENOENT else NOT_EXECUTABLE

    def __reduce__(self) -> tuple[Any, ...]:
        # The new process, which could not execute the command, sends it to the caller by pickle.
        return type(self), (OSError(self.errno, ""), self.interpreter)


class Ended(NamedTuple):
    """How the command ended. ``status`` is the exit status for a shell: 128+n for signal n.

    ``rss_peak`` is as in `rcon_plugins.work.Usage`.
    """

    end: End
    status: int
    wall_seconds: float
    reading: Reading
    group: str
    rss_peak: int | None = None

    def outcome(self, policy: str = "") -> Outcome:
        """Return the `Outcome`, in the same form as for a request or task."""
        from rcon_plugins.outcome import Outcome
        from rcon_plugins.work import Usage

        usage = Usage(
            wall_seconds=self.wall_seconds,
            cpu_seconds=self.reading.cpu_seconds,
            memory_peak=self.reading.memory_peak,
            rss_peak=self.rss_peak,
            swap_peak=self.reading.swap_peak,
            io_read_bytes=self.reading.io_read_bytes,
            io_write_bytes=self.reading.io_write_bytes,
            oom_kills=self.reading.oom_kills,
        )
        ending, limit, number, detail, needed_kill = self.end
        return Outcome(
            ending=ending,
            usage=usage,
            policy=policy,
            limit=limit,
            signal=number,
            detail=detail,
            needed_kill=needed_kill,
        )


def run(order: Order, hierarchy: Hierarchy, base: str | None = None) -> Ended:
    """Run the command. Return when it has ended and its group is removed.

    Terminal, job control and signals reach the command as if it had been executed in place of the calling process.
    When this returns, the calling process has closed its standard input and output, and all inherited descriptors
    except ``order.keep``. If the calling process is killed, the kernel kills the command. Other processes in the group
    stay within its limits until ``rcon gc`` ends them.

    Raises `NotRun`, `NotShared`, `KernelError`, `DelegationError`, and what ``become`` raises. The command has not run
    then, and its group is removed.
    """
    caller = Caller()
    shared: SharedGroup | None = None
    try:
        if order.shared is None:
            instance = Instance.create(hierarchy, base)
        else:
            from rcon_plugins.tree.shared import SharedGroup  # most commands share none

            shared = SharedGroup.join(hierarchy, base, order.shared, order.resources)
            instance = shared.instance
    except BaseException:
        caller.go_back()
        raise
    close = instance.close if shared is None else shared.leave
    try:
        ended = _Run(order, instance, caller, None if shared is None else shared.cgroup).run()
    except BaseException:
        close()
        caller.go_back()
        raise
    close()
    caller.forget_signals()
    caller.go_back()
    return ended


class _Run:
    def __init__(self, order: Order, instance: Instance, caller: Caller, shared: Cgroup | None) -> None:
        self._order = order
        self._instance = instance
        self._caller = caller
        self._group = instance.policy_cgroup(order.group)
        #: The group with the limits, if this command shares it with others, and its usage before this command.
        self._shared = shared
        self._before = Reading() if shared is None else shared.read()
        self._leaf = instance.executor_cgroup(order.group, LEAF)
        self._began = time.monotonic()
        self._oom = OomGuard(self._group, self._leaf)
        #: Whether SIGKILL ended processes after the grace; None if there was no grace.
        self._needed_kill: bool | None = None
        #: The largest resident set of the new process before it executed the command, bytes; None if unknown.
        self._rss_before: int | None = None

    def run(self) -> Ended:
        self._prepare()
        try:
            with contextlib.ExitStack() as watching:
                self._start(watching)
                return self._follow()
        finally:
            self._oom.close()

    def _prepare(self) -> None:
        limits = self._order.resources if self._shared is None else Resources()
        for refusal in self._instance.hierarchy.refusals(limits):
            # The limits were checked for the machine, but the base cgroup may have fewer controllers.
            raise ControllerUnavailable(refusal.reason, path=self._group.path, hint=refusal.remedy)
        if self._instance.needs_adoption:
            self._instance.adopt()

    def _follow(self) -> Ended:
        self._caller.close_descriptors(self._order.keep)
        deadline = None if self._order.timeout is None else self._began + self._order.timeout
        status = self._caller.wait(deadline)
        late = status is None
        if deadline is not None and late and self._order.grace is not None:
            status = self._wait_in_grace(deadline + self._order.grace)
        until = time.monotonic() + _KILL_SECONDS
        while status is None:
            try:
                self._group.kill_once()
            except KernelError:
                if time.monotonic() > until:
                    raise
            status = self._caller.wait(time.monotonic() + 0.05)
        wall = time.monotonic() - self._began
        # Kill the processes that the command left behind.
        self._group.kill(_KILL_SECONDS, insist=True)
        self._oom.stop()
        self._caller.reap_last_orphans()
        try:
            return self._explain(status, late, wall)
        except KernelError as error:
            return self._explain_without_usage(status, late, wall, error)

    def _wait_in_grace(self, until: float) -> int | None:
        """Tell all processes of the group to end, and wait until they have, but no longer than ``until``.

        Return the wait status of the command; None if it still runs. Notes whether SIGKILL is needed.
        """
        with contextlib.suppress(KernelError):  # SIGKILL ends whoever could not be told
            self._group.terminate(until - time.monotonic())
        status = self._caller.wait(until)
        while self._has_processes() and time.monotonic() < until:
            self._caller.reap_orphans()
            time.sleep(_GRACE_PAUSE)
        self._needed_kill = status is None or self._has_processes()
        return status

    def _has_processes(self) -> bool:
        try:
            return self._group.has_processes()
        except KernelError:
            return True  # unknown: they are killed all the same

    def _make_group(self) -> None:
        order = self._order
        kills_all = order.oom_group and "memory" in self._group.controllers
        self._group.create()
        limits = order.resources if self._shared is None else Resources()
        self._group.configure(limits.replaced(oom_group=True) if kills_all else limits)
        self._leaf.create()
        self._oom.start(kills_all)
        if order.each.written():
            self._leaf.configure(order.each)
        if order.delegate_to is not None:
            for cgroup in (self._group, self._leaf):
                cgroup.delegate(*order.delegate_to, shut=True)

    def _start(self, watching: contextlib.ExitStack) -> None:
        """Start the command, or raise the error for which it could not be executed."""
        pipes = [*descriptors.pipe()]
        caller = os.getpid()
        try:
            pipes += descriptors.pipe()
            pid = posix.fork()
        except OSError as error:
            for descriptor in pipes:
                os.close(descriptor)
            raise error if isinstance(error, KernelError) else fork_refused(error) from None
        ours, theirs, waits, go = pipes
        if pid == 0:
            os.close(ours)
            os.close(go)
            self._become_command(caller, theirs, waits)
        os.close(theirs)
        os.close(waits)
        problem = b""
        try:
            # The new process prepares itself at the same time.
            self._make_group()
            if self._order.watch is not None:
                # `watch` starts threads, so the fork comes first. The command has not started yet.
                watching.enter_context(self._order.watch(self._group, self._leaf))
            self._caller.leave_group_to(pid)
            self._began = time.monotonic()
            with contextlib.suppress(BrokenPipeError):
                os.write(go, b"x")
                self._adopt_orphans()  # while the new process enters the group
                os.write(go, b"x")
        except BaseException:
            os.close(go)
            os.close(ours)
            os.kill(pid, signal.SIGKILL)  # the command has not started
            posix.waitpid(pid, 0)
            raise
        os.close(go)
        while piece := os.read(ours, 65536):
            problem += piece
        os.close(ours)
        if problem.startswith(_MARK):
            self._rss_before = _EXECUTES.unpack_from(problem)[1]
            problem = problem[_EXECUTES.size :]
        if problem:
            posix.waitpid(pid, 0)
            _raise(problem)

    def _adopt_orphans(self) -> None:
        """Reap the command's orphans here, so that they do not stay charged to the group until process 1 does it.

        This process may have other children, too. The v2 hierarchy tells the group of one that has ended; v1 does not.
        There, process 1 reaps the orphans of a command that is watched.
        """
        if self._instance.hierarchy.unified is not None:
            self._caller.adopt_orphans(self._is_of_group)
        elif self._order.watch is None:
            self._caller.adopt_orphans(lambda _: True)

    def _is_of_group(self, pid: int) -> bool:
        group = f"/{self._instance.path.rpartition('/')[2]}/work/"
        return group in (proc.unified_cgroup(pid) or "")

    def _become_command(self, caller: int, pipe: int, waits: int) -> NoReturn:
        order = self._order
        try:
            # Load it while the caller makes the group.
            from rcon_plugins.kernel import syscalls  # noqa: F401

            if order.become is not None:
                # Load it before the change of user: the new user may not be able to read the module.
                import pickle

            if not os.read(waits, 1):
                os._exit(1)  # the caller failed, and raises the error
            self._leaf.enter_process()
            if not os.read(waits, 1):  # the caller adopts its orphans from the first one on
                os._exit(1)
            if order.become is not None:
                order.become()
            _die_with(caller)
            self._caller.become_child()
            with contextlib.suppress(OSError):  # its largest resident set is unknown then
                rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
                os.write(pipe, _EXECUTES.pack(_MARK, rss))
            try:
                os.execve(order.program, order.arguments, order.variables)  # noqa: S606  no shell, on purpose
            except OSError as error:
                raise NotRun(error, _interpreter(order.program)) from None
        except BaseException as error:  # noqa: BLE001 - this process ends: the caller raises it, whatever it is
            import pickle

            with contextlib.suppress(OSError):
                os.write(pipe, pickle.dumps(error))
        finally:
            os._exit(1)

    def _explain(self, status: int, late: bool, wall: float) -> Ended:
        group = self._group.read()
        leaf = self._leaf.read() if self._leaf.exists() else Reading()
        whole = group if self._shared is None else self._shared.read()
        ordered = self._order.resources.memory_max
        above = isinstance(ordered, int) and (whole.memory_peak or 0) > ordered
        # On v2 the kernel itself ends all at once.
        ends_all = self._order.oom_group and self._group.kills_one_by_one
        failed = status or above or (ends_all and self._oom.notices)
        memory, pids = self._bounds() if failed else (Bounds(), Bounds())
        group = group._replace(
            oom_kills=self._oom_kills(group.oom_kills, status, _reached(whole, memory.group))
        )
        order = self._order
        limits = LimitsInForce(
            memory, pids, _seconds(order.timeout), "timeout", _seconds(order.grace), ends_all
        )
        if os.WIFSIGNALED(status):
            limits = limits._replace(cpu_time=self._cpu_time())
        # The memory peak and the refused forks of the group that has the limits explain the end, and all CPU time: a
        # limit of that counts from before the command entered its group.
        counted = group._replace(
            memory_peak=whole.memory_peak,
            pids_limit_hits=whole.pids_limit_hits,
            cpu_seconds=max(group.cpu_seconds or 0, self._caller.cpu_seconds),
        )
        end = self._end_of(Snapshot(leaf, counted), status, limits, late)
        if group.memory_peak is not None and memory.group is not None:
            # The kernel charges pages in batches before it refuses them, so the peak may be above the limit.
            group = group._replace(memory_peak=min(group.memory_peak, memory.group))
        code = os.waitstatus_to_exitcode(status)
        if end.ending == "timeout" or (end.ending == "memory" and ends_all):
            # The exit status of a process that ended in its grace, or after an OOM kill, does not count.
            code = -signal.SIGKILL
        return Ended(end, _exit_status(code), wall, group, self._group.path, self._rss_peak())

    def _rss_peak(self) -> int | None:
        """Return the largest resident set of a process of the command; None if it is unknown.

        The kernel keeps the peak of a process through execve(2), so that of a small command is hidden by that of the
        Python which executed it.
        """
        before, peak = self._rss_before, self._caller.rss_peak
        return None if before is None or peak <= before + _RSS_OF_EXECVE else peak

    def _cpu_time(self) -> float | None:
        """Return the RLIMIT_CPU of the command in seconds: that of its policy, or the one that it inherited."""
        soft = resource.getrlimit(resource.RLIMIT_CPU)[0]
        return self._order.cpu_time or (None if soft == resource.RLIM_INFINITY else float(soft))

    def _explain_without_usage(self, status: int, late: bool, wall: float, error: KernelError) -> Ended:
        """Explain the end of a command whose counters cannot be read. It has run, so its exit status counts."""
        timeout, grace = _seconds(self._order.timeout), _seconds(self._order.grace)
        limits = LimitsInForce(timeout=timeout, timeout_key="timeout", grace=grace)
        end = self._end_of(Snapshot(), status, limits, late)
        unknown = f"its usage could not be read: {error}"
        end = end._replace(detail=f"{end.detail}; {unknown}" if end.detail else unknown)
        code = -signal.SIGKILL if late else os.waitstatus_to_exitcode(status)
        return Ended(end, _exit_status(code), wall, Reading(), self._group.path, self._rss_peak())

    def _end_of(self, after: Snapshot, status: int, limits: LimitsInForce, late: bool) -> End:
        cause: Cause | None = "timeout" if late else None
        before = Snapshot(group=Reading(pids_limit_hits=self._before.pids_limit_hits))
        return explain_end(
            before, after, status, limits, cause=cause, is_command=True, needed_kill=self._needed_kill
        )

    def _oom_kills(self, counted: int | None, status: int, reached: bool) -> int | None:
        """Return the number of OOM kills in the group and all below it; None if unknown.

        ``counted`` is the group's own counter. On v1 it leaves out the cgroups below, so this adds those that are left.
        For removed ones, only the kernel's notice is left: ``reached`` says that the group reached its limit.
        """
        if not any(mount.version == 1 and "memory" in mount.controllers for mount in self._group.mounts):
            return counted
        from rcon_plugins.kernel.cgroup.statistics import read_usage

        kills = read_usage(self._group).oom_kills
        if kills is None or not self._leaf.exists():
            return kills or None
        if kills or not self._oom.notices:
            return kills
        killed = os.waitstatus_to_exitcode(status) in (-signal.SIGKILL, SIGNALLED + signal.SIGKILL)
        return 1 if killed and reached else None

    def _bounds(self) -> tuple[Bounds, Bounds]:
        """Return the current memory and pids limits. Plugins, ``--on-event`` or ``rcon set`` may have changed them."""
        order = self._order
        each = read_limits(self._leaf) if self._leaf.exists() else order.each
        limited = self._shared or self._group
        group = read_limits(limited) if limited.exists() else order.resources
        one, all_together = _number(each.memory_max), _number(group.memory_max)
        whose = "" if order.shared is None else f" of the group {order.shared}"
        return (
            Bounds(one, all_together, _size(one), _size(all_together) + whose, order.memory_note),
            Bounds(_number(each.pids_max), _number(group.pids_max)),
        )


def _exit_status(code: int) -> int:
    """Return the exit status for a shell, of a status or of minus the number of a signal."""
    return code if code >= 0 else SIGNALLED - code


def _number(limit: object) -> int | None:
    return limit if isinstance(limit, int) else None


def _reached(group: Reading, bound: int | None) -> bool:
    return bound is not None and (group.memory_peak or 0) >= 0.95 * bound


def _interpreter(program: str) -> str | None:
    """Return the interpreter of a script if this user may not execute it; None also if the user cannot find out."""
    try:
        from rcon_plugins.kernel.capability.exec_rule import refused_interpreter
    except (ImportError, OSError):  # the user of the command may not be able to read the module
        return None
    return refused_interpreter(program)


def _die_with(caller: int) -> None:
    """Have the kernel kill this process when the caller ends. Call it after the last change of ids, which clears it."""
    from rcon_plugins.kernel.syscalls import PR_SET_PDEATHSIG, prctl

    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != caller:
        raise KernelError("rcon ended", errno=errno.ESRCH, path="getppid")


def _raise(problem: bytes) -> NoReturn:
    import pickle

    error = pickle.loads(problem)  # noqa: S301 - from our own fork, before it executed anything
    raise error


def group_name(command: str, pid: int | None = None) -> str:
    """Return the default name of a group: ``<basename>-<pid>``, by default with the caller's pid."""
    plain = "".join(
        c if c.isascii() and (c.isalnum() or c in "_-") else "_" for c in command.rpartition("/")[2]
    )
    name = f"{plain[:_LONGEST_NAME].lstrip('-') or 'command'}-{pid or os.getpid()}"
    return f"run-{name}" if INSTANCE_NAME.fullmatch(name) else name


def check_group_name(name: str) -> str:
    """Return ``name`` if it may name a group. Raise ValueError with the reason if not."""
    check_name(name)
    if name.startswith("-"):
        raise ValueError(f"a group name cannot begin with a dash: {name!r}")
    if INSTANCE_NAME.fullmatch(name):
        raise ValueError(f"names of this form are reserved for instances of rcon: {name!r}")
    return name


def _size(count: int | None) -> str:
    return "" if count is None else format_memory(count)


def _seconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds:g} s"
