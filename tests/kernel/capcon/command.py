"""capcon as a shell runs it: `capcon("run", "--user", "nobody", "--", "id")`."""

from __future__ import annotations

import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

# Import all of capcon here: the user of a test may not be able to read the files of this interpreter.
from rcon_plugins.cli.capcon import explain, run, show  # noqa: F401
from rcon_plugins.cli.capcon.commands import run_main

NOBODY = 65534


class Done(NamedTuple):
    """The result of a command. `status` is as in Popen: negative for the signal that ended the command."""

    status: int
    out: str
    err: str

    @property
    def held(self) -> dict[str, str]:
        """Return the fields of /proc/self/status that the command printed."""
        pairs = (line.partition(":") for line in self.out.splitlines())
        return {name: value.strip() for name, _, value in pairs}


def capcon(
    *arguments: str | Path, before: Callable[[], object] | None = None, cwd: Path | None = None
) -> Done:
    """Run capcon in a fork of this process, which has loaded Python already; `before` is called in the child first."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        pid = os.fork()
        if pid == 0:
            status = 99
            try:
                os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
                os.dup2(out.fileno(), 1)
                os.dup2(err.fileno(), 2)
                sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
                os.chdir(cwd or "/")
                if before:
                    before()
                status = run_main([str(argument) for argument in arguments])
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        for file in (out, err):
            file.seek(0)
        return Done(status, out.read(), err.read())


def become_nobody() -> None:
    """Switch to nobody with the calls of the C library, which also drop all capabilities."""
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)


def mask(*numbers: int) -> str:
    """Return a capability set as /proc/PID/status shows it."""
    return f"{sum(1 << number for number in numbers):016x}"
