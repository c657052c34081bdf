"""What an executor process with a user of its own gets of the server's files, and where its output goes."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import logging.handlers
import mmap
import os
import re
import resource
import socket
import stat
import time
from pathlib import Path
from typing import Any

import pytest

from rcon_plugins.errors import ConfinementError
from rcon_plugins.executors import output
from tests.directories import let_others_read
from tests.kernel.cgroup.helpers import running
from tests.kernel.executors.service import ask, begin, end, managing, soon

TENANT = 61001
POLICY: dict[str, Any] = {"user": TENANT, "group": TENANT, "groups": [], "per": "host"}
HOST = "a.example"


class Server:
    """Standard output and error of this process while the block runs: a file and a stream socket, as under systemd."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "stdout"
        self.path.write_text("a line of the server\n")
        self._ours, self._theirs = socket.socketpair()
        self._kept: list[int] = []

    def __enter__(self) -> Server:
        self._kept = [os.dup(1), os.dup(2)]
        with self.path.open("r+b") as file:
            os.dup2(file.fileno(), 1)
        os.dup2(self._theirs.fileno(), 2)
        self._theirs.close()
        return self

    def __exit__(self, *_: object) -> None:
        for number, kept in enumerate(self._kept, 1):
            os.dup2(kept, number)
            os.close(kept)

    def log(self) -> str:
        """What was written to standard error, and is not read yet."""
        self._ours.setblocking(False)
        found = b""
        while True:
            try:
                piece = self._ours.recv(65536)
            except BlockingIOError:
                return found.decode()
            if not piece:
                return found.decode()
            found += piece


def descriptors() -> dict[str, str]:
    """The open files of this process."""
    found = {}
    for entry in list(Path("/proc/self/fd").iterdir()):
        with contextlib.suppress(FileNotFoundError):
            found[entry.name] = str(entry.readlink())
    return found


def tenant_lines(text: str, key: str = HOST) -> list[str]:
    prefix = f"[p {key}] "
    return [line.removeprefix(prefix) for line in text.splitlines() if line.startswith(prefix)]


@pytest.mark.smoke
def test_each_line_of_output_has_the_policy_and_the_key(capfd: pytest.CaptureFixture[str]) -> None:
    with managing(POLICY) as manager:
        ask(manager, "say", "plain\n[p b.example] forged\n", 1, host=HOST)
        ask(manager, "say", "ends the terminal \x1b[2J\r\x9b\u202e\ttab é\r\n", 2, host=HOST)
        ask(manager, "say", "without an end", 2, host="B.example")
    found = capfd.readouterr()
    assert found.out == ""
    assert tenant_lines(found.err) == [
        "plain",
        "[p b.example] forged",
        "ends the terminal \\x1b[2J\\r\\x9b\\u202e\ttab é",
    ]
    assert tenant_lines(found.err, "B.example") == ["without an end"]


def test_the_server_keeps_its_standard_output_and_error(in_child: Any, tmp_path: Path) -> None:
    def try_it() -> tuple[dict[str, list[str]], str, list[str]]:
        with Server(tmp_path) as server, managing(POLICY) as manager:
            flags = fcntl.fcntl(1, fcntl.F_GETFL), fcntl.fcntl(2, fcntl.F_GETFL)
            harm, _ = ask(manager, "harm_files", host=HOST)
            assert os.write(2, b"alive\n")
            assert (fcntl.fcntl(1, fcntl.F_GETFL), fcntl.fcntl(2, fcntl.F_GETFL)) == flags
            assert os.lseek(1, 0, os.SEEK_CUR) == 0
            manager.close()
            return harm, server.path.read_text(), server.log().splitlines()

    harm, written, log = in_child(try_it)
    by_number = {name.split()[0]: (name.split()[1], acts) for name, acts in harm.items()}
    assert by_number["1"][0] == by_number["2"][0]
    assert by_number["1"][0].startswith("pipe:")
    assert not {"read", "open again", "truncate", "shutdown"} & set(by_number["1"][1])
    assert written == "a line of the server\n"
    assert "alive" in log
    assert f"[p {HOST}] written" in log
    assert {line for line in log if "[" not in line} == {"alive"}


