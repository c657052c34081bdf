"""Directories of the tests that other users may read."""

from __future__ import annotations

from pathlib import Path


def let_others_read(directory: Path) -> None:
    """Let any user read a directory that pytest made, and pass through its parent directories.

    A directory that other users may already pass through is left unchanged, above all /tmp.
    """
    for path in (directory, *directory.parents):
        mode = path.stat().st_mode
        if path == Path.home():
            return
        if not mode & 0o001:
            path.chmod(mode | 0o055)
