"""One command in a group of its own: its limits hold before its first instruction, and all it started ends with it.

The group is ``work/<name>`` of an instance whose owner is the calling process; the command runs in its leaf ``main``.
Imports little: this is most of what ``rcon run`` takes to start.
"""

from __future__ import annotations

import contextlib
import errno
import os
import posix
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from rcon_plugins.command.job_control import Caller
from rcon_plugins.errors import ControllerUnavailable, KernelError, RconError
from rcon_plugins.kernel.cgroup import Hierarchy, Reading, Resources, read_limits
from rcon_plugins.kernel.cgroup.branch import check_name
from rcon_plugins.kernel.cgroup.v1 import count_notices
from rcon_plugins.tree.instance import Instance
from rcon_plugins.tree.survey import INSTANCE_NAME

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from rcon_plugins.kernel.cgroup import Cgroup
    from rcon_plugins.outcome import Ending, Outcome

#: The leaf of the group that the command is born in.
LEAF = "main"
#: As env(1), nohup(1) and chroot(1) have them, and a shell for a signal.
NOT_EXECUTABLE, NOT_FOUND, SIGNALLED = 126, 127, 128
#: By these somebody asks a command to end; no limit does.
_ASKED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
_LONGEST_NAME = 40


class Order(NamedTuple):
    """What to run, and in what.

    ``program`` is the file, ``arguments`` the command as it sees it, ``variables`` its environment. ``group`` is the
    name of the group. ``resources`` are the limits of ``work/<group>``, ``each`` those of the single command.
    ``become`` is called in the new process, inside of its cgroup, and makes it what it shall be for good.
    ``delegate_to``: the (uid, gid) that may make cgroups of its own in there. ``timeout`` in seconds of wall time.
    ``keep``: open files that the caller needs afterwards. ``attend`` watches over the group, and its leaf, in threads,
    from before the command's first instruction until its end. ``memory_note`` is added to what is said of the memory
    limit.
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
    keep: Sequence[int] = ()
    attend: Callable[[Cgroup, Cgroup], AbstractContextManager[None]] | None = None
    memory_note: str = ""


class NotRun(RconError):
    """Raised when the command did not run: it could not be executed. ``status`` is what a shell would say."""

    def __init__(self, error: OSError) -> None:
        super().__init__(os.strerror(error.errno or errno.EIO))
        self.errno = error.errno or errno.EIO
        self.status = NOT_FOUND if self.errno == errno.ENOENT else NOT_EXECUTABLE

    def __reduce__(self) -> tuple[Any, ...]:
        # It comes to who is told by pickle, from the process that was to be the command.
        return type(self), (OSError(self.errno, ""),)


class Ended(NamedTuple):
    """How the command ended. `outcome` tells the same as all other work does.

    ``status`` is the exit status for a shell, 128+n for a signal; ``signal`` that signal. ``detail`` is one line for
    people, empty where there is nothing to say; ``limit`` the limit that ended it, as a policy spells it.
    """

    ending: Ending
    status: int
    signal: int | None
    limit: str | None
    detail: str
    wall_seconds: float
    reading: Reading
    group: str

    def outcome(self, policy: str = "") -> Outcome:
        """The `Outcome`."""
        from rcon_plugins.outcome import Outcome
        from rcon_plugins.usage import Usage

        usage = Usage(
            wall_seconds=self.wall_seconds,
            cpu_seconds=self.reading.cpu_seconds,
            memory_peak=self.reading.memory_peak,
            io_read_bytes=self.reading.io_read_bytes,
            io_write_bytes=self.reading.io_write_bytes,
        )
        return Outcome(
            ending=self.ending,
            usage=usage,
            policy=policy,
            limit=self.limit,
            signal=self.signal,
            detail=self.detail,
        )


def run(order: Order, hierarchy: Hierarchy, base: str | None = None) -> Ended:
    """Run it, and return when it has ended and its group is gone.

    Terminal, job control and signals reach the command as if it had been executed in place of the calling process,
    whose standard input and output are closed when this returns (and all it was given but ``order.keep``). If the
    calling process is killed, the kernel kills the command; what else is in the group stays within its limits until
    `rcon_plugins.tree.garbage.collect` ends it.

    Raises `NotRun`, `KernelError`, `DelegationError`, and what ``become`` raises: nothing ran then, nothing is left.
    """
    caller = Caller()
    try:
        instance = Instance.create(hierarchy, base)
    except BaseException:
        caller.go_back()
        raise
    try:
        ended = _Run(order, instance, caller).run()
    except BaseException:
        instance.close()
        caller.go_back()
        raise
    instance.close()
    caller.forget_signals()
    caller.go_back()
    return ended


class _Run:
    def __init__(self, order: Order, instance: Instance, caller: Caller) -> None:
        self._order = order
        self._instance = instance
        self._caller = caller
        self._group = instance.policy_cgroup(order.group)
        self._leaf = instance.executor_cgroup(order.group, LEAF)
        self._began = time.monotonic()
        self._want: int | None = None

    def run(self) -> Ended:
        self._look_ahead()
        try:
            with contextlib.ExitStack() as attending:
                return self._follow(self._start(attending))
        finally:
            if self._want is not None:
                os.close(self._want)

    def _look_ahead(self) -> None:
        for refusal in self._instance.hierarchy.refusals(self._order.resources):
            # Of the machine all is known; here there may be less of it.
            raise ControllerUnavailable(refusal.reason, path=self._group.path, hint=refusal.remedy)
        if self._instance.needs_adoption:
            self._instance.adopt()

    def _follow(self, child: int) -> Ended:
        self._caller.stand_aside(child, self._order.keep)
        deadline = None if self._order.timeout is None else self._began + self._order.timeout
        status = self._caller.wait(deadline)
        late = status is None
        while status is None:
            self._group.kill_once()
            status = self._caller.wait(time.monotonic() + 0.05)
        wall = time.monotonic() - self._began
        # What it left behind ends with it.
        self._group.kill()
        return self._tell(status, late, wall)

    def _make_group(self) -> None:
        order = self._order
        self._group.create()
        self._group.configure(order.resources)
        if order.resources.memory_max is not None:
            self._want = self._group.open_oom_notice()
        self._leaf.create()
        if order.each.written():
            self._leaf.configure(order.each)
        if order.delegate_to is not None:
            for cgroup in (self._group, self._leaf):
                cgroup.delegate(*order.delegate_to, shut=True)

    def _start(self, attending: contextlib.ExitStack) -> int:
        """The pid of the command, which is being executed. Raises what kept it from that."""
        ours, theirs = os.pipe()
        waits, go = os.pipe()
        caller = os.getpid()
        pid = posix.fork()
        if pid == 0:
            os.close(ours)
            os.close(go)
            self._become_command(caller, theirs, waits)
        os.close(theirs)
        os.close(waits)
        problem = b""
        try:
            # After the fork: the new process makes itself ready meanwhile.
            self._make_group()
            if self._order.attend is not None:
                # Not before the fork, which must not meet threads; not after the command has begun.
                attending.enter_context(self._order.attend(self._group, self._leaf))
            self._began = time.monotonic()
            with contextlib.suppress(BrokenPipeError):
                os.write(go, b"x")
        except BaseException:
            os.close(go)
            os.close(ours)
            posix.waitpid(pid, 0)
            raise
        os.close(go)
        while piece := os.read(ours, 65536):
            problem += piece
        os.close(ours)
        if problem:
            posix.waitpid(pid, 0)
            _raise(problem)
        return pid

    def _become_command(self, caller: int, pipe: int, waits: int) -> NoReturn:
        order = self._order
        try:
            # Loaded while the caller makes the group.
            from rcon_plugins.kernel import syscalls  # noqa: F401

            if order.become is not None:
                # Another user may not be able to read it, and has to tell what kept the command from running.
                import pickle

            if not os.read(waits, 1):
                os._exit(1)  # the caller knows why
            self._leaf.enter_process()
            if order.become is not None:
                order.become()
            _die_with(caller)
            self._caller.become_child()
            try:
                os.execve(order.program, order.arguments, order.variables)  # noqa: S606  no shell, on purpose
            except OSError as error:
                raise NotRun(error) from None
        except BaseException as error:  # noqa: BLE001 - the end of this process: its parent is told, whatever it was
            import pickle

            with contextlib.suppress(OSError):
                os.write(pipe, pickle.dumps(error))
        finally:
            os._exit(1)

    def _tell(self, status: int, late: bool, wall: float) -> Ended:
        reading, leaf = self._read()
        order = self._order
        code = os.waitstatus_to_exitcode(status)
        number = -code if code < 0 else None
        exit_status = SIGNALLED + number if number is not None else code
        ending: Ending = "ok" if exit_status == 0 else "error" if number is None else "killed"
        limit, detail = None, ""
        if late:
            ending, limit, detail = "timeout", "timeout", f"wall time limit {_seconds(order.timeout)} reached"
        elif number in _ASKED:
            detail = f"ended by {_name(number)}"  # whatever limit it, or what it started, met before
        elif exit_status and (leaf.oom_kills or self._ended_within(reading, leaf, exit_status)):
            ending = "memory"
            limit, bound = self._limit("memory_max", leaf.memory_peak, 0.95)
            detail = (
                f"memory limit {_size(bound)} reached (peak {_peak(reading.memory_peak)}{order.memory_note})"
            )
            if bound is None or (reading.memory_peak or bound) < 0.9 * bound:
                limit = None
                detail = f"memory limit of what is around it reached (peak {_peak(reading.memory_peak)})"
        elif exit_status and max(reading.pids_limit_hits or 0, leaf.pids_limit_hits or 0):
            ending = "pids"
            limit, bound = self._limit("pids_max", leaf.pids_limit_hits, 0)
            detail = f"pids limit {bound} reached: no more processes or threads could be started"
        elif number is not None:
            detail = f"ended by {_name(number)}"
        return Ended(ending, exit_status, number, limit, detail, wall, reading, self._group.path)

    def _ended_within(self, reading: Reading, leaf: Reading, exit_status: int) -> bool:
        """Whether the group's memory was not enough for what ran in a nested group, beside the leaf.

        One that ended at a limit of its own has been told of by who made it, and is none of this group's.
        """
        if leaf.oom_kills is None:
            return bool(reading.oom_kills)  # they are not accounted apart
        bound = self._in_force(self._group, self._order.resources, "memory_max")
        if bound is None or (reading.memory_peak or 0) < 0.95 * bound:
            return False
        if reading.oom_kills:
            return True  # v2
        if self._want is None:
            return False
        # v1: in the cgroups that are still there; else the kernel has told that it killed, and this is how that ends.
        from rcon_plugins.kernel.cgroup.statistics import read_usage

        killed = bool(read_usage(self._group).oom_kills)
        return killed or (exit_status == SIGNALLED + signal.SIGKILL and count_notices(self._want) > 0)

    def _limit(self, name: str, reached: int | None, most: float) -> tuple[str, int | None]:
        """Which limit was hit, as a policy spells it: that of all together, or that of the single command."""
        together = self._in_force(self._group, self._order.resources, name)
        each = self._in_force(self._leaf, self._order.each, name)
        word = name.removesuffix("_max")
        if each is not None and (together is None or (reached or 0) >= max(1, most * each)):
            return f"each.{word}", each
        return word, together

    @staticmethod
    def _in_force(cgroup: Cgroup, ordered: Resources, name: str) -> int | None:
        """The limit as it is now: a plugin, ``--on-event`` or ``rcon set`` may have given another."""
        return _number(getattr(read_limits(cgroup) if cgroup.exists() else ordered, name))

    def _read(self) -> tuple[Reading, Reading]:
        """What the group used, and the leaf: hits are counted in the one or the other, as the version has it."""
        reading = self._group.read()
        leaf = self._leaf.read() if self._leaf.exists() else Reading()
        ordered = _number(self._order.resources.memory_max)
        if reading.memory_peak is not None and ordered is not None and reading.memory_peak > ordered:
            # The kernel counts a batch of pages here before it refuses them.
            bound = self._in_force(self._group, self._order.resources, "memory_max")
            reading = reading._replace(memory_peak=min(reading.memory_peak, bound or reading.memory_peak))
        return reading, leaf


def _die_with(caller: int) -> None:
    """Have the kernel kill this process when the caller ends, in whatever way; after the last change of ids."""
    from rcon_plugins.kernel.syscalls import PR_SET_PDEATHSIG, prctl

    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != caller:
        raise KernelError("rcon ended", errno=errno.ESRCH, path="getppid")


def _raise(problem: bytes) -> NoReturn:
    import pickle

    error = pickle.loads(problem)  # noqa: S301 - from our own fork, before it executed anything
    raise error


def group_name(command: str, pid: int | None = None) -> str:
    """The name of a group for a command that was given none: ``<basename>-<pid>``, by default the caller's."""
    plain = "".join(
        c if c.isascii() and (c.isalnum() or c in "_-") else "_" for c in command.rpartition("/")[2]
    )
    name = f"{plain[:_LONGEST_NAME].lstrip('-') or 'command'}-{pid or os.getpid()}"
    return f"run-{name}" if INSTANCE_NAME.fullmatch(name) else name


def check_group_name(name: str) -> str:
    """``name``, if a person may call a group so; else ValueError with the reason."""
    check_name(name)
    if name.startswith("-"):
        raise ValueError(f"it begins with a dash, as options do: {name!r}")
    if INSTANCE_NAME.fullmatch(name):
        raise ValueError(f"rcon's own trees have names of this shape: {name!r}")
    return name


def _number(limit: object) -> int | None:
    return limit if isinstance(limit, int) else None


def _size(count: int | None) -> str:
    return "of the machine" if count is None else f"{count / 2**20:.6g} MiB"


def _peak(count: int | None) -> str:
    return "unknown" if count is None else f"{count / 2**20:.1f} MiB"


def _seconds(seconds: float | None) -> str:
    return f"{seconds:g} s"


def _name(number: int) -> str:
    try:
        return f"{signal.Signals(number).name} ({signal.strsignal(number)})"
    except ValueError:
        return f"signal {number}"
