"""The files that an executor process with a user of its own inherits from the server, and what becomes of each.

| open file | becomes |
|---|---|
| standard output and error | the executor's pipe (`output`) |
| a file opened for writing that is a log | the executor's pipe |
| any other file opened for writing, a device | a socket whose peer is closed |
| a file or directory opened for reading | the same, opened again: position, flags and locks are its own |
| a file mapped shared and writable | a private copy on write |
| what the policy names in ``keep_files`` | stays |

A log is a file that only takes data at its end (O_APPEND, not opened for reading), or the stream of a handler of
`logging`. If `sys.stdout` or `sys.stderr` writes to another file that is closed, it writes to the pipe from then on.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Collection
from typing import Any

from rcon_plugins.kernel import mappings, process
from rcon_plugins.kernel.files import unanswered
from rcon_plugins.kernel.process import OpenFile

#: The names of descriptors 1 and 2 in a policy.
STANDARD_FILES = {"stdout": 1, "stderr": 2}
#: Methods of handlers that would open the file again as the user of the work, and what they return instead.
_ROTATION = {"shouldRollover": False, "reopenIfNeeded": None}


class InheritedFiles:
    """The open files of a fork server. Make it once the server's own files are closed, and before the first fork."""

    def __init__(self, but: Collection[int] = ()) -> None:
        """``but`` are descriptors to leave alone."""
        streams = _streams()
        self._closed = process.closed_socket()
        self._logs: list[OpenFile] = []
        self._closing: list[OpenFile] = []
        self._reopening: list[OpenFile] = []
        #: Handlers that write to a log and may open it again, by its descriptor.
        self._rotating: dict[int, list[logging.Handler]] = {}
        #: Standard streams of Python that write to other descriptors than 1 and 2, and what replaces them.
        self._python_streams = [
            (name, descriptor, open(number, "w", errors="backslashreplace", closefd=False))  # noqa: SIM115
            for name, number in STANDARD_FILES.items()
            if (descriptor := _descriptor(getattr(sys, name))) is not None and descriptor > 2
        ]
        files = process.open_files()
        self._mappings = mappings.shared_mappings()
        for file in files:
            if file.descriptor in but or file.kind == "memory device":
                continue
            if file.kind == "device" or file.path.startswith("/memfd:"):
                self._closing.append(file)
            elif not file.writable:
                self._reopening.append(file)
            elif file.descriptor in streams or file.flags & (os.O_APPEND | os.O_ACCMODE) == (
                os.O_APPEND | os.O_WRONLY
            ):
                self._logs.append(file)
                self._rotating[file.descriptor] = streams.get(file.descriptor, [])
            else:
                self._closing.append(file)

    def replace(self, output: int, keep: Collection[str]) -> None:
        """Replace the files of this process, a new executor, as the table above says. Raises OSError, `KernelError`.

        ``output`` is the descriptor of its pipe.
        """
        replace_output(output, keep)
        for file in self._logs:
            if not _is_named(file.path, keep):
                os.dup2(output, file.descriptor, inheritable=False)
                _stop_rotation(self._rotating[file.descriptor])
        for file in self._closing:
            if not _is_named(file.path, keep):
                os.dup2(self._closed, file.descriptor, inheritable=False)
                self._replace_python_streams(file.descriptor)
        for file in self._reopening:
            if not _is_named(file.path, keep):
                try:
                    process.open_again(file)
                except OSError as error:
                    if unanswered(error):
                        raise
                    os.dup2(self._closed, file.descriptor, inheritable=False)

        for mapping in self._mappings:
            if not _is_named(mapping.path, keep):
                mappings.make_private(mapping)

    def _replace_python_streams(self, descriptor: int) -> None:
        for name, of, substitute in self._python_streams:
            if of == descriptor:
                setattr(sys, name, substitute)


def replace_output(output: int, keep: Collection[str]) -> None:
    """Replace standard output and error of this process, unless ``keep`` names them. Raises OSError."""
    for name, descriptor in STANDARD_FILES.items():
        if name not in keep:
            os.dup2(output, descriptor)


def _is_named(path: str, names: Collection[str]) -> bool:
    return any(path == name or path.startswith(f"{name}/") for name in names)


def _stop_rotation(handlers: Collection[logging.Handler]) -> None:
    for handler in handlers:
        for name, value in _ROTATION.items():
            if hasattr(handler, name):
                setattr(handler, name, lambda *_, value=value: value)


def _streams() -> dict[int, list[logging.Handler]]:
    """Return the descriptors that handlers of `logging` write to, with the handlers."""
    found: dict[int, list[logging.Handler]] = {}
    # Not the handlers of the loggers: a handler may pass records on to another, as MemoryHandler does.
    for reference in list(getattr(logging, "_handlerList", ())):
        handler = reference()
        if handler is logging.lastResort:
            continue  # its stream is always sys.stderr
        if (descriptor := _descriptor(getattr(handler, "stream", None))) is not None:
            found.setdefault(descriptor, []).append(handler)
    return found


def _descriptor(stream: Any) -> int | None:
    with contextlib.suppress(Exception):  # a stream of an application may raise anything
        descriptor = stream.fileno()
        return descriptor if isinstance(descriptor, int) else None
    return None