def test_files_opened_when_the_application_was_loaded_stay_as_they_are(in_child: Any, tmp_path: Path) -> None:
    (tmp_path / "data").write_text("0123456789")
    (tmp_path / "directory").mkdir()
    let_others_read(tmp_path)
    flags = {
        "writes": os.O_WRONLY | os.O_CREAT,
        "updates": os.O_RDWR | os.O_CREAT,
        "log": os.O_WRONLY | os.O_APPEND | os.O_CREAT,
        "read back": os.O_RDWR | os.O_APPEND | os.O_CREAT,
        "data": os.O_RDONLY,
        "directory": os.O_RDONLY,
    }

    def state(name: str, file: int) -> object:
        """All that an executor could have changed."""
        path = tmp_path / name
        with Path("/proc/locks").open() as locks:
            locked = f":{path.stat().st_ino} " in locks.read()
        content = "" if path.is_dir() else path.read_text()
        place = 0 if path.is_dir() else os.lseek(file, 0, os.SEEK_CUR)
        return content, stat.S_IMODE(path.stat().st_mode), place, fcntl.fcntl(file, fcntl.F_GETFL), locked

    def try_it() -> None:
        files = {name: os.open(tmp_path / name, flag, 0o600) for name, flag in flags.items()}
        memory = os.memfd_create("ours")
        os.write(memory, b"in memory")
        for name, file in files.items():
            if flags[name] & os.O_ACCMODE != os.O_RDONLY:
                os.write(file, b"ours\n")
            fcntl.flock(file, fcntl.LOCK_SH)
        os.read(files["data"], 3)
        before = {name: state(name, file) for name, file in files.items()}
        with managing(POLICY) as manager:
            rest, _ = ask(manager, "read_file", files["data"], host=HOST)
            harm, _ = ask(manager, "harm_files", host=HOST)
            assert rest == "3456789"  # from where the server was
            assert {name: state(name, file) for name, file in files.items()} == before
            assert os.pread(memory, 20, 0) == b"in memory"
            targets = {name.split()[1] for name in harm}
            assert {name for name in flags if str(tmp_path / name) in targets} == {"data", "directory"}

    in_child(try_it)


@pytest.mark.parametrize("how", ["mapped", "deleted", "read-only", "memfd", "named"])
def test_mapped_files_stay_as_they_are(in_child: Any, tmp_path: Path, how: str) -> None:
    def try_it() -> tuple[bytes, bytes, Any]:
        path = tmp_path / "mapped"
        path.write_bytes(b"ours" + bytes(8188))
        file = os.memfd_create("ours") if how == "memfd" else os.open(path, os.O_RDWR)
        os.ftruncate(file, 8192)
        os.pwrite(file, b"ours", 4096)
        protection = mmap.PROT_READ if how == "read-only" else mmap.PROT_READ | mmap.PROT_WRITE
        memory = mmap.mmap(file, 4096, prot=protection, offset=4096)
        if how == "deleted":
            path.unlink()
        keep = {"keep_files": [str(tmp_path)]} if how == "named" else {}
        start = next(
            int(line.split("-")[0], 16)
            for line in Path("/proc/self/maps").read_text().splitlines()
            if " rw-s 00001000 " in line or " r--s 00001000 " in line
        )
        with managing({**POLICY, **keep}) as manager:
            answer, _ = ask(manager, "write_memory", start, "theirs", host=HOST)
        return bytes(memory[:6]), os.pread(file, 6, 4096), answer

    mapped, read, answer = in_child(try_it)
    assert answer == ["ours", "theirs"]
    assert mapped == read == (b"theirs" if how == "named" else b"ours\0\0")


