"""rcon run: limits hold from the first instruction, all processes end with the command, and the outcome is reported."""

from __future__ import annotations

import errno
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from rcon_plugins.errors import MORE_PROCESSES
from rcon_plugins.kernel.cgroup import Cgroup, Resources
from tests.commands import become_rcon
from tests.kernel.cgroup.helpers import DISK
from tests.kernel.command.harness import ALLOCATE, MOUNTS, left_by, rcon, until
from tests.processes import alive

NOBODY = 65534
#: rcon as a program of its own, not a fork of this process.
RCON = str(Path(sys.executable).parent / "rcon")
BUSY = 61077
#: The shell of the fork bomb stays long enough for it to reach the limit, or cannot fork a sleep.
FORK_BOMB = "b() { b | b & }; b; for i in 1 2 3 4 5; do sleep 1; done; exit 1"


@pytest.mark.smoke
@pytest.mark.each_layout
def test_the_command_is_confined_before_its_first_instruction() -> None:
    done = rcon("run", "--memory", "64M", "--pids", "9", "--group", "first", "--", "cat", "/proc/self/cgroup")
    assert done.status == 0
    assert done.err == ""
    paths = [line for line in done.out.splitlines() if "/work/first/main" in line]
    assert paths
    assert done.report["outcome"] == "ok"
    assert done.report["group"] == "first"
    assert done.report["command"] == ["cat", "/proc/self/cgroup"]
    assert done.report["usage"]["memory_peak"] > 0
    assert done.report["usage"]["cpu_seconds"] > 0


@pytest.mark.parametrize(
    ("command", "status", "said"),
    [
        (["true"], 0, ""),
        (["sh", "-c", "exit 3"], 3, ""),
        (["sh", "-c", "kill -TERM $$"], 128 + signal.SIGTERM, "rcon: sh: ended by SIGTERM (Terminated)\n"),
        (["sh", "-c", "kill -PIPE $$"], 128 + signal.SIGPIPE, ""),
        (["sh", "-c", "kill -INT $$"], -signal.SIGINT, ""),
    ],
)
def test_the_exit_status_is_that_of_the_command(command: list[str], status: int, said: str) -> None:
    done = rcon("run", "--", *command)
    assert (done.status, done.err) == (status, said)
    assert done.report["outcome"] == ("ok" if status == 0 else "error" if status == 3 else "killed")


@pytest.mark.each_layout
def test_a_memory_limit_kills_and_is_reported() -> None:
    done = rcon("run", "--memory", "64M", "--swap", "0", "--", *ALLOCATE.format(200).split())
    assert done.status == 137
    assert done.err == "rcon: memory limit 64 MiB reached (peak 64.0 MiB)\n"
    assert done.report["outcome"] == "memory"
    assert done.report["limit"] == "memory"
    assert done.report["signal"] == signal.SIGKILL
    assert done.report["usage"]["memory_peak"] == 64 << 20


def test_a_memory_limit_below_a_mebibyte_is_reported_as_people_write_it() -> None:
    done = rcon("run", "--memory", "100K", "--", "true")
    assert (done.status, done.err) == (137, "rcon: memory limit 100 KiB reached (peak 100.0 KiB)\n")


def test_the_largest_resident_set_leaves_out_the_page_cache(tmp_path: Path) -> None:
    """Of processes that their parents and rcon reaped; null where rcon itself had more before it executed the command.

    rcon is executed, not forked from this large process: the kernel keeps the peak through execve(2).
    """
    file = DISK / f"rcon-run-{os.getpid()}"
    write = f"dd if=/dev/zero of={file} bs=1M count=100 status=none; cat {file} > /dev/null; rm {file}"
    orphan = f"(setsid {ALLOCATE.format(60)} &); sleep 3"
    for script, least, most in (
        (f"{write}; {ALLOCATE.format(50)}", 50, 90),
        (orphan, 60, 90),
        ("true", None, 0),
    ):
        report = tmp_path / "report.json"
        words = [RCON, "run", "--json", str(report), "--", "sh", "-c", script]
        assert subprocess.run(words, check=False).returncode == 0
        usage = json.loads(report.read_text())["usage"]
        if least is None:
            assert usage["rss_peak"] is None
        else:
            assert least << 20 <= usage["rss_peak"] <= most << 20
        if "count=100" in script:
            assert usage["memory_peak"] is None or usage["memory_peak"] > 100 << 20


