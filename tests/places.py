"""Directories of the tests that other users look at."""

from __future__ import annotations

from pathlib import Path


def let_others_in(directory: Path) -> None:
    """Let any user read in a directory that pytest made, and pass those above it that are pytest's, too.

    One that others may pass already stays as it is: /tmp, above all.
    """
    for place in (directory, *directory.parents):
        mode = place.stat().st_mode
        if place == Path.home():
            return
        if not mode & 0o001:
            place.chmod(mode | 0o055)
