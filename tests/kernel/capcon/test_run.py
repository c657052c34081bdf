"""`capcon run` on the real kernel: the command's user and rights, and that no process is between it and the caller."""

from __future__ import annotations

import json
import os
import shutil
import signal
import stat
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from rcon_plugins.kernel.capability import (
    Capabilities,
    FileCapabilities,
    Identity,
    drop,
    write_file_capabilities,
)
from tests.kernel.capcon.command import NOBODY, become_nobody, capcon, mask
from tests.kernel.capcon.network import free_low_port, local_network

NET_BIND_SERVICE, NET_RAW, KILL = 10, 13, 5
STATUS = ("cat", "/proc/self/status")
SETS = ("CapPrm", "CapEff", "CapInh", "CapAmb", "CapBnd")


@pytest.fixture
def folder() -> Iterator[Path]:
    """Return a folder that every user may enter and change."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o777)
        yield Path(name)


@pytest.mark.smoke
def test_a_web_server_on_a_low_port_as_nobody(everybodys: Path, python: str) -> None:
    """One capability, any user, an ordinary program."""
    with local_network():
        port = free_low_port()
        refused = capcon("run", "--user", "nobody", "--", python, "-c", bind_to(port))
        assert "PermissionError" in refused.err
        arguments = ["run", "--user", "nobody", "--cap", "net_bind_service", "--"]
        server = [python, "-m", "http.server", str(port), "--bind", "127.0.0.1"]
        with tempfile.TemporaryDirectory() as page:
            Path(page).chmod(0o755)
            Path(page, "index.html").write_text("hello")
            process = subprocess.Popen(
                [everybodys / "capcon", *arguments, *server], cwd=page, stderr=subprocess.DEVNULL
            )
            try:
                assert fetch(f"http://127.0.0.1:{port}/") == "hello"
                status = Path(f"/proc/{process.pid}/status").read_text()
                assert f"Uid:{f'{chr(9)}{NOBODY}' * 4}\n" in status
                assert f"CapEff:\t{mask(NET_BIND_SERVICE)}\n" in status
                assert f"CapBnd:\t{mask(NET_BIND_SERVICE)}\n" in status
            finally:
                process.send_signal(signal.SIGTERM)
                assert process.wait() == -signal.SIGTERM


def bind_to(port: int) -> str:
    return f"import socket; socket.socket().bind(('127.0.0.1', {port}))"


def fetch(url: str) -> str:
    deadline = time.monotonic() + 60
    while True:
        try:
            with urllib.request.urlopen(url, timeout=10) as answer:
                return str(answer.read().decode())
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


def test_the_server_on_a_low_port_has_no_other_rights(folder: Path, python: str) -> None:
    secret = folder / "secret"
    secret.write_text("secret")
    secret.chmod(0o640)  # like /etc/shadow, which an emulated machine has without passwords
    attempts = """
import json, os, sys
def attempt(act, *arguments):
    try:
        act(*arguments)
    except OSError as error:
        return type(error).__name__
    return "ok"