@pytest.mark.each_layout
def test_a_fork_bomb_stops() -> None:
    done = rcon("run", "--pids", "8", "--timeout", "20s", "--", "sh", "-c", FORK_BOMB)
    assert done.status != 0
    assert done.report["outcome"] in ("pids", "timeout")
    assert done.err.splitlines()[-1] in (
        "rcon: pids limit 8 reached: no more processes or threads could be started",
        "rcon: wall time limit 20 s reached",
    )


@pytest.mark.once
@pytest.mark.each_layout
def test_a_signal_after_a_limit_hit_is_reported_as_the_signal() -> None:
    script = "(sleep 0 | sleep 0 | sleep 0 | sleep 0) 2>/dev/null; kill -TERM $$"
    done = rcon("run", "--pids", "3", "--", "sh", "-c", script)
    assert (done.status, done.report["outcome"], done.report["limit"]) == (143, "killed", None)
    assert done.err.splitlines()[-1] == "rcon: sh: ended by SIGTERM (Terminated)"


def write_directly(target: Path, size: int, *limits: str | Path) -> float:
    """Return the rate at which dd writes past the page cache, in MiB per second, by its own clock."""
    done = rcon(
        *("run", *limits, "--", "env", "LC_ALL=C", "dd", "if=/dev/zero", f"of={target}"),
        *("bs=1M", f"count={size}", "oflag=direct"),
    )
    assert done.status == 0, done.err
    seconds = re.search(r"copied, ([0-9.]+) s", done.err)
    assert seconds, done.err
    return size / float(seconds[1])


@pytest.mark.measures(each_layout=True)
def test_writes_reach_the_limit_and_stay_below_it() -> None:
    size, limit = 20, 5
    target = DISK / f"rcon-run-{os.getpid()}"
    try:
        for _ in range(3):
            rate = write_directly(target, size, "--write", f"{limit}M", "--device", DISK)
            print(f"{rate:.2f} MiB/s under {limit}")
            assert rate <= limit * 1.1
            if rate >= limit * 0.9:
                return
        # It was too slow three times. If the disk is as slow without the limit, this proves nothing about the limit.
        free = write_directly(target, size)
        assert free < limit * 2, f"{rate:.2f} MiB/s under {limit}, {free:.2f} without"
    finally:
        target.unlink(missing_ok=True)


