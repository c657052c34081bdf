"""`capcon explain` and `capcon show` agree with the kernel."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rcon_plugins.kernel.capability import Capabilities, FileCapabilities, write_file_capabilities
from tests.kernel.capcon.command import Done, become_nobody, capcon

FIELDS = {
    "permitted": "CapPrm",
    "effective": "CapEff",
    "inheritable": "CapInh",
    "ambient": "CapAmb",
    "bounding": "CapBnd",
}
CASES = {
    "nobody": ("--user", "nobody"),
    "one capability": ("--user", "nobody", "--cap", "net_raw"),
    "three, and no_new_privs": ("--user", "nobody", "--cap", "net_raw,kill,chown", "--no-new-privs"),
    "root with one": ("--user", "root", "--cap", "kill"),
    "nothing said": (),
}
PROGRAMS = ("plain", "script", "setuid", "setgid", "with file capabilities", "that take nothing")
AS_ASKED = {"plain", "script"}


@pytest.fixture(scope="module")
def programs() -> Iterator[Path]:
    """Return `cat` in all forms that execve(2) treats differently."""
    cat = shutil.which("cat") or ""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        for program in PROGRAMS:
            shutil.copy(cat, folder / program)
            (folder / program).chmod(0o755)
        (folder / "script").write_text(f"#!{folder}/plain\n")
        os.chown(folder / "setgid", 0, 8)
        (folder / "setuid").chmod(stat.S_ISUID | 0o755)
        (folder / "setgid").chmod(stat.S_ISGID | 0o755)
        none = Capabilities.none()
        its_own = FileCapabilities(Capabilities.of("cap_kill"), none, True, None)
        write_file_capabilities(str(folder / "with file capabilities"), its_own)
        write_file_capabilities(str(folder / "that take nothing"), FileCapabilities(none, none, False, None))
        yield folder


def held(done: Done) -> dict[str, Any]:
    """Return the fields of /proc/self/status, with the names used in JSON."""
    fields = done.held
    ids = ("real", "effective", "saved", "fs")
    sets = {name: list(Capabilities(int(fields[field], 16)).names()) for name, field in FIELDS.items()}
    return {
        "uid": dict(zip(ids, map(int, fields["Uid"].split()), strict=True)),
        "gid": dict(zip(ids, map(int, fields["Gid"].split()), strict=True)),
        "groups": [int(group) for group in fields["Groups"].split()],
        "no_new_privs": fields["NoNewPrivs"] == "1",
        **sets,
    }


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("case", CASES)
def test_explain_predicts_the_rights_of_the_command(programs: Path, case: str, program: str) -> None:
    options, path = CASES[case], programs / program
    explained = capcon("explain", "--json", *options, "--", path, "/proc/self/status")
    ran = capcon("run", *options, "--", path, "/proc/self/status")
    predicted = json.loads(explained.out)
    if predicted["error"]:
        assert (explained.status, ran.status, ran.out) == (1, 126, "")
        assert predicted["error"] == "EPERM"
        return
    after = {name: value for name, value in predicted["after"].items() if name != "securebits"}
    assert after == held(ran), (explained, ran)
    changed = {name for name in after if after[name] != predicted["before"][name]}
    assert predicted["steps"] or not changed
    assert explained.status == (0 if predicted["as_requested"] else 1)
    assert bool(ran.err) == (explained.status == 1)  # run warns about the same problem
    if program in AS_ASKED:
        assert predicted["as_requested"], predicted


@pytest.mark.smoke
def test_explain_says_which_capabilities_are_lost_and_why(programs: Path) -> None:
    options = ("--user", "nobody", "--cap", "net_raw")
    done = capcon("explain", *options, "--", programs / "that take nothing")
    assert done.status == 1
    words = " ".join(done.out.split())
    assert "lost cap_net_raw" in words
    assert "gained none" in words
    assert "no the command will not hold cap_net_raw" in words
    assert "the ambient set is cleared" in words
    done = capcon("explain", *options, "--", programs / "with file capabilities")
    assert done.status == 1
    assert "no the command cannot be executed with these rights" in " ".join(done.out.split())
    done = capcon("explain", *options, "--", programs / "plain")
    assert done.status == 0
    assert "yes the command will hold what was requested" in " ".join(done.out.split())


def test_explain_says_what_the_user_may_not_execute(tmp_path: Path) -> None:
    """The user may not execute the program, or the interpreter of a script."""
    cat = tmp_path / "cat"
    shutil.copy(shutil.which("cat") or "", cat)
    cat.chmod(0o700)
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        script = Path(name, "script")
        script.write_text(f"#!{cat}\n")
        script.chmod(0o755)
        remedy = "its user must be allowed to execute it, and to enter each folder above it"
        for program in (cat, script):
            done = capcon("explain", "--json", "--user", "nobody", "--", program)
            assert done.status == 1
            assert json.loads(done.out)["problems"] == [f"the command cannot be executed: {cat}: {remedy}"]
            assert capcon("run", "--user", "nobody", "--", program).status == 126
        may_read_all = ("--user", "nobody", "--cap", "dac_override,dac_read_search")
        for program in (cat, script):
            assert capcon("explain", *may_read_all, "--", program).status == 0
        assert capcon("run", *may_read_all, "--", script).out == script.read_text()


def test_explain_says_what_the_caller_may_not_give() -> None:
    options = ("--user", "daemon", "--cap", "net_raw", "--", "true")
    done = capcon("explain", *options, before=become_nobody)
    assert done.status == 1
    assert "the command cannot be run with these rights" in " ".join(done.out.split())
    data = json.loads(capcon("explain", "--json", *options, before=become_nobody).out)
    assert (data["as_requested"], data["requested"]["capabilities"]) == (False, ["cap_net_raw"])
    assert len(data["problems"]) == 1


def test_explain_names_the_files() -> None:
    files = ("--no-new-privs", "--read-only", "/", "--write")
    done = capcon("explain", *files, "/tmp", "--", "true")
    assert done.status == 0
    assert "writes below /tmp" in " ".join(done.out.split())
    done = capcon("explain", *files, "/nowhere", "--", "true")
    assert done.status == 1
    assert "/nowhere: there is no such file" in " ".join(done.out.split())


def test_show_of_another_process_in_json_and_as_a_table() -> None:
    sleeper = subprocess.Popen(["sleep", "600"], user=65534, group=65534, extra_groups=[8])
    try:
        status = Path(f"/proc/{sleeper.pid}/status").read_text()
        data = json.loads(capcon("show", "--json", str(sleeper.pid)).out)
        table = capcon("show", str(sleeper.pid)).out
    finally:
        sleeper.kill()
        sleeper.wait()
    assert data.pop("securebits") is None
    assert data == held(Done(0, status, ""))
    assert "uid           65534 (nobody)\n" in table
    assert "groups        8 (mail)\n" in table
    assert "effective     none\n" in table


def test_show_without_a_pid_shows_the_rights_from_the_shell() -> None:
    done = capcon("show", "--json", before=become_nobody)
    data = json.loads(done.out)
    assert (data["permitted"], data["uid"]["fs"], data["groups"], data["securebits"]) == ([], 65534, [], [])


def test_show_refuses_a_missing_process() -> None:
    last = int(Path("/proc/sys/kernel/pid_max").read_text())
    done = capcon("show", str(last + 1))
    assert (done.status, done.out, done.err.count("\n")) == (125, "", 1)
    assert str(last + 1) in done.err
