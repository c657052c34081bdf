"""The console script ``rcon``: a plain ``rcon run`` at once, everything else through click.

To load click, and what reads policies, takes several times as long as to start Python; a command line that holds
nothing unusual needs neither.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
from typing import NoReturn


def main() -> NoReturn:
    """Do what ``sys.argv`` says, and exit. Interrupted at whatever it does, it ends as a program that minds nothing."""
    try:
        _start()
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
        os._exit(128 + signal.SIGINT)  # where it is blocked


def _start() -> NoReturn:
    if sys.argv[1:2] == ["run"] and "_RCON_COMPLETE" not in os.environ:
        gc.disable()
        from rcon_plugins.cli.run import fast_path

        status = fast_path.run(sys.argv[2:])
        if status is not None:
            # Nothing is buffered, and there is nobody left to tidy up for.
            os._exit(status)
        gc.enable()
    from rcon_plugins.cli import rcon

    rcon.main()