@pytest.mark.each_layout
def test_a_timeout_kills_the_command_and_its_descendants(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    script = (
        f"setsid sh -c 'echo $$ >> {pids}; exec sleep 1000' & (sh -c 'echo $$ >> {pids}; exec sleep 1000' &) ;"
        "sleep 1000"
    )
    began = time.monotonic()
    done = rcon("run", "--timeout", "5s", "--", "sh", "-c", script)
    assert time.monotonic() - began >= 5
    assert done.status == 137
    assert done.err == "rcon: wall time limit 5 s reached\n"
    assert done.report["outcome"] == "timeout"
    numbers = pids.read_text().split()
    assert len(numbers) == 2
    assert not any(alive(int(number)) for number in numbers)


@pytest.mark.each_layout
def test_a_timeout_kills_a_stopped_command(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    script = f"setsid sh -c 'echo $$ > {pid}; exec sleep 1000' & until [ -s {pid} ]; do sleep 0.1; done; kill -STOP $$"
    done = rcon("run", "--timeout", "5s", "--", "sh", "-c", script)
    assert (done.status, done.report["outcome"]) == (137, "timeout")
    assert not alive(int(pid.read_text()))


def test_the_exit_status_with_sigchld_ignored() -> None:
    def ignore() -> None:
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)

    status = ("grep", "SigIgn", "/proc/self/status")
    ignored = int(subprocess.run(status, capture_output=True, check=True).stdout.split()[1], 16)
    ignored &= ~(1 << (signal.SIGHUP - 1))  # under nohup; `rcon` sets it to its default
    done = rcon("run", "--", *status, before=ignore)
    assert done.status == 0
    assert int(done.out.split()[1], 16) == ignored | 1 << (signal.SIGCHLD - 1)
    assert rcon("run", "--", "sh", "-c", "exit 3", before=ignore).status == 3


def test_the_report_does_not_take_a_closed_standard_stream() -> None:
    done = rcon("run", "--timeout", "100ms", "--", "sleep", "1000", before=lambda: os.close(2))
    assert (done.status, done.err, done.report["outcome"]) == (137, "", "timeout")


@pytest.mark.each_layout
def test_background_processes_end_with_the_command(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    done = rcon(
        "run",
        "--",
        "sh",
        "-c",
        f"setsid sh -c 'echo $$ > {pid}; exec sleep 1000' & until [ -s {pid} ]; do sleep 0.1; done",
    )
    assert done.status == 0
    assert not alive(int(pid.read_text()))


def test_the_command_gets_the_environment_and_open_files(tmp_path: Path) -> None:
    extra = tmp_path / "extra"

    def before() -> None:
        descriptor = os.open(extra, os.O_WRONLY | os.O_CREAT)
        os.dup2(descriptor, 9, inheritable=True)

    done = rcon("run", "--", "sh", "-c", "echo nine >&9; ls -l /proc/$$/fd", before=before)
    assert extra.read_text() == "nine\n"
    assert "9 -> " in done.out
    assert "cgroup" not in done.out


@pytest.mark.each_layout
@pytest.mark.parametrize(
    ("limits", "number"),
    [
        (("--cpu", "50%"), 1),
        (("--cpu", "150%"), 2),
        (("--cpu", "101%", "--cpus", "0"), 1),
        (("--cpus", "0-1"), 2),
        (("--cpu", "6400%"), len(os.sched_getaffinity(0))),
    ],
)
def test_the_number_of_cpus_is_exported(limits: tuple[str, ...], number: int) -> None:
    script = "echo $PYTHON_CPU_COUNT $OMP_NUM_THREADS; nproc"
    done = rcon("run", "--export-cpus", *limits, "--", "sh", "-c", script)
    assert done.out == f"{number} {number}\n{number}\n"


def test_the_number_of_cpus_is_not_exported_over_one_that_is_set(tmp_path: Path) -> None:
    """Nor without the option, nor without a limit; a policy's limits count."""
    script = ["sh", "-c", "echo $PYTHON_CPU_COUNT,$OMP_NUM_THREADS"]
    assert rcon("run", "--cpu", "50%", "--", *script).out == ",\n"
    direct = subprocess.run(
        [RCON, "run", "--export-cpus", "--cpu", "50%", "--", *script],
        env={**os.environ, "OMP_NUM_THREADS": "7"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert direct.stdout == "1,7\n"
    done = rcon("run", "--export-cpus", "--memory", "64M", "--", *script)
    assert done.status == 2
    assert done.err.startswith(
        "rcon: --export-cpus needs a limit that leaves some of the CPUs (add --cpu 150% "
    )
    settings = tmp_path / "rcon.toml"
    settings.write_text('[policy.batch]\ncpu = "150%"\neach = { cpu = "50%" }\n')
    words = ("run", "--export-cpus", "--policy", "batch", "--settings", settings, "--")
    assert rcon(*words, *script).out == "1,1\n"


def test_another_user(tmp_path: Path) -> None:
    done = rcon(
        "run",
        "--user",
        "nobody",
        "--cap",
        "net_raw",
        "--",
        "sh",
        "-c",
        "id -u; grep CapEff /proc/$$/status; pwd",
    )
    assert done.status == 0, done.err
    uid, effective, _ = done.out.splitlines()
    assert uid == str(NOBODY)
    assert int(effective.split()[1], 16) == 1 << 13


@pytest.mark.each_layout
def test_where_no_process_can_be_made_nothing_runs(group: Cgroup) -> None:
    group.configure(Resources(pids_max=1))
    done = rcon("run", "--", "true", before=group.enter_process)
    refusal = f"rcon: fork: Resource temporarily unavailable ({MORE_PROCESSES})\n"
    assert (done.status, done.err) == (125, refusal)


def test_where_descriptors_are_out_the_message_names_the_limit() -> None:
    """Each limit from the fewest descriptors to enough: some call fails, or the command runs."""

    def leave(number: int) -> None:
        used = {int(entry.name) for entry in Path("/proc/self/fd").iterdir()}
        free = [descriptor for descriptor in range(1024) if descriptor not in used]
        resource.setrlimit(resource.RLIMIT_NOFILE, (free[number], free[number]))

    for number in range(40):
        done = rcon("run", "--memory", "64M", "--", "true", before=partial(leave, number))
        if done.status == 0:
            break
        (line,) = done.err.splitlines()
        assert (done.status, "Too many open files (" in line, "`ulimit -n`" in line) == (125, True, True), (
            line
        )
    assert 5 < number < 39


@pytest.mark.parametrize(
    ("content", "status", "said"),
    [
        (
            "#!/no/such/interpreter\n",
            127,
            "its interpreter /no/such/interpreter: No such file or directory (install it, or correct the line",
        ),
        (
            "\x7fELF",
            126,
            "Exec format error (it is no program for this machine, or a script whose first line",
        ),
    ],
)
def test_a_file_that_execve_refuses(content: str, status: int, said: str, tmp_path: Path) -> None:
    program = tmp_path / "program"
    program.write_text(content)
    program.chmod(0o755)
    done = rcon("run", "--", program)
    assert (done.status, done.err.count("\n")) == (status, 1)
    assert done.err.startswith(f"rcon: {program}: {said} ")
    assert (done.report["outcome"], done.report["status"]) == ("refused", status)


def test_a_program_that_the_user_cannot_execute(tmp_path: Path) -> None:
    program = tmp_path / "program"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o700)
    code = "from rcon_plugins.cli.start import main; main()"  # with no module loaded yet, as from a shell
    words = [sys.executable, "-c", code, "run", "--user", "nobody", "--", str(program)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    remedy = "its user must be allowed to execute it, and to enter each folder above it"
    assert (done.returncode, done.stderr) == (126, f"rcon: {program}: Permission denied ({remedy})\n")


@pytest.mark.each_layout
def test_a_user_can_make_cgroups_inside_but_not_change_limits() -> None:
    script = """
    for line in $(cat /proc/self/cgroup); do
        path=${line#*:*:}; names=${line#*:}; names=${names%%:*}
        for mount in "/sys/fs/cgroup/$names" /sys/fs/cgroup /sys/fs/cgroup/unified; do
            here="$mount$path"
            case "$path" in */work/*) ;; *) continue;; esac
            [ -d "$here" ] || continue
            group="${here%/main}"
            [ -w "$group/memory.max" ] && echo "limit $group"
            [ -w "$group/memory.limit_in_bytes" ] && echo "limit $group"
            [ -w "$group/cpu.max" ] && echo "limit $group"
            [ -w "$group/cgroup.kill" ] && echo "kill $group"
            mkdir "$group/inner" && rmdir "$group/inner" && echo made
        done
    done
    """
    done = rcon("run", "--memory", "64M", "--user", "nobody", "--", "sh", "-c", script)
    assert done.status == 0, done.err
    assert set(done.out.split()) == {"made"}


@pytest.mark.layout("hybrid", "v1")
def test_io_limits_hold_in_a_cgroup_that_the_user_made() -> None:
    """On v1 the IO limits of a cgroup do not hold for the cgroups in it."""
    script = (
        "p=/sys/fs/cgroup/blkio$(grep blkio: /proc/self/cgroup | cut -d: -f3); mkdir $p/free || echo kept"
    )
    done = rcon("run", "--write", "5M", "--device", DISK, "--user", "nobody", "--", "sh", "-c", script)
    assert done.out == "kept\n", done


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_to_rcon_reaches_the_command_and_removes_the_group(
    number: signal.Signals, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    name = number.name.removeprefix("SIG")
    words = [
        "run",
        "--",
        "sh",
        "-c",
        f"trap 'echo got; exit 7' {name}; echo ready; while :; do sleep 0.05; done",
    ]
    pid = os.fork()
    if pid == 0:
        become_rcon(words, [out, tmp_path / "err"])
    until(lambda: out.exists() and "ready" in out.read_text(), "the command runs")
    os.kill(pid, number)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
    assert left_by(pid) == []
    assert out.read_text() == "ready\ngot\n"


@pytest.mark.each_layout
def test_the_command_dies_with_rcon_and_the_next_run_cleans_up(tmp_path: Path, base: Cgroup) -> None:
    """In a base of its own: any other server or command that starts in that of root cleans up there."""
    out = tmp_path / "out"
    script = "sh -c 'echo child $$; exec sleep 1000' & echo command $$; wait"
    pid = os.fork()
    if pid == 0:
        become_rcon(
            ["run", "--cgroup", base.path, "--pids", "7", "--group", "orphans", "--", "sh", "-c", script],
            [out, tmp_path / "err"],
        )
    until(lambda: out.exists() and out.read_text().count("\n") == 2, "the command runs")
    pids = dict(line.split() for line in out.read_text().splitlines() if " " in line)
    child, command = int(pids["child"]), int(pids["command"])
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    until(lambda: not alive(command), "the command dies with rcon")
    assert alive(child)
    groups = {line.split(":", 2)[2] for line in Path("/proc", str(child), "cgroup").read_text().splitlines()}
    (group,) = (Path(group.lstrip("/")) for group in groups if group.endswith("/work/orphans/main"))
    limits = [mount / group.parent / "pids.max" for mount in (MOUNTS, MOUNTS / "pids")]
    assert [path.read_text().strip() for path in limits if path.exists()] == ["7"]
    assert rcon("run", "--cgroup", base.path, "--", "true").status == 0
    until(lambda: not alive(child), "the next run ends what is left")
    assert base.children() == []


def test_a_pipe_closes_when_the_command_closes_it() -> None:
    """rcon does not keep standard input or output open while the command runs."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        os.dup2(writing, 1)
        os.close(writing)
        become_rcon(["run", "--", "sh", "-c", "exec >&-; read line < /dev/null; sleep 1000"], [])
    os.close(writing)
    assert os.read(reading, 10) == b""  # immediately, while the command still sleeps
    os.close(reading)
    os.kill(pid, signal.SIGTERM)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 128 + signal.SIGTERM


def test_a_policy_of_a_settings_file(tmp_path: Path) -> None:
    settings = tmp_path / "rcon.toml"
    settings.write_text(
        '[policy.job]\nuser = "nobody"\nmemory = "64M"\ncapabilities = ["net_raw"]\numask = "027"\n'
        'rlimits = { nofile = 777 }\neach = { timeout = "30s", pids = 9 }\nmin_uid = 100\nmin_gid = 100\n'
    )
    script = "id -u; umask; ulimit -n; grep -E 'CapEff|NoNewPrivs' /proc/$$/status; cat /proc/self/cgroup"
    done = rcon(
        "run", "--policy", "job", "--settings", settings, "--group", "by-policy", "--", "sh", "-c", script
    )
    assert done.status == 0, done.err
    uid, umask, files, effective, privileges, *where = done.out.splitlines()
    assert (uid, umask, files) == (str(NOBODY), "0027", "777")
    assert int(effective.split()[1], 16) == 1 << 13
    assert privileges.split()[1] == "1"
    assert any("/work/by-policy/main" in line for line in where)
    assert done.report["policy"] == "job"


def test_a_user_at_its_nproc_limit_cannot_run_a_command(tmp_path: Path) -> None:
    """The kernel checks RLIMIT_NPROC when the uid changes, and execve fails. So the limit must be set before that."""
    settings = tmp_path / "rcon.toml"
    settings.write_text(f"[policy.job]\nuser = {BUSY}\ngroup = {BUSY}\nrlimits = {{ nproc = 0 }}\n")
    with subprocess.Popen(["sleep", "1000"], user=BUSY) as other:
        done = rcon("run", "--policy", "job", "--settings", settings, "--", "true")
        other.kill()
    assert done.status == 126
    assert os.strerror(errno.EAGAIN) in done.err


@pytest.mark.parametrize(
    ("policy", "said"),
    [
        ('user = "no-such-user"', "policy.job.user: there is no user 'no-such-user' (create it: useradd"),
        ('cpus = "4000"', "policy.job.cpus: cannot be enforced on this machine: CPUs 4000 do not exist"),
        ('io."/no/such" = { read = "1M" }', "policy.job.io./no/such: cannot be enforced on this machine: "),
        ('each = { io."/no/such" = { read = "1M" } }', "policy.job.each.io./no/such: cannot be enforced"),
        ("isolation = { a = 1 }", "policy.job.isolation: { a = 1 } is refused"),
    ],
)
def test_a_policy_that_cannot_be_enforced_is_named_with_file_and_key(
    tmp_path: Path, policy: str, said: str
) -> None:
    settings = tmp_path / "rcon.toml"
    settings.write_text(f"[policy.job]\n{policy}\n")
    done = rcon("run", "--policy", "job", "--settings", settings, "--", "true")
    assert done.status == 2
    assert f"{settings}: {said}" in done.err
    assert (done.err.count("\n"), done.err[-2:]) == (1, ")\n")


@pytest.mark.once
@pytest.mark.each_layout
def test_options_override_limits_of_a_policy(tmp_path: Path) -> None:
    settings = tmp_path / "rcon.toml"
    settings.write_text('[policy.job]\nmemory = "1G"\neach = { timeout = "100s" }\n')
    done = rcon(
        *("run", "--policy", "job", "--settings", settings, "--memory", "32M", "--swap", "0"),
        *("--", *ALLOCATE.format(100).split()),
    )
    assert done.err == "rcon: memory limit 32 MiB reached (peak 32.0 MiB)\n"
    assert (done.status, done.report["outcome"]) == (137, "memory")


def test_a_limit_of_a_policy_is_reported_in_one_line(tmp_path: Path) -> None:
    settings = tmp_path / "rcon.toml"
    settings.write_text('[policy.job]\neach = { timeout = "100ms" }\n')
    code = "from rcon_plugins.cli.start import main; main()"  # as from a shell: no log handler is set up
    words = ["run", "--policy", "job", "--settings", str(settings), "--", "sleep", "1000"]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (137, "rcon: wall time limit 0.1 s reached\n")
