"""Which file a command is."""

from __future__ import annotations

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
