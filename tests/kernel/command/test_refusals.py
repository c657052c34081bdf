"""What rcon run refuses, why, and with which remedy and status; and how it names what ended a command."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from rcon_plugins.kernel.cgroup import Cgroup, Hierarchy, Resources, swap
from rcon_plugins.kernel.syscalls import CLONE_NEWNS, unshare
from tests.children import in_child
from tests.directories import let_others_read
from tests.kernel.command.harness import Done, rcon

NOBODY = 65534
BIN = Path(sys.executable).parent
#: In a mount namespace of its own, let /proc/cgroups say that the memory controller was switched off at boot, and take
#: it out of the hierarchies, as the option cgroup_disable=memory does. The kernel of this machine has it.
_WITHOUT_MEMORY = """
set -e
mount --make-rprivate /
awk '$1 == "memory" { $4 = 0 } { print }' OFS='\\t' /proc/cgroups >"$1/cgroups"
mount --bind "$1/cgroups" /proc/cgroups
mounts=$(awk '$3 ~ /^cgroup/ && $4 ~ /(^|,)memory(,|$)/ { print $2 }' /proc/mounts)
for mount in $mounts; do umount --lazy "$mount"; done
file=/sys/fs/cgroup/cgroup.controllers
if [ -e $file ]; then sed 's/ *memory//' $file >"$1/controllers"; mount --bind "$1/controllers" $file; fi
"""
_NO_BOOT = "the kernel was booted with the memory controller switched off"
_BOOT = "boot without cgroup_disable=memory, or with cgroup_enable=memory where the firmware adds that"


def without_memory(folder: Path, *commands: tuple[str | Path, ...]) -> list[Done]:
    """Run commands of rcon, one after another, where the memory controller is switched off."""

    def run() -> list[Done]:
        unshare(CLONE_NEWNS)
        subprocess.run(["sh", "-c", _WITHOUT_MEMORY, "sh", folder], check=True)
        return [rcon(*words) for words in commands]

    return in_child(run, timeout=100)


@pytest.mark.smoke
@pytest.mark.each_layout
def test_a_controller_that_is_switched_off_at_boot(tmp_path: Path) -> None:
    """As on a Raspberry Pi, whose firmware adds cgroup_disable=memory."""
    file, tasks = tmp_path / "rcon.toml", tmp_path / "tasks.toml"
    file.write_text('[policy.a]\nmemory = "64M"\n')
    tasks.write_text('[policy.a]\neach = { memory_soft = "64M" }\n')
    limit, check, check_tasks, policy, doctor, other = without_memory(
        tmp_path,
        ("run", "--memory", "64M", "--", "true"),
        ("check", file),
        ("check", "--server", "celery", tasks),
        ("run", "--policy", "a", "--settings", file, "--", "true"),
        ("doctor", "--json"),
        ("run", "--pids", "9", "--", "true"),
    )
    assert limit.status == 2
    assert limit.err == (
        f"rcon: --memory: cannot be enforced on this machine: {_NO_BOOT} ({_BOOT}; see rcon run --help)\n"
    )
    assert check.status == 1
    assert f"REFUSED: memory: {_NO_BOOT} ({_BOOT})" in check.out
    assert "Delegate=" not in check.out
    assert (check_tasks.status, f"REFUSED: each.memory_soft: {_NO_BOOT} ({_BOOT})" in check_tasks.out) == (
        1,
        True,
    )
    assert (policy.status, _BOOT in policy.err, "Delegate=" in policy.err) == (2, True, False)
    missing = {(one["area"], one["name"]): one["remedy"] for one in json.loads(doctor.out)["missing"]}
    assert missing["machine", "memory"] == _BOOT
    if (
        Hierarchy.discover().layout != "v2"
    ):  # where the mount namespace hides the controller in the root alone
        assert missing["limits", "memory"] == _BOOT
    assert other.status == 0


@pytest.mark.layout("v1", "hybrid")
@pytest.mark.each_layout
@pytest.mark.parametrize("size", ["0", "1G"])
def test_swap_alone_on_v1(size: str) -> None:
    done = rcon("run", "--swap", size, "--", "true")
    reason = "cgroup v1 limits swap only together with memory"
    assert (done.status, done.out) == (2, "")
    assert done.err == (
        f"rcon: --swap: cannot be enforced on this machine: {reason} (add --memory; see rcon run --help)\n"
    )
    if swap.present() and Hierarchy.discover().swap_gap() is not None:
        return  # swap is not accounted for: no remedy of the command line helps
    assert rcon("run", "--swap", "0", "--memory", "64M", "--", "true").status == 0


@pytest.mark.each_layout
def test_too_little_memory() -> None:
    for size in ("0", "4095", "0K"):
        done = rcon("run", "--memory", size, "--", "true")
        assert done.status == 2
        assert done.err == (
            f"rcon: --memory: {size} is less than a page of memory "
            "(a command needs some MiB: for example 256M; see rcon run --help)\n"
        )
    done = rcon("run", "--memory", "4K", "--", "true")
    if done.status == 137:  # this kernel makes the cgroups, and kills the command
        assert done.err.startswith("rcon: memory limit 4 KiB reached (peak ")
    else:
        assert done.status == done.report["status"] == 2
        assert done.report["outcome"] == "refused"
        assert done.err == (
            "rcon: --memory: 4K is too little to start a command (a command needs some MiB: for example 256M)\n"
        )


@pytest.mark.parametrize("written", ["48m", "0.046875G", "48 MiB"])
def test_sizes_are_read_as_people_write_them(written: str) -> None:
    done = rcon("run", "--memory", written, "--", "dd", "if=/dev/zero", "of=/dev/null", "bs=100M", "count=1")
    assert (done.status, done.err) == (137, "rcon: memory limit 48 MiB reached (peak 48.0 MiB)\n")


@pytest.mark.each_layout
def test_a_share_of_the_memory_is_of_what_rcon_itself_can_use(base: Cgroup) -> None:
    """50% of the machine; in a group of 96 MiB, as in a container, 48 MiB."""
    base.configure(Resources(memory_max=96 << 20))
    command = ["--", "dd", "if=/dev/zero", "of=/dev/null", "bs=200M", "count=1"]
    done = rcon("run", "--memory", "50%", *command, before=lambda: base.attach(os.getpid()))
    assert "memory limit 48 MiB reached" in done.err
    usable = Hierarchy.discover().usable_memory()
    done = rcon("run", "--memory", "50%", "--group", "half", "--", "sh", "-c", _SHOW_LIMIT)
    assert 0 <= usable // 2 - int(done.out) < 65536, done.err


_SHOW_LIMIT = """
v1=$(sed -n 's/^[0-9]*:memory://p' /proc/self/cgroup) v2=$(sed -n 's/^0:://p' /proc/self/cgroup)
cat "/sys/fs/cgroup/memory$v1/../memory.limit_in_bytes" 2>/dev/null || cat "/sys/fs/cgroup$v2/../memory.max"
"""


@pytest.mark.each_layout
def test_a_user_without_a_cgroup_gets_one_short_line() -> None:
    def become_nobody() -> None:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)

    done = rcon("run", "--json", "-", "--pids", "9", "--", "true", before=become_nobody)
    assert done.status == 125
    assert re.fullmatch(
        r"rcon: no cgroup is delegated to this process.* \(rcon doctor shows how to get one\)\n", done.err
    )
    assert len(done.err) < 250
    assert json.loads(done.out)["detail"] == done.err.removeprefix("rcon: ").rstrip()
    done = rcon("doctor", before=become_nobody)
    assert "run once as root" in done.out or "systemctl" in done.out or "Delegate=" in done.out


def test_the_interpreter_that_cannot_be_executed_is_named(tmp_path: Path) -> None:
    let_others_read(tmp_path)
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700)
    (closed / "sh").symlink_to("/bin/sh")
    plain = tmp_path / "plain"
    plain.write_text("")
    denied = "Permission denied (its user must be allowed to execute it, and to enter each folder above it)"
    gone = "No such file or directory (install it, or correct the line that begins with #!)"
    windows = "No such file or directory (the line that begins with #! ends with a carriage return: remove it"
    script = tmp_path / "script"
    for line, status, reason, *user in (
        (closed / "sh", 126, denied, "--user", "nobody"),
        (plain, 126, denied),
        (tmp_path, 126, denied),
        ("/nowhere/python", 127, gone),
        ("/bin/sh\r", 127, windows),
    ):
        script.write_bytes(f"#!{line}\n".encode())
        script.chmod(0o755)
        expected = f"{script}: its interpreter {str(line).rstrip()}: {reason}"
        done = rcon("run", *user, "--", script)
        assert (done.status, done.err[: len(expected) + 6]) == (status, f"rcon: {expected}")
        capcon = [str(BIN / "capcon"), "run", *(user or ["--drop-all"]), "--", str(script)]
        ran = subprocess.run(capcon, capture_output=True, text=True, check=False)
        assert (ran.returncode, ran.stderr) == (status, done.err.replace("rcon: ", "capcon: ", 1))


@pytest.mark.parametrize("options", [[], ["--policy", "web"]], ids=["limits", "policy"])
def test_a_program_that_is_not_there_replaces_the_report_of_an_earlier_run(
    tmp_path: Path, options: list[str]
) -> None:
    settings, report = tmp_path / "rcon.toml", tmp_path / "report.json"
    settings.write_text("[policy.web]\npids = 8\n")
    closed = tmp_path / "closed"
    closed.touch(0o644)
    if options:
        options = [*options, "--settings", str(settings)]
    for program, status in (("/no/such", 127), (str(closed), 126)):
        report.write_text('{"outcome": "ok"}')
        done = rcon("run", *options, "--json", report, "--", program, "word")
        assert done.status == status
        found = json.loads(report.read_text())
        assert found.pop("policy") == ("web" if options else "")
        detail = done.err.removeprefix("rcon: ").rstrip()
        assert found == {
            "outcome": "refused",
            "status": status,
            "detail": detail,
            "command": [program, "word"],
        }


@pytest.mark.parametrize("words", [("rcon", "chek"), ("rcon", "atach"), ("capcon", "explian")], ids=" ".join)
def test_a_misspelled_command_is_suggested(words: tuple[str, str]) -> None:
    """In a process of its own: no other test has loaded the subcommands."""
    meant = {"chek": "check", "atach": "attach", "explian": "explain"}[words[1]]
    done = subprocess.run([str(BIN / words[0]), words[1], "x"], capture_output=True, text=True, check=False)
    message = f"{words[0]}: No such command {words[1]!r} (did you mean {meant!r}? see {words[0]} --help)\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", message)


def test_a_limit_of_cpu_time_ends_a_command_by_name(tmp_path: Path) -> None:
    file = tmp_path / "rcon.toml"
    file.write_text('[policy.short]\nrlimits = { cpu = "1s" }\n')
    detail = "CPU time limit 1s of a process reached (rlimits.cpu, or ulimit -t)"
    busy = ("--", "sh", "-c", "while :; do :; done")
    done = rcon("run", "--policy", "short", "--settings", file, *busy)
    assert (done.status, done.err) == (137, f"rcon: {detail}\n")
    report = {key: done.report[key] for key in ("outcome", "limit", "signal", "detail")}
    assert report == {"outcome": "killed", "limit": "rlimits.cpu", "signal": signal.SIGKILL, "detail": detail}

    done = rcon("run", *busy, before=lambda: resource.setrlimit(resource.RLIMIT_CPU, (1, 1000)))
    assert (done.status, done.err) == (128 + signal.SIGXCPU, f"rcon: {detail}\n")


def test_arguments_that_are_no_utf8_survive_in_json(tmp_path: Path) -> None:
    argument = b"\xff\xfe-\xc3\xa4"
    report = tmp_path / "report.json"
    words = [str(BIN / "rcon"), "run", "--json", str(report), "--", "printf", "%s", os.fsdecode(argument)]
    done = subprocess.run(words, capture_output=True, check=True)
    assert done.stdout == argument
    assert report.read_bytes().isascii()
    assert os.fsencode(json.loads(report.read_text())["command"][2]) == argument
    # A command that is refused, and the explanation of capcon.
    words[-3:] = ["/nowhere/" + os.fsdecode(argument)]
    assert subprocess.run(words, capture_output=True, check=False).returncode == 127
    explain = [str(BIN / "capcon"), "explain", "--json", "--", "/bin/true", os.fsdecode(argument)]
    told = subprocess.run(explain, capture_output=True, check=True).stdout
    assert os.fsencode(json.loads(told)["command"][1]) == argument


def test_a_soft_limit_of_a_policy_is_refused(tmp_path: Path) -> None:
    """Only tasks can receive it. Nothing runs without a limit that its policy names."""
    settings = tmp_path / "rcon.toml"
    settings.write_text('[policy.a]\neach = { timeout = "20s", timeout_soft = "10s" }\n')
    done = rcon("run", "--policy", "a", "--settings", str(settings), "--", "true")
    assert done.status == 2
    assert "each.timeout_soft" in done.err
    assert "only Celery tasks can receive a soft limit (leave it out; each.timeout is enforced" in done.err
