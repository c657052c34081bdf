"""A process as another may know it."""

from __future__ import annotations

import os
import subprocess
import sys

from rcon_plugins.tree.presence import Presence

TOLD = "from rcon_plugins.tree.presence import Presence; print(*Presence.here(), flush=True); input()"


def test_this_process_is_here() -> None:
    here = Presence.here()
    assert here.pid == os.getpid()
    assert not here.has_gone()


def test_a_process_that_ended_has_gone() -> None:
    command = [sys.executable, "-c", TOLD]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        system, pid, started = process.stdout.readline().split()
        told = Presence(system, int(pid), int(started))
        assert told.system == Presence.here().system
        assert not told.has_gone()
        # A later one of the same number is another; and of another machine nothing is known.
        assert told._replace(started=told.started - 1).has_gone()
        elsewhere = told._replace(system="elsewhere", started=0)
        process.communicate("\n")
    assert told.has_gone()
    assert not elsewhere.has_gone()