print(json.dumps({
    "secret": attempt(open, sys.argv[1]), "shadow": attempt(open, "/etc/shadow"),
    "setuid": attempt(os.setuid, 0), "setresuid": attempt(os.setresuid, 0, 0, 0), "setgid": attempt(os.setgid, 0),
    "setgroups": attempt(os.setgroups, [0]), "chown": attempt(os.chown, sys.argv[1], 65534, 65534),
    "kill": attempt(os.kill, 1, 0), "chroot": attempt(os.chroot, "/"),
    "mknod": attempt(os.mknod, os.path.dirname(sys.argv[1]) + "/device", 0o020666, os.makedev(1, 3)),
}))
"""
    command = ("--user", "nobody", "--cap", "net_bind_service", "--", python, "-c", attempts, secret)
    answers = json.loads(capcon("run", *command).out)
    if Path("/etc/shadow").stat().st_mode & stat.S_IROTH:
        assert answers.pop("shadow") == "ok"
    assert answers == dict.fromkeys(answers, "PermissionError")


@pytest.mark.parametrize(
    ("options", "held"),
    [
        (("--user", "nobody"), ()),
        (("--user", "nobody", "--cap", "net_raw"), (NET_RAW,)),
        (("--user", "65534", "--cap", "CAP_NET_RAW,kill", "--cap", "10"), (KILL, NET_BIND_SERVICE, NET_RAW)),
        (("--user", "root", "--cap", "kill"), (KILL,)),
        (("--cap", "kill"), (KILL,)),
        (("--drop-all",), ()),
    ],
)
def test_the_command_holds_exactly_the_requested_capabilities(
    options: tuple[str, ...], held: tuple[int, ...]
) -> None:
    done = capcon("run", *options, "--", *STATUS)
    assert (done.status, done.err) == (0, "")
    assert {name: done.held[name] for name in SETS} == dict.fromkeys(SETS, mask(*held)), done.out
    uid = str(NOBODY) if options[1:2] in (("nobody",), ("65534",)) else "0"
    assert done.held["Uid"].split() == done.held["Gid"].split() == [uid] * 4
    assert done.held["NoNewPrivs"] == "0"


def test_groups_come_from_the_database_or_the_options() -> None:
    assert capcon("run", "--user", "nobody", "--", *STATUS).held["Groups"] == str(NOBODY)
    named = capcon("run", "--user", "nobody", "--group", "daemon", "--groups", "mail,9", "--", *STATUS).held
    assert (named["Gid"].split(), named["Groups"].split()) == (["1"] * 4, ["8", "9"])
    none = capcon("run", "--user", "4242", "--group", "4243", "--", *STATUS).held
    assert (none["Uid"].split(), none["Gid"].split(), none["Groups"]) == (["4242"] * 4, ["4243"] * 4, "")


def test_without_options_the_state_of_the_caller_stays() -> None:
    names = (*SETS, "Uid", "Gid", "Groups")
    mine = subprocess.run(STATUS, stdout=subprocess.PIPE, text=True, check=True).stdout
    before = {line.partition(":")[0]: line.partition(":")[2].strip() for line in mine.splitlines()}
    after = capcon("run", "--no-new-privs", "--", *STATUS).held
    assert {name: after[name] for name in names} == {name: before[name] for name in names}
    assert after["NoNewPrivs"] == "1"


def hold(*names: str) -> None:
    """Change to nobody with these capabilities, as a login or a service manager would."""
    drop(Identity(NOBODY, NOBODY), Capabilities.of(*names), no_new_privs=False, ambient=True)


def test_a_caller_without_root_can_give_what_it_holds() -> None:
    done = capcon("run", "--cap", "net_raw", "--", *STATUS, before=lambda: hold("cap_net_raw", "cap_kill"))
    assert (done.status, done.err) == (0, "")
    assert done.held["CapEff"] == done.held["CapPrm"] == done.held["CapAmb"] == mask(NET_RAW)
    assert done.held["CapBnd"] == mask(KILL, NET_RAW)  # reducing it needs CAP_SETPCAP
    own = capcon("run", "--user", "nobody", "--groups", "", "--", *STATUS, before=become_nobody)
    assert (own.status, own.err, own.held["CapPrm"]) == (0, "", mask())


@pytest.mark.parametrize(
    ("options", "names"),
    [
        (("--user", "daemon"), "setuid"),
        (("--user", "nobody", "--groups", "mail"), "setgid"),
        (("--cap", "net_admin"), "cap_net_admin"),
    ],
)
def test_rights_that_the_caller_cannot_give_are_refused_in_one_line(
    options: tuple[str, ...], names: str
) -> None:
    done = capcon("run", *options, "--", "echo", "ran", before=lambda: hold("cap_net_raw"))
    assert (done.status, done.out) == (125, "")
    assert done.err.startswith("capcon: ")
    assert done.err.count("\n") == 1
    assert names in done.err.lower()


def test_the_exit_status_and_signal_are_those_of_the_command() -> None:
    run = ("run", "--user", "nobody", "--")
    assert capcon(*run, "sh", "-c", "exit 42").status == 42
    assert capcon(*run, "sh", "-c", "kill -TERM $$").status == -signal.SIGTERM
    assert capcon(*run, "sh", "-c", "kill -PIPE $$; exit 1").status == -signal.SIGPIPE  # Python ignores it


def test_the_command_takes_the_place_of_capcon() -> None:
    done = capcon("run", "--user", "nobody", "--", "sh", "-c", "echo $$ $PPID")
    pid, parent = done.out.split()
    assert int(parent) == os.getpid()
    assert int(pid) != os.getpid()


def test_missing_and_not_executable_commands(folder: Path) -> None:
    plain, lost, foreign, closed = (folder / name for name in ("plain", "lost", "foreign", "closed"))
    plain.write_text("#!/bin/sh\n")
    lost.write_text("#!/nowhere/sh\n")
    foreign.write_text("no program")
    closed.write_text("#!/bin/sh\n")
    lost.chmod(0o755)
    foreign.chmod(0o755)
    closed.chmod(0o700)
    expected = {
        "no-such-command": 127,
        "/no/such/command": 127,
        str(lost): 127,
        str(plain): 126,
        str(folder): 126,
        str(foreign): 126,
        str(closed): 126,
    }
    for command, status in expected.items():
        done = capcon("run", "--user", "nobody", "--", command)
        assert (done.status, done.out, done.err.count("\n")) == (status, "", 1), (command, done)
        assert command in done.err


def test_the_environment_changes_only_for_the_account(everybodys: Path, python: str) -> None:
    """This holds in the C locale, too, where Python adds LC_CTYPE to its own environment."""
    given = {"PATH": os.environ["PATH"], "HOME": "/root", "USER": "root", "MAIL": "x", "LANG": "C"}
    account = {"HOME": "/nonexistent", "USER": "nobody", "LOGNAME": "nobody", "SHELL": "/usr/sbin/nologin"}
    nameless = {name: value for name, value in given.items() if name != "USER"}
    cases = [
        (["--user", "nobody"], given | account),
        (["--user", "4242", "--group", "0"], nameless | {"HOME": "/"}),
        (["--user", "nobody", "--keep-env"], given),
    ]
    # Fork one interpreter, because starting interpreters takes most of the time.
    script = """
