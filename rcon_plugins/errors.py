"""Define the errors of this project. They can be pickled, and each message names a remedy.

::

    RconError
    ├── SettingsError              the settings or a policy are wrong
    ├── UnknownGroup               no group has that name, or several have
    ├── KernelError (OSError)      the kernel refuses, or would refuse
    │   ├── ControllerUnavailable
    │   ├── DelegationError
    │   └── CapabilityError
    ├── ConfinementError           the work did not run
    │   ├── IdentityRefused        its identity is not allowed
    │   └── Unroutable             no route names it
    ├── ApplicationError           the confined code raised
    ├── Killed                     the process ended before the work was done
    └── LimitExceeded              the work ran into a limit
        ├── MemoryLimitExceeded
        ├── SoftMemoryLimitExceeded
        ├── TimeLimitExceeded
        ├── PidsLimitExceeded
        ├── ResultTooLarge
        └── ConcurrencyLimitExceeded
"""

from __future__ import annotations

import errno as _errno
import os
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from rcon_plugins.work import Usage

#: The remedy where clone(2) finds no room for one more process or thread, which count alike.
MORE_PROCESSES = "raise the limit on processes: pids.max of the cgroups around this process, `ulimit -u`"

#: The remedies where no descriptor is left, whatever the call.
_MORE_DESCRIPTORS = {
    _errno.EMFILE: "raise the limit on open files of this process: RLIMIT_NOFILE, `ulimit -n`, LimitNOFILE= of a unit",
    _errno.ENFILE: "raise the limits of this machine on open files and pipes: fs.file-max, fs.pipe-user-pages-hard",
}


class RconError(Exception):
    """Base of every error this project raises."""


class SettingsError(RconError):
    """Raised when settings or a policy are wrong.

    The message names the file, the key, the value and the remedy.
    """

    def __init__(
        self,
        problem: str,
        *,
        key: str | None = None,
        value: object = None,
        hint: str | None = None,
        file: str | None = None,
    ) -> None:
        self.problem = problem
        self.key = key
        self.value = value
        self.hint = hint
        self.file = file
        super().__init__(problem)

    def __str__(self) -> str:
        where = ": ".join(part for part in (self.file, self.key) if part)
        text = f"{where}: {self.problem}" if where else self.problem
        return on_one_line(f"{text} ({self.hint})" if self.hint else text)

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.args, dict(self.__dict__))


class UnknownGroup(RconError):
    """Raised when no group, or more than one, has the given name. ``hint`` lists similar names."""

    def __init__(self, problem: str, *, hint: str) -> None:
        super().__init__(problem)
        self.problem = problem
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.problem} ({self.hint})"

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (partial(type(self), hint=self.hint), self.args, dict(self.__dict__))


class KernelError(RconError, OSError):
    """Raised when a kernel file or system call refuses.

    ``path`` is the file or the call, ``value`` the text written (None for a read), ``errno`` the kernel's error number,
    and ``hint`` the remedy.
    """

    def __init__(
        self,
        problem: str,
        *,
        errno: int = _errno.EINVAL,
        path: str | None = None,
        value: str | None = None,
        hint: str | None = None,
    ) -> None:
        super().__init__(errno, problem)
        self.problem = problem
        self.errno = errno
        self.path = path
        self.value = value
        self.hint = hint

    @classmethod
    def from_oserror(
        cls, error: OSError, *, path: str, value: str | None = None, hint: str | None = None
    ) -> KernelError:
        """Return ``error`` as a KernelError with the path, the value written and the remedy.

        Without ``hint`` the remedy is that of ``error``, if it has one. Where no descriptor is left, it is always to
        raise that limit.
        """
        number = error.errno or _errno.EIO
        action = f"writing {value!r} to {path}" if value is not None else path
        hint = _MORE_DESCRIPTORS.get(number) or hint or getattr(error, "hint", None)
        return cls(f"{action}: {os.strerror(number)}", errno=number, path=path, value=value, hint=hint)

    def __str__(self) -> str:
        return f"{self.problem} ({self.hint})" if self.hint else self.problem

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (partial(type(self), errno=self.errno or 0), (self.problem,), dict(self.__dict__))


class ControllerUnavailable(KernelError):
    """Raised when this machine cannot enforce a limit: its controller is missing or not delegated."""


class DelegationError(KernelError):
    """Raised when this process may write no part of the cgroup tree. The hint is the exact remedy."""


class CapabilityError(KernelError):
    """Raised when the calling thread cannot take, give or drop an identity or a capability."""


class ConfinementError(RconError):
    """Raised when work could not be confined. The work did not run."""


class Unroutable(ConfinementError):
    """Raised for work that no route names, or whose policy does not exist. The work did not run."""


class IdentityRefused(ConfinementError):
    """Raised when work may not run with its identity. The work did not run.

    Write the message only to the log: it names paths and accounts, which a client must not see.
    """


