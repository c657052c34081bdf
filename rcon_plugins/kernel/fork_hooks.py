"""Postpone the application's fork hooks (`os.register_at_fork`) from a fork to the moment when its child is confined.

Libraries such as OpenTelemetry start their threads again in such a hook. A thread that starts before its process has
dropped its rights keeps them, and a process with threads cannot fork safely. So of a process that forks another, which
forks those that run the application, the hooks ``before`` and ``after_in_parent`` run once, and ``after_in_child`` runs
in each process that runs the application: as if that were the only fork.

The hooks of the standard library and of this package run where Python runs them. CPython has no function for this:
`ForkHooks.find` gets the interpreter's own lists through the garbage collector.
"""

from __future__ import annotations

import contextlib
import gc
import os
import sys
from collections.abc import Callable, Iterator
from functools import partial
from types import ModuleType
from typing import Any, NamedTuple

from rcon_plugins.errors import ConfinementError

Hook = Callable[[], object]

_OWN = __name__.partition(".")[0]


class ForkHooks(NamedTuple):
    """The interpreter's lists of fork hooks. A change of a list takes effect at the next fork."""

    before: list[Hook]
    after_in_parent: list[Hook]
    after_in_child: list[Hook]

    @classmethod
    def find(cls) -> ForkHooks:
        """Return the lists of this interpreter. Raises `ConfinementError` if they cannot be found."""
        markers = [partial(_do_nothing) for _ in cls._fields]
        os.register_at_fork(**dict(zip(cls._fields, markers, strict=True)))
        frozen = gc.get_freeze_count()
        if frozen:
            gc.unfreeze()  # the collector does not look at frozen objects, such as lists that are older than the freeze
        try:
            referrers = [
                one for one in gc.get_referrers(*markers) if type(one) is list and one is not markers
            ]
        finally:
            if frozen:
                gc.freeze()
        found = []
        for marker in markers:
            mine = [one for one in referrers if any(item is marker for item in one)]
            for one in mine:
                one.remove(marker)
            found += mine
        if len(found) != len(markers):
            raise ConfinementError(
                "this interpreter does not show its fork hooks, so no process can be confined"
            )
        return cls(*found)


class Postponed:
    """The application's hooks, which are out of the lists."""

    def __init__(self, lists: ForkHooks) -> None:
        self._lists = lists
        self._originals = ForkHooks(*(list(one) for one in lists))
        #: The hooks that are not the application's.
        self._others = ForkHooks(*(_others_in(one) for one in lists))
        #: The application's hooks for a child.
        self._for_child = [hook for hook in lists.after_in_child if hook not in self._others.after_in_child]
        self._keeps_own = True

    def clear(self, *names: str) -> None:
        """Take the application's hooks out of these lists; without names out of all, and also those that are new.

        A process that forks, and does not run them, calls it before each fork.
        """
        for name in names or ForkHooks._fields:
            now, others = getattr(self._lists, name), getattr(self._others, name)
            if len(now) != len(others):
                others[:] = [hook for hook in _others_in(now) if self._keeps_own or not _is_own(hook)]
                now[:] = others

    def clear_all(self) -> None:
        """Take the application's hooks and those of this package out of the lists, also in each later `clear`.

        For a process where those of this package have run, and that changes nothing which they put in order. They are
        not run again by `run`, since a new process copies all memory that they touch.
        """
        self._keeps_own = False
        for now in self._lists:
            now[:] = [hook for hook in now if not _is_own(hook)]
        self.clear()

    def restore(self) -> None:
        """Put all hooks back. Those that were registered meanwhile stay."""
        for now, originals in zip(self._lists, self._originals, strict=True):
            now[:] = [*originals, *[hook for hook in now if hook not in originals]]

    def run(self) -> None:
        """Put all hooks back, and run those of the application for a child. Call it in the child that may run them.

        What a hook raises is reported as Python reports it: by `sys.unraisablehook`.
        """
        here = list(self._lists.after_in_child)
        self.restore()
        for hook in self._for_child:
            if hook not in here:
                try:
                    hook()
                except BaseException as error:  # noqa: BLE001 - so does Python
                    error.add_note(f"raised by the fork hook {hook!r}")
                    _Failed(error)


@contextlib.contextmanager
def postponed() -> Iterator[Postponed]:
    """Take the application's hooks for a child out of the list while the block forks.

    The process has no other threads that could fork meanwhile. The fork never leaves the block. Raises
    `ConfinementError`.
    """
    hooks = Postponed(ForkHooks.find())
    hooks.clear("after_in_child")
    try:
        yield hooks
    finally:
        hooks.restore()


@contextlib.contextmanager
def left_out() -> Iterator[None]:
    """Run no hook of the application while the block forks: neither here nor in the fork, which runs none of its code.

    The same holds for threads and for the fork as in `postponed`.
    """
    with postponed() as hooks:
        hooks.clear()
        yield


def _others_in(hooks: list[Hook]) -> list[Hook]:
    return [hook for hook in hooks if not is_of_application(hook)]


def is_of_application(hook: Any) -> bool:
    """Return whether neither Python nor this package registered a hook.

    Python registers private functions, and methods of objects that its modules have. Everything else is the
    application's, such as `gc.enable`, the method of an object of its own, or a `partial`. This looks at many objects:
    a new process that asked would copy the pages of all of them.
    """
    if _is_own(hook):
        return False
    owner = getattr(hook, "__self__", None)
    if owner is None:
        package = _package(getattr(hook, "__module__", None))
        is_private = getattr(hook, "__name__", "").startswith("_")
        return not (package in sys.stdlib_module_names and is_private)
    if isinstance(owner, ModuleType):
        return True
    return not any(owner is value for one in _standard_modules() for value in list(vars(one).values()))


def _is_own(hook: Any) -> bool:
    """Return whether this package registered a hook: a function of its own, or the method of an object of its own."""
    owner = getattr(hook, "__self__", None)
    return _package(getattr(hook if owner is None else type(owner), "__module__", None)) == _OWN


def _standard_modules() -> list[ModuleType]:
    return [one for name, one in list(sys.modules.items()) if _package(name) in sys.stdlib_module_names]


def _package(module: object) -> str:
    return str(module).partition(".")[0]


class _Failed:
    """Has Python report an exception: nothing else calls `sys.unraisablehook` with the arguments that it expects."""

    def __init__(self, error: BaseException) -> None:
        self._error = error

    def __del__(self) -> None:
        raise self._error


def _do_nothing() -> None:
    """Mark a list."""
