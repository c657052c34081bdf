"""Run functions with irreversible effects in a child process: `in_child(function)`."""

from __future__ import annotations

import contextlib
import os
import pickle
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

T = TypeVar("T")


class ChildDied(Exception):
    """Raised when the child ended without sending a result.

    `signal` is the signal that killed it, or None; `status` is its exit status, or None.
    """

    def __init__(self, *, signal: int | None, status: int | None) -> None:
        self.signal = signal
        self.status = status
        super().__init__(f"killed by signal {signal}" if signal is not None else f"exit status {status}")


def in_child(function: Callable[..., T], *arguments: Any, timeout: float = 30.0) -> T:
    """Call `function` in a forked child; return its result, or raise what it raises.

    Result and exception must pickle. The child is gone when this returns. After `timeout` seconds the child is killed
    and TimeoutError raised. The test must end the processes that the child forks: the check for leftovers finds them.
    """
    reading, writing = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        _run(function, arguments, writing)
    os.close(writing)
    try:
        message, status = _follow(pid, reading, time.monotonic() + timeout)
    finally:
        os.close(reading)
    if status is None:
        raise TimeoutError(f"{function!r} was not done in a child process after {timeout:g} s")
    if not message:
        died = os.waitstatus_to_exitcode(status)
        raise ChildDied(signal=-died if died < 0 else None, status=died if died >= 0 else None)
    outcome, value = pickle.loads(message)
    if outcome == "raised":
        raise value
    result: T = value
    return result


def _run(function: Callable[..., Any], arguments: tuple[Any, ...], writing: int) -> NoReturn:
    """Call the function in the child, send the result, and exit. Never return into the test that forked it."""
    status = 1
    try:
        try:
            message = pickle.dumps(("returned", function(*arguments)))
        except BaseException as error:
            trace = "".join(traceback.format_exception(error))
            error.add_note(f"In the child process:\n{trace}")
            try:
                message = pickle.dumps(("raised", error))
                pickle.loads(message)
            except Exception:
                message = pickle.dumps(
                    ("raised", RuntimeError(f"An error that does not pickle, in a child:\n{trace}"))
                )
        with os.fdopen(writing, "wb") as pipe:
            pipe.write(message)
        status = 0
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def _follow(pid: int, pipe: int, deadline: float) -> tuple[bytes, int | None]:
    """Return what the child sent until it ended, and its wait status; None if it was killed at the deadline.

    Wait for the end of the child, not of the pipe, because a grandchild may keep the pipe open.
    """
    received = b""
    ended = os.pidfd_open(pid)
    os.set_blocking(pipe, False)
    try:
        poll = select.poll()
        poll.register(pipe, select.POLLIN)
        poll.register(ended, select.POLLIN)
        while True:
            ready = [fd for fd, _ in poll.poll(max(0.0, deadline - time.monotonic()) * 1000)]
            with contextlib.suppress(BlockingIOError):
                while data := os.read(pipe, 65536):
                    received += data
                if pipe in ready:
                    poll.unregister(pipe)  # it is at its end
            if ended in ready:
                return received, os.waitpid(pid, 0)[1]
            if not ready:
                signal.pidfd_send_signal(ended, signal.SIGKILL)
                os.waitpid(pid, 0)
                return received, None
    except BaseException:  # a KeyboardInterrupt, the timeout of the test
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            signal.pidfd_send_signal(ended, signal.SIGKILL)
            os.waitpid(pid, 0)
        raise
    finally:
        os.close(ended)