class ApplicationError(RconError):
    """Raised in the host when confined code raised an exception. Carries that exception as text.

    The host unpickles nothing from a confined process. So this has the qualified ``type_name``, the ``message`` and the
    ``traceback_text`` instead of the exception object.
    """

    def __init__(self, type_name: str, message: str, traceback_text: str = "") -> None:
        super().__init__(type_name, message, traceback_text)
        self.type_name = type_name
        self.message = message
        self.traceback_text = traceback_text

    def __str__(self) -> str:
        first = f"{self.type_name}: {self.message}" if self.message else self.type_name
        return f"{first}\n\n{self.traceback_text}" if self.traceback_text else first


class Killed(RconError):
    """Raised when the process of a unit of work ended before the work was done, and no limit was the cause.

    ``signal`` is the number of the signal that ended the process; None if it exited by itself.
    """

    def __init__(
        self, message: str, signal: int | None = None, usage: Usage | Mapping[str, Any] | None = None
    ) -> None:
        super().__init__(message, signal, usage)
        self.signal = signal
        self.usage = _usage(usage)

    def __str__(self) -> str:
        return str(self.args[0])

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.args[0]!r})"

    def plain(self) -> Self:
        """Set ``args`` to plain values that any serializer can carry, and return the error.

        Calling the class with these ``args`` makes the error again.
        """
        self.args = (self.args[0], self.signal, _plain_usage(self.usage))
        return self


class LimitExceeded(RconError):
    """Raised when work ran into one of its limits.

    ``policy`` and ``key`` name the confinement, ``limit`` the limit as the policy spells it, ``usage`` the usage.
    ``data`` holds all of these in the form of `plain`.
    """

    def __init__(
        self,
        message: str,
        data: Mapping[str, Any] | None = None,
        *,
        policy: str = "",
        key: str | None = None,
        limit: str = "",
        usage: Usage | None = None,
    ) -> None:
        super().__init__(*((message,) if data is None else (message, data)))
        data = data or {}
        self.policy: str = data.get("policy", policy)
        self.key: str | None = data.get("key", key)
        self.limit: str = data.get("limit", limit)
        self.usage = _usage(data.get("usage", usage))

    def __str__(self) -> str:
        return str(self.args[0])

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.args[0]!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.args, dict(self.__dict__))

    def plain(self) -> Self:
        """Set ``args`` to plain values that any serializer can carry, and return the error.

        Calling the class with these ``args`` makes the error again.
        """
        data = {
            "policy": self.policy,
            "key": self.key,
            "limit": self.limit,
            "usage": _plain_usage(self.usage),
        }
        self.args = (self.args[0], data)
        return self


class MemoryLimitExceeded(LimitExceeded):
    """Raised when the kernel killed work at its memory limit."""


class SoftMemoryLimitExceeded(LimitExceeded):
    """Raised inside work that reached its soft memory limit: return before the memory limit kills it."""


class TimeLimitExceeded(LimitExceeded):
    """Raised when work was killed at the end of its wall time."""


class PidsLimitExceeded(LimitExceeded):
    """Raised when work failed because its pids limit refused more processes or threads."""


class ResultTooLarge(LimitExceeded):
    """Raised when a task returned, or raised, more than ``max_result`` of its policy allows."""


class ConcurrencyLimitExceeded(LimitExceeded):
    """Raised when a confinement already runs as many requests or tasks as its policy allows.

    ``retry_after`` is in seconds.
    """

    retry_after: int = 1


def fork_refused(error: OSError) -> KernelError:
    """Return the error for a fork(2) that failed, with the remedy. EAGAIN: there is no room for one more process."""
    hint = MORE_PROCESSES if error.errno == _errno.EAGAIN else None
    return KernelError.from_oserror(error, path="fork", hint=hint)


def thread_not_started(name: str, error: RuntimeError) -> KernelError:
    """Return the error (EAGAIN) for a thread that could not be started, with the remedy.

    A thread counts as a process, so clone(2) fails at a limit on processes. Python then raises RuntimeError, which
    nobody expects of the kernel.
    """
    return KernelError(
        f"the thread {name} could not be started: {error}",
        errno=_errno.EAGAIN,
        path="clone",
        hint=MORE_PROCESSES,
    )


def on_one_line(text: str) -> str:
    """Return the text with line breaks and control characters escaped: keys and values are as a file has them."""
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() else repr(each)[1:-1] for each in text)


def _usage(usage: Usage | Mapping[str, Any] | None) -> Usage | None:
    from rcon_plugins.work import Usage

    return Usage(**usage) if isinstance(usage, Mapping) else usage


def _plain_usage(usage: Usage | None) -> dict[str, Any] | None:
    import msgspec

    return None if usage is None else msgspec.structs.asdict(usage)


def _rebuild(make: Callable[..., RconError], args: tuple[Any, ...], state: dict[str, Any]) -> RconError:
    error = make(*args)
    error.__dict__.update(state)
    return error