def test_loggers_with_files_write_to_the_pipe(in_child: Any, tmp_path: Path) -> None:
    def try_it() -> tuple[list[str], dict[str, str]]:
        def path(name: str) -> str:
            return str(tmp_path / name)

        handlers = {
            "file": logging.FileHandler(path("file")),
            "overwrite": logging.FileHandler(path("overwrite"), mode="w"),
            "rotates": logging.handlers.RotatingFileHandler(path("rotates"), maxBytes=20, backupCount=2),
            "daily": logging.handlers.TimedRotatingFileHandler(path("daily"), when="S"),
            "watched": logging.handlers.WatchedFileHandler(path("watched")),
            "behind": logging.handlers.MemoryHandler(1, target=logging.FileHandler(path("behind"))),
            "stream": logging.StreamHandler(Path(path("stream")).open("w")),  # noqa: SIM115 - stays open
        }
        for name, handler in handlers.items():
            logger = logging.getLogger(name)
            logger.propagate = False
            logger.addHandler(handler)
            logger.warning("ours")
        with Server(tmp_path) as server:
            with managing(POLICY) as manager:
                time.sleep(1.1)  # `daily` is due
                ask(manager, "tell_loggers", *handlers, host=HOST)
            log = server.log()
        for name in handlers:
            logging.getLogger(name).warning("ours again")
        return tenant_lines(log), {name: Path(path(name)).read_text() for name in handlers}

    log, files = in_child(try_it)
    assert log == [f"told {name}" for name in files]
    assert {name for name, text in files.items() if "told" in text} == set()
    assert all(text.endswith("ours again\n") for text in files.values())


def test_a_policy_may_name_files_that_stay(in_child: Any, tmp_path: Path) -> None:
    def try_it() -> tuple[str, str, list[str]]:
        (tmp_path / "logs").mkdir()
        file = os.open(tmp_path / "named", os.O_WRONLY | os.O_CREAT, 0o600)
        below = os.open(tmp_path / "logs" / "below", os.O_WRONLY | os.O_CREAT, 0o600)
        other = os.open(tmp_path / "named too", os.O_WRONLY | os.O_CREAT, 0o600)
        keep = ["stdout", str(tmp_path / "named"), f"{tmp_path}/logs/"]
        with Server(tmp_path) as server:
            with managing({**POLICY, "keep_files": keep}) as manager:
                for number in (1, 2, file, below):
                    assert ask(manager, "say", f"to {number}\n", number, host=HOST)[1].ending == "ok"
                answer, _ = ask(manager, "say", "x", other, host=HOST)
                assert "EPIPE" in answer or "BrokenPipe" in answer
            log = tenant_lines(server.log())
        assert (tmp_path / "logs" / "below").read_text() == f"to {below}\n"
        return server.path.read_text(), (tmp_path / "named").read_text(), log

    written, named, log = in_child(try_it)
    assert written.startswith("to 1\n")
    assert re.fullmatch(r"to \d+\n", named)
    assert log == ["to 2"]


@pytest.mark.parametrize("policy", [{"each": {"timeout": "20s"}}, {"user": "root", "allow_root": True}])
def test_code_with_the_users_server_keeps_the_servers_files(
    capfd: pytest.CaptureFixture[str], policy: dict[str, Any]
) -> None:
    with managing(policy) as manager:
        ask(manager, "say", "as it is\n")
    assert "as it is\n" in capfd.readouterr().err.splitlines(keepends=True)


def test_the_last_words_of_an_executor_are_read(capfd: pytest.CaptureFixture[str]) -> None:
    """As much as a pipe holds, written just before the end: many times, because it is a race."""
    line = "x" * 99 + "\n"
    with managing(POLICY) as manager:
        for number in range(20):
            answer, outcome = ask(manager, "say_and_die", line, 600, host=f"{number}.example")
            assert (answer, outcome.ending) == (None, "killed")
            ask(manager, "say", "and the last line", 2, host=f"{number}.example")
    text = capfd.readouterr().err
    for number in range(20):
        assert tenant_lines(text, f"{number}.example") == ["x" * 99] * 600 + ["and the last line"]


