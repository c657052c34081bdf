"""What the scripts ``rcon`` and ``capcon`` run. Only ``run`` does not load click, so that it starts quickly."""

from __future__ import annotations

import gc
import os
import signal
import sys
from collections.abc import Callable
from typing import NoReturn

#: The variable in which a script passes on a copy of its environment (``scripts/rcon``).
COPY = "RCON_ENVIRONMENT"
#: Before a copy that gzip has compressed; before any other is a colon.
_COMPRESSED = "::"


def main() -> NoReturn:
    """Run rcon with ``sys.argv`` and exit."""
    _script("rcon", "_RCON_COMPLETE")


def capcon_main() -> NoReturn:
    """Run capcon with ``sys.argv`` and exit."""
    _script("capcon", "_CAPCON_COMPLETE")


def _script(program: str, completing: str) -> NoReturn:
    try:
        if copy := os.environ.pop(COPY, None):
            _restore_environment(copy)
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


def _restore_environment(copy: str) -> None:
    """Replace ``os.environ`` with the environment that the script was started with, before sh changed it.

    ``copy`` is ``/proc/PID/environ`` in hexadecimal digits after a colon, or compressed after two.
    """
    from rcon_plugins.kernel.proc import parse_environment

    content = bytes.fromhex(copy.lstrip(":"))
    if copy.startswith(_COMPRESSED):
        import zlib

        content = zlib.decompress(content, wbits=31)  # with the header of gzip
    variables = parse_environment(content)
    for name in filter(None, list(os.environb)):
        del os.environb[name]
    os.environb.update(variables)


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
