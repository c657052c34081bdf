"""Which file a command is, and why the kernel did not execute it."""

from __future__ import annotations

import errno
import os
import stat


def find_program(name: str) -> str | None:
    """The file that a shell would execute for ``name``, looked for in PATH; None where there is none to be executed."""
    for folder in [""] if "/" in name else os.get_exec_path():
        path = f"{folder}/{name}" if folder else name
        try:
            regular = stat.S_ISREG(os.stat(path).st_mode)
        except (OSError, ValueError):  # ValueError: it holds a null character
            continue
        if regular and os.access(path, os.X_OK):
            return path
    return None


def why_not_executed(number: int | None, *, as_another: bool = False) -> str:
    """What to do about a program that was there and that execve(2) refused, by errno; empty where that says it.

    ``as_another``: it was to be executed by another user than who looked for it.
    """
    if number == errno.ENOENT:
        return "the interpreter or loader that it names is missing: install it, or mend the line that begins with #!"
    if number == errno.ENOEXEC:
        return "it is no program for this machine, or a script whose first line does not begin with #!"
    if number == errno.EACCES and as_another:
        return "its user must be allowed to execute it, and to enter each folder above it"
    return ""