def test_lines_of_children_that_stay_are_read(capfd: pytest.CaptureFixture[str]) -> None:
    with managing({**POLICY, "leave_children": True}) as manager:
        ask(manager, "speak_from_a_child", 0.3, "later\n", host=HOST)
        assert soon(lambda: "later" in tenant_lines(capfd.readouterr().err))


def test_a_request_that_the_server_refuses_for_want_of_descriptors_leaks_none(in_child: Any) -> None:
    def try_it() -> None:
        with managing(POLICY) as manager:
            ask(manager, "pid", host=HOST)
            before = len(descriptors())
            soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
            for spare in range(12):
                resource.setrlimit(resource.RLIMIT_NOFILE, (before + spare, hard))
                with contextlib.suppress(ConfinementError):
                    end(begin(manager, "pid", host="b.example"))
                resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            assert ask(manager, "pid", host=HOST)[1].ending == "ok"
            manager._pool.forget("p~b.example")
            assert soon(lambda: len(descriptors()) <= before)

    in_child(try_it)


def test_pipes_are_closed_with_their_executors() -> None:
    with managing({**POLICY, "max_uses": 1}, settings={"processes": 4}) as manager:

        def pipes() -> int:
            return sum(target.startswith("pipe:") for target in descriptors().values())

        before = pipes()
        for number in range(40):
            ask(manager, "say", "x\n", host=f"{number}.example")
        assert soon(lambda: pipes() <= before + 8)
    assert soon(lambda: pipes() <= before)


#: Floods by name, two at once. They take ten seconds: with less, the burst at their start would be most of the cost.
FLOODS = [{"lines": "x" * 79 + "\n", "escapes": "\u200b" * 25 + "\n"}]
if "RCON_TEST_LONG" in os.environ:
    FLOODS += [{"empty lines": "\n" * 65536, "no end": "no end" * 10_000}, {"controls": "\x1b" * 79 + "\n"}]
FLOOD_SECONDS = 10.0


@pytest.mark.measures
@pytest.mark.parametrize("texts", FLOODS, ids=" and ".join)
def test_a_flood_costs_the_server_little_and_each_line_is_logged_or_counted(
    tmp_path: Path, texts: dict[str, str]
) -> None:
    def try_it(name: str) -> tuple[int, float, str]:
        path = tmp_path / name
        log = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.dup2(log, 2)
        with managing(POLICY) as manager:
            ask(manager, "pid", host=HOST)
            before = time.process_time()
            times, outcome = ask(manager, "flood", texts[name], FLOOD_SECONDS, host=HOST)
            used = time.process_time() - before
            assert outcome.ending == "ok"
        return times, used, path.read_text()

    with contextlib.ExitStack() as stack:
        servers = {name: stack.enter_context(running(None, try_it, name)) for name in texts}
        for name, server in servers.items():
            times, used, log = server.result()
            assert_costs_little(texts[name], times, used)
            assert_logged_or_counted(texts[name], times, log)


def assert_costs_little(text: str, times: int, used: float) -> None:
    rate = times * len(text) / FLOOD_SECONDS / 2**20
    print(f"{used / FLOOD_SECONDS:.2%} of a CPU of the server; {rate:.2f} MiB/s")
    assert used <= 0.01 * FLOOD_SECONDS


def assert_logged_or_counted(text: str, times: int, log: str) -> None:
    lines = tenant_lines(log)
    notices = [re.fullmatch(r"… ([\d,]+) lines? dropped", line) for line in lines]
    dropped = sum(int(notice[1].replace(",", "")) for notice in notices if notice)
    assert dropped
    if text.endswith("\n"):
        assert sum(not notice for notice in notices) + dropped == times * text.count("\n")
    assert len(log) <= output.BURST + output.RATE * (FLOOD_SECONDS + 5)
