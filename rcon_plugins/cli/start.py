"""The console scripts ``rcon`` and ``capcon``. Only ``run`` does not load click, so that it starts quickly."""

from __future__ import annotations

import gc
import os
import signal
import sys
from collections.abc import Callable
from typing import NoReturn


def main() -> NoReturn:
    """Run rcon with ``sys.argv`` and exit."""
    _script("rcon", "_RCON_COMPLETE")


def capcon_main() -> NoReturn:
    """Run capcon with ``sys.argv`` and exit."""
    _script("capcon", "_CAPCON_COMPLETE")


def _script(program: str, completing: str) -> NoReturn:
    try:
        if sys.argv[1:2] == ["run"] and completing not in os.environ:
            _run(program, sys.argv[2:])
        if program == "rcon":
            from rcon_plugins.cli import rcon

            rcon.main()
        from rcon_plugins.cli.capcon import commands

        commands.main()
    except KeyboardInterrupt:
        # End as a program that handles no signals, at whatever point it was interrupted.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
        os._exit(128 + signal.SIGINT)  # SIGINT is blocked


def _run(program: str, words: list[str]) -> None:
    """Run the command and exit. Return only for ``--help``, which click prints."""
    gc.disable()
    from rcon_plugins.cli.exit import status_of
    from rcon_plugins.cli.options import HelpRequested

    run: Callable[[list[str]], int]
    if program == "rcon":
        from rcon_plugins.cli.run.run import run
    else:
        from rcon_plugins.cli.capcon.run import run
    try:
        status = status_of(lambda: run(words), program, f"{program} run")
    except HelpRequested:
        gc.enable()
        return
    # Nothing is buffered and nothing to clean up: skip the end of the interpreter, which takes time.
    os._exit(status)
