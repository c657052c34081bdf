"""The environment that this process was given, before the interpreter added to it."""

from __future__ import annotations

import os


def given() -> dict[bytes, bytes]:
    """The variables as they were at execve(2) (``/proc/self/environ``), for handing them on unchanged.

    In the C locale Python sets LC_CTYPE, and ``os.environ`` has it (PEP 538). Where the file cannot be read this is
    ``os.environb``.
    """
    try:
        with open("/proc/self/environ", "rb") as file:
            content = file.read()
    except OSError:
        return dict(os.environb)
    pairs = (entry.partition(b"=") for entry in content.split(b"\0"))
    return {name: value for name, equals, value in pairs if name and equals}
