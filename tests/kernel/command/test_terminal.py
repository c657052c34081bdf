"""rcon run on a terminal: keys, the shell's job control, and programs with job control work as without rcon."""

from __future__ import annotations

import os
import signal

import pytest

from tests.kernel.command.harness import terminal

COUNT = "trap 'echo got-{0}' {0}; echo ready; for i in 1 2 3 4 5 6 7 8 9 10; do sleep 0.1; done; echo done; exit 4"


@pytest.mark.smoke
def test_ctrl_c_reaches_the_command_once_and_not_rcon() -> None:
    with terminal("run", "--", "bash", "-c", COUNT.format("INT")) as tty:
        tty.wait_for("ready")
        tty.type("\x03")
        shown = tty.wait_for("done")
        assert shown.count("got-INT") == 1
        assert tty.event() == "ended 4"


def test_ctrl_c_ends_a_command_without_a_handler() -> None:
    with terminal("run", "--", "sh", "-c", "echo ready; exec sleep 1000") as tty:
        tty.wait_for("ready")
        tty.type("\x03")
        assert tty.event() == f"ended -{signal.SIGINT:d}"


def test_ctrl_z_stops_and_fg_resumes_both() -> None:
    with terminal("run", "--", "bash", "-c", "echo ready; read line; echo heard $line; exit 5") as tty:
        tty.wait_for("ready")
        for _ in range(2):
            tty.type("\x1a")
            assert tty.event() == f"stopped {signal.SIGTSTP:d}"
            tty.foreground()
        tty.type("news\n")
        tty.wait_for("heard news")
        assert tty.event() == "ended 5"


def test_a_signal_to_the_whole_job_arrives_once() -> None:
    with terminal("run", "--", "bash", "-c", COUNT.format("TERM")) as tty:
        tty.wait_for("ready")
        os.killpg(tty.job, signal.SIGTERM)
        assert tty.wait_for("done").count("got-TERM") == 1
        assert tty.event() == "ended 4"


def test_a_signal_to_rcon_alone_arrives_once() -> None:
    with terminal("run", "--", "bash", "-c", COUNT.format("TERM")) as tty:
        tty.wait_for("ready")
        os.kill(tty.job, signal.SIGTERM)
        assert tty.wait_for("done").count("got-TERM") == 1
        assert tty.event() == "ended 4"


def test_the_command_is_in_the_foreground() -> None:
    script = "read -r a b c d group e f front rest < /proc/$$/stat; echo ready $((group - front)) $group"
    with terminal("run", "--", "bash", "-c", script) as tty:
        assert tty.wait_for("\r\n").split() == ["ready", "0", str(tty.job)]
        assert tty.event() == "ended 0"


def test_a_shell_as_command_has_job_control() -> None:
    with terminal("run", "--", "bash", "--norc", "--noprofile", "-i") as tty:
        tty.type("PS1=; set +o emacs; echo is $((6*7))\n")
        tty.wait_for("is 42")
        tty.type("sh -c 'echo jo\\b; exec sleep 1000'\n")
        tty.wait_for("job")
        tty.type("\x1a")
        tty.wait_for("Stopped")
        tty.type("kill %1; fg; echo in\\side\n")
        tty.wait_for("inside")
        tty.type("suspend\n")
        assert tty.event() == f"stopped {signal.SIGSTOP:d}"
        tty.foreground()
        tty.type("echo a\\gain\n")
        tty.wait_for("again")
        tty.type("exit 6\n")
        assert tty.event() == "ended 6"


def test_a_pager_reads_its_keys_in_a_pipeline() -> None:
    """The command stays in the process group of the job, so that the rest of the job keeps the terminal, too."""
    with terminal("run", "--", "sh", "-c", "seq 3 | sh -c 'cat; read key < /dev/tty; echo key $key'") as tty:
        tty.wait_for("3")
        tty.type("q\n")
        tty.wait_for("key q")
        assert tty.event() == "ended 0"


def test_messages_of_rcon_do_not_stop_it_with_tostop() -> None:
    with terminal("run", "--timeout", "1s", "--", "sh", "-c", "stty tostop; sleep 1000") as tty:
        tty.wait_for("limit 1 s reached")
        assert tty.event() == "ended 137"
