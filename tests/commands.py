"""Run rcon in a fork of the calling process, which has its modules: a new interpreter would load them again."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from rcon_plugins.cli.rcon import run_main

#: The exit status of rcon if it raised an error that it should have reported.
FAILED = 99


def become_rcon(
    words: list[str], streams: list[Path], before: Callable[[], object] | None = None, cwd: str = "/"
) -> NoReturn:
    """Run rcon in this new process and exit, with `FAILED` if it raises.

    ``streams`` are the files for standard output and error, if any. ``before`` is called last before rcon.
    """
    status = FAILED
    try:
        if streams:
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            for number, path in enumerate(streams, 1):
                os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
        sys.stdin, sys.stdout, sys.stderr = (
            os.fdopen(0, "r", closefd=False),
            os.fdopen(1, "w", closefd=False),
            os.fdopen(2, "w", closefd=False),
        )
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it is ignored
        os.chdir(cwd)
        if before:
            before()
        status = run_main(words)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError):  # `before` may have closed them
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)
