"""The program of a command, found as a shell finds it. Imports little: ``rcon run`` needs it to start quickly."""

from __future__ import annotations

import os
import stat

from rcon_plugins.cli.exit import NOT_EXECUTABLE, NOT_FOUND, Refused


def find_program(command: str) -> str:
    """Return the path of the program, looked for in PATH unless it contains a slash.

    Raises `Refused`, with the exit status of a shell, where there is none or this user may not execute it.
    """
    found = None
    for folder in [""] if "/" in command else os.get_exec_path():
        path = f"{folder}/{command}" if folder else command
        mode = _mode(path)
        if stat.S_ISREG(mode):
            if os.access(path, os.X_OK):
                return path
            found = found or path
        elif "/" in command and mode:
            raise Refused(f"{path} is not a regular file, so it cannot be executed", NOT_EXECUTABLE)
    if found:
        raise Refused(f"{found} is not executable (chmod +x, or run it with its interpreter)", NOT_EXECUTABLE)
    reason = "there is no such file" if "/" in command else "it is in no folder of PATH"
    raise Refused(f"{command}: not found ({reason})", NOT_FOUND)


def _mode(path: str) -> int:
    try:
        return os.stat(path).st_mode  # noqa: PTH116  pathlib loads slowly
    except (OSError, ValueError):  # ValueError: a null character
        return 0