import json, os, sys
sys.path.insert(0, sys.argv[1])
from rcon_plugins.cli.capcon.commands import run_main
for options in json.loads(sys.argv[2]):
    pid = os.fork()
    if pid == 0:
        os._exit(run_main(["run", *options, "--", "env", "-0"]))
    os.waitpid(pid, 0)
    os.write(1, b"\\n")
"""
    asked = json.dumps([options for options, _ in cases])
    printed = subprocess.run(
        [python, "-BIc", script, everybodys / "lib", asked],
        env=given,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    ).stdout
    environments = [
        dict(pair.split("=", 1) for pair in line.split("\0")[:-1]) for line in printed.splitlines()
    ]
    assert environments == [expected for _, expected in cases]


def test_setuid_programs_and_no_new_privs(folder: Path) -> None:
    program = folder / "id"
    shutil.copy(shutil.which("id") or "", program)
    program.chmod(stat.S_ISUID | 0o755)
    done = capcon("run", "--user", "nobody", "--no-new-privs", "--", program, "-u")
    assert (done.status, done.out, done.err) == (0, f"{NOBODY}\n", "")
    done = capcon("run", "--user", "nobody", "--cap", "net_raw", "--", program, "-u")
    assert (done.status, done.out) == (0, "0\n")
    assert "capcon: warning: " in done.err
    assert "uid 0" in done.err


def test_file_capabilities_that_clear_the_ambient_set_are_warned_about(folder: Path) -> None:
    program = folder / "cat"
    shutil.copy(shutil.which("cat") or "", program)
    program.chmod(0o755)
    its_own = FileCapabilities(Capabilities.of("cap_kill"), Capabilities.none(), True, None)
    write_file_capabilities(str(program), its_own)
    attribute = os.getxattr(program, "security.capability")
    done = capcon("run", "--user", "nobody", "--cap", "net_raw,kill", "--", program, "/proc/self/status")
    assert done.held["CapEff"] == mask(KILL)
    assert done.err.count("\n") == 1
    assert "cap_net_raw" in done.err
    assert os.getxattr(program, "security.capability") == attribute


def test_layers_without_privilege_only_lose_rights(folder: Path, everybodys: Path) -> None:
    """The layers are an ordinary user, a job of that user, and a helper of the job."""
    for name in ("work", "work/inner", "other"):
        (folder / name).mkdir()
        (folder / name).chmod(0o777)
    write_three = "for d in work work/inner other; do echo x > $d/$1 && echo $d; done 2>/dev/null; :"
    capcon_again = f"{everybodys}/capcon run --no-new-privs --read-only / --write work/inner --write other --"
    outer = ("run", "--drop-all", "--no-new-privs", "--read-only", "/", "--write", "./work", "--")
    command = f"({write_three}); set -- second; {capcon_again} sh -c '{write_three}' sh second"
    done = capcon(*outer, "sh", "-c", command, "sh", "first", before=become_nobody, cwd=folder)
    assert (done.status, done.err) == (0, "")
    assert done.out.split() == ["work", "work/inner", "work/inner"]
    assert (folder / "work/inner/second").exists()


def test_unnamed_files_cannot_be_read_nor_executed(folder: Path) -> None:
    (folder / "secret").write_text("secret")
    run = ("run", "--drop-all", "--no-new-privs")
    system = [part for path in ("/usr", "/bin", "/lib", "/lib64") for part in ("--read-only", path)]
    done = capcon(*run, *system, "--", "cat", folder / "secret", before=become_nobody)
    assert (done.status, done.out) == (1, "")
    assert "Permission denied" in done.err
    done = capcon(*run, "--write", folder, "--", "true", before=become_nobody)
    assert done.status == 126
    assert "--read-only" in done.err
    done = capcon(*run, "--read-only", "/nowhere", "--", "true", before=become_nobody)
    assert (done.status, done.err.count("\n")) == (125, 1)
    assert "/nowhere" in done.err
