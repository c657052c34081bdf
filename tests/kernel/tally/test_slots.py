"""The files of the tally: written by one process each, taken over by the next, and read while they change."""

from __future__ import annotations

import ctypes
import errno
import faulthandler
import fcntl
import mmap
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rcon_plugins.errors import KernelError
from rcon_plugins.kernel import proc, syscalls
from rcon_plugins.kernel.process import open_files
from rcon_plugins.kernel.shared_words import WORD_SIZE, SharedWords
from rcon_plugins.outcome import Outcome
from rcon_plugins.tally.layout import (
    ENDINGS,
    REFUSALS,
    Column,
    Header,
    Name,
    name_of,
    pack_name,
    record_at,
    sequence_at,
    unpack_name,
    words_of,
)
from rcon_plugins.tally.reader import Counts, TallyOfServer, read_directory
from rcon_plugins.tally.writer import Tally
from rcon_plugins.work import Usage
from tests.children import ChildDied, in_child
from tests.processes import PATIENCE

ROOT = Path(__file__).resolve().parents[3]
OK = Outcome(ending="ok", usage=Usage(wall_seconds=0.5, cpu_seconds=0.25, memory_peak=4096, oom_kills=0))


def read(directory: Path) -> TallyOfServer:
    found = read_directory(str(directory))
    assert found is not None
    return found


def counted(directory: Path, policy: str = "p", key: str | None = "k") -> Counts:
    found = read(directory).of(policy, key)
    assert found is not None
    return found


def work(tally: Tally, times: int = 1, outcome: Outcome = OK, key: str | None = "k") -> None:
    for _ in range(times):
        record = tally.record("p", key)
        tally.begin(record)
        tally.end(record, outcome)


@pytest.mark.smoke
def test_what_is_counted_is_read_by_another_process(tmp_path: Path) -> None:
    tally = Tally.take(str(tmp_path))
    try:
        record = tally.record("p", "k")
        for ending in ENDINGS:
            tally.begin(record)
            tally.end(record, Outcome(ending=ending, usage=OK.usage))
        tally.begin(record)
        for reason in REFUSALS:
            tally.refuse(record, reason)
        tally.spawn(record)
        tally.evict(record)
        tally.evict_executor(record)
        tally.evict_executor(record)
        for _ in range(3):
            tally.replace_for_memory(record)
        found = in_child(counted, tmp_path)
    finally:
        tally.close()
    assert found == Counts(
        begun=9,
        endings=dict.fromkeys(ENDINGS, 1),
        refusals=dict.fromkeys(REFUSALS, 1),
        evictions=1,
        executor_evictions=2,
        spawns=1,
        memory_replacements=3,
        wall_seconds=4.0,
        cpu_seconds=2.0,
        memory_peak=4096,
        memory_peak_sum=8 * 4096,
        oom_kills=0,
    )
    assert found.under_way == 1
    assert (tmp_path / "0").stat().st_mode & 0o777 == 0o640


def test_what_was_never_measured_is_unknown_not_zero(tmp_path: Path) -> None:
    tally = Tally.take(str(tmp_path))
    work(tally, outcome=Outcome(ending="ok", usage=Usage(wall_seconds=1.0)))
    found = counted(tmp_path)
    tally.close()
    assert (found.cpu_seconds, found.memory_peak, found.oom_kills) == (None, None, None)
    assert counted(tmp_path, "p", "other") == Counts()


def test_processes_at_one_time_have_a_slot_each_and_are_added_up(tmp_path: Path) -> None:
    first, second = Tally.take(str(tmp_path)), Tally.take(str(tmp_path))
    work(first, 2)
    work(second, 3)
    assert read(tmp_path).processes == 2
    assert counted(tmp_path).begun == 5
    first.close()
    third = Tally.take(str(tmp_path))
    work(third)
    assert sorted(one.name for one in tmp_path.iterdir()) == ["0", "1"]
    assert counted(tmp_path).endings["ok"] == 6
    second.close()
    third.close()


def die_at_work(directory: Path) -> None:
    tally = Tally.take(str(directory))
    work(tally, 3)
    tally.begin(tally.record("p", "k"))
    tally.begin(tally.record("p", "k"))
    os.kill(os.getpid(), signal.SIGKILL)


def test_the_next_process_counts_on_and_says_what_was_lost(tmp_path: Path) -> None:
    for round_ in range(1, 4):
        with pytest.raises(ChildDied):
            in_child(die_at_work, tmp_path)
        found = counted(tmp_path)
        assert (found.begun, found.endings["ok"]) == (5 * round_, 3 * round_)
        assert (found.lost, found.under_way) == (2 * round_, 0)  # a reader sees that its owner is dead
    tally = Tally.take(str(tmp_path))
    work(tally)
    found = counted(tmp_path)
    tally.close()
    assert [one.name for one in tmp_path.iterdir()] == ["0"]
    assert (found.begun, found.lost, found.endings["ok"], found.under_way) == (16, 6, 10, 0)


def test_whether_work_is_lost_is_unknown_where_its_owner_cannot_be_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tally = Tally.take(str(tmp_path))
    work(tally, 3)
    monkeypatch.setattr("rcon_plugins.kernel.proc.is_alive", lambda *_: None)
    assert (counted(tmp_path).lost, counted(tmp_path).under_way) == (0, 0)
    tally.begin(tally.record("p", "k"))
    found = counted(tmp_path)
    assert (found.begun, found.lost, found.under_way) == (4, None, None)
    assert (found + Counts(begun=1)).lost is None
    assert found.to_data()["lost"] is None
    monkeypatch.undo()
    assert (counted(tmp_path).lost, counted(tmp_path).under_way) == (0, 1)
    tally.close()


#: Process 1 of a PID namespace begins a unit of work in the directory of an instance with its name, and waits.
IN_A_NAMESPACE = """
import os, sys
from rcon_plugins.tally.writer import Tally
from rcon_plugins.tree.owner import Owner
directory = f"{sys.argv[1]}/{Owner.here().instance_name}"
os.mkdir(directory)
tally = Tally.take(directory)
tally.begin(tally.record("p", "k"))
print(directory, flush=True)
sys.stdin.readline()
os._exit(0)
"""


def test_whether_a_server_in_another_pid_namespace_lives_is_seen(tmp_path: Path) -> None:
    command = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc", sys.executable, "-c"]
    with subprocess.Popen(
        [*command, IN_A_NAMESPACE, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as server:
        assert server.stdout is not None
        directory = Path(server.stdout.readline().strip())
        found = counted(directory)
        server.communicate("end\n")
    assert (found.begun, found.lost, found.under_way) == (1, 0, 1)
    found = counted(directory)
    assert (found.begun, found.lost) in ((1, 1), (1, None))  # None: our namespace does not see all others


def die_in_the_middle(directory: Path) -> None:
    tally = Tally.take(str(directory))
    record = tally.record("p", "k")
    with tally._writing(record.index) as at:
        tally._words[at + Column.BEGUN] += 1
        os.kill(os.getpid(), signal.SIGKILL)


def test_what_a_dead_process_left_in_the_middle_is_taken_and_counted(tmp_path: Path) -> None:
    with pytest.raises(ChildDied):
        in_child(die_in_the_middle, tmp_path)
    began = time.monotonic()
    assert (read(tmp_path).torn, read(tmp_path).unsettled, counted(tmp_path).begun) == (1, 0, 1)
    assert time.monotonic() - began < 2
    Tally.take(str(tmp_path)).close()
    assert (read(tmp_path).torn, counted(tmp_path).begun, counted(tmp_path).lost) == (1, 1, 1)


def write_without_pause(directory: Path, until: Callable[[], bool]) -> int:
    tally = Tally.take(str(directory), records=8)
    number = 0
    while not until():
        number += 1
        record = tally.record("p", str(number % 40))  # more keys than records: they are folded all the time
        tally.begin(record)
        tally.end(record, OK)
    tally.close()
    return number


def test_a_reader_beside_a_writer_never_sees_a_mixture(tmp_path: Path) -> None:
    """Each unit adds 0.5 s of wall time and 4096 bytes. Keys are folded all the time; the sums never fall."""
    stop = tmp_path / "stop"
    directory = tmp_path / "tally"
    directory.mkdir()
    done: list[int] = []
    writer = threading.Thread(
        target=lambda: done.append(in_child(write_without_pause, directory, stop.exists))
    )
    writer.start()
    try:
        last = reads = 0
        began = time.monotonic()
        while (waited := time.monotonic() - began) < 3 or (reads <= 20 and waited < PATIENCE):
            found = read_directory(str(directory))
            if found is None or found.unsettled:
                continue
            reads += 1
            for one in found.counts.values():
                ended = one.endings["ok"]
                assert one.wall_seconds == ended * 0.5
                assert (one.memory_peak_sum or 0) == ended * 4096
            total = sum(one.begun for one in found.counts.values())
            assert total >= last
            assert total - sum(one.endings["ok"] for one in found.counts.values()) in (0, 1)
            last = total
    finally:
        stop.touch()
        writer.join()
    assert reads > 20
    assert sum(one.begun for one in read(directory).counts.values()) == done[0] > 1000


def test_the_least_used_keys_are_folded_and_nothing_is_lost(tmp_path: Path) -> None:
    tally = Tally.take(str(tmp_path), records=10)
    work(tally, 50, key="busy")
    under_way = tally.record("p", "under way")
    tally.begin(under_way)
    for number in range(100):
        work(tally, key=f"k{number}")
    tally.end(under_way, OK)
    work(tally, key=None)
    found = read(tmp_path)
    tally.close()
    assert len(found.counts) <= 10
    assert (tmp_path / "0").stat().st_size == words_of(10) * WORD_SIZE
    assert counted(tmp_path, key="busy").begun == 50
    assert found.of("p", "k0") is None  # unknown: it is among the others
    assert found.of("p", None) == counted(tmp_path, key=None)
    assert counted(tmp_path, key=None).begun == 1
    total = Counts()
    for one in found.counts.values():
        total += one
    assert (total.begun, total.endings["ok"], total.under_way) == (152, 152, 0)

    again = Tally.take(str(tmp_path), records=10)  # knows the others again
    work(again, key="busy")
    for number in range(100):
        work(again, key=f"n{number}")
    again.close()
    assert sum(one.begun for one in read(tmp_path).counts.values()) == 253
    assert len([one for one in read(tmp_path).counts if one.kind == "other" and one.policy == "p"]) == 1


def test_threads_count_each_unit_once(tmp_path: Path) -> None:
    tally = Tally.take(str(tmp_path), records=20)

    def count(number: int) -> None:
        for turn in range(2000):
            work(tally, key=str((number + turn) % 30))

    threads = [threading.Thread(target=count, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    counts = read(tmp_path).counts.values()
    tally.close()
    assert sum(one.begun for one in counts) == sum(one.endings["ok"] for one in counts) == 8000


GEVENT = """
from gevent import monkey; monkey.patch_all()
import gevent, sys, threading
from rcon_plugins.outcome import Outcome
from rcon_plugins.tally.writer import Tally
from rcon_plugins.work import Usage

sys.setswitchinterval(1e-6)
tally = Tally.take(sys.argv[1], records=20)
outcome = Outcome(ending="ok", usage=Usage(wall_seconds=0.5, memory_peak=4096))
threads = set()

def count(number, rest):
    threads.add(gevent.get_hub().thread_ident)
    for turn in range(3000):
        record = tally.record("p", str((number + turn) % 30))
        tally.begin(record)
        rest()
        tally.end(record, outcome)

pool = gevent.get_hub().threadpool
native = [pool.spawn(count, number, lambda: None) for number in range(4)]
greenlets = [gevent.spawn(count, number, lambda: gevent.sleep(0)) for number in range(4)]
gevent.joinall(greenlets, raise_error=True)
for one in native:
    one.get()
tally.close()
print(len(threads))
"""


def test_greenlets_and_native_threads_of_gevent_count_each_unit_once(tmp_path: Path) -> None:
    """gevent replaces locks: they must exclude its native threads, too, and greenlets that switch in between."""
    done = subprocess.run(
        [sys.executable, "-c", GEVENT, str(tmp_path)], capture_output=True, text=True, timeout=100, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == 5
    counts = read(tmp_path).counts.values()
    assert sum(one.begun for one in counts) == sum(one.endings["ok"] for one in counts) == 8 * 3000
    assert sum(one.wall_seconds for one in counts) == 8 * 3000 * 0.5


def test_a_signal_handler_may_count_in_the_middle_of_an_update(tmp_path: Path) -> None:
    tally = Tally.take(str(tmp_path))
    done = [0]

    def handler(*_: object) -> None:
        done[0] += 1
        work(tally)

    before = signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)
    try:
        deadline = time.monotonic() + 1
        own = 0
        while time.monotonic() < deadline:
            work(tally)
            own += 1
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    record = tally.record("p", "k")
    assert tally._words[record.sequence] % 2 == 0
    found = counted(tmp_path)
    tally.close()
    assert done[0] > 10
    # An update of the handler may fall between the read and the write of the one that it interrupted.
    assert found.begun >= own


def test_an_exception_in_the_middle_leaves_no_odd_sequence(tmp_path: Path) -> None:
    """As by SoftTimeLimitExceeded of Celery, or SystemExit of a signal handler of gunicorn."""
    tally = Tally.take(str(tmp_path))
    record = tally.record("p", "k")
    with pytest.raises(TypeError):
        tally.end(record, Outcome(ending="ok", usage=Usage(wall_seconds=1.0, memory_peak="x")))  # type: ignore[arg-type]
    assert tally._words[record.sequence] % 2 == 0
    work(tally)
    assert counted(tmp_path).begun == 1
    tally.close()


def test_a_full_file_system_refuses_a_slot_and_ends_nobody(tmp_path: Path) -> None:
    """Memory that a mapping has only on paper would end the server at its first use (SIGBUS)."""
    resource_limit = 4096

    def take_with_little_room() -> int | None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource_limit, resource_limit))
        try:
            Tally.take(str(tmp_path))
        except KernelError as error:
            return error.errno
        return None

    assert in_child(take_with_little_room) == errno.EFBIG
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", [b"", b"x" * 100, b"\0" * 512, b"x" * 1_000_000])
def test_a_reader_refuses_what_is_no_tally(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "0").write_bytes(content)
    (tmp_path / "notes").write_text("not a slot")
    assert read_directory(str(tmp_path)) is None
    os.mkfifo(tmp_path / "1")
    (tmp_path / "2").symlink_to("/etc/passwd")
    assert read_directory(str(tmp_path)) is None
    assert read_directory(str(tmp_path / "missing")) is None


def test_a_process_leaves_files_of_another_format_alone(tmp_path: Path) -> None:
    (tmp_path / "0").write_bytes(b"x" * 1000)
    Tally.take(str(tmp_path), records=10).close()
    other = Tally.take(str(tmp_path), records=20)
    assert sorted(one.name for one in tmp_path.iterdir()) == ["0", "1", "2"]
    assert (tmp_path / "0").read_bytes() == b"x" * 1000
    other.close()


@pytest.mark.parametrize(
    ("policy", "key"),
    [("p", None), ("p", ""), ("p", "a.example"), ("p" * 63, "ü" * 128), ("", None), ("p", "\udcff")],
)
def test_names_come_back(policy: str, key: str | None) -> None:
    name = name_of(policy, key)
    assert unpack_name(pack_name(name)) == name


def test_long_keys_stay_apart() -> None:
    names = {unpack_name(pack_name(name_of("p", "ü" * 200 + end))) for end in "ab"}
    assert len(names) == 2
    assert unpack_name(bytes(len(pack_name(Name("p"))))) is None


# -- what a fork has of it


def what_a_fork_sees(tally: Tally, path: str) -> dict[str, Any]:
    """In a fork: no mapping, no descriptor; counting and closing change nothing; memory at its place stays."""
    slot = tally._slot
    assert slot is not None
    address, size = slot._address, slot._size
    maps = Path("/proc/self/maps").read_text()
    descriptors = [str(one.path) for one in open_files()]
    # Something of this process lies at the same place now, as it would after a large allocation.
    at = syscalls.map_memory(
        address, size, 3, syscalls.MAP_PRIVATE | syscalls.MAP_FIXED | syscalls.MAP_ANONYMOUS, -1, 0
    )
    ctypes.memset(at, 0x5A, size)
    work(tally, 5)
    tally.close()
    del tally
    return {
        "mapped": path in maps,
        "descriptor": path in descriptors,
        "intact": ctypes.string_at(at, size) == b"\x5a" * size,
    }


def test_a_fork_has_no_mapping_and_closing_there_unmaps_nothing_foreign(tmp_path: Path) -> None:
    tally = Tally.take(str(tmp_path))
    work(tally)
    try:
        assert str(tmp_path / "0") in Path("/proc/self/maps").read_text()
        seen = in_child(what_a_fork_sees, tally, str(tmp_path / "0"))
        assert seen == {"mapped": False, "descriptor": False, "intact": True}
        work(tally)
        assert counted(tmp_path).begun == 2
    finally:
        tally.close()


def close_and_use(memory: mmap.mmap, address: int, size: int) -> bool:
    at = syscalls.map_memory(
        address, size, 3, syscalls.MAP_PRIVATE | syscalls.MAP_FIXED | syscalls.MAP_ANONYMOUS, -1, 0
    )
    faulthandler.disable()  # the end by SIGSEGV is what the test expects
    memory.close()
    ctypes.memset(at, 0x5A, size)
    return True


def test_pythons_own_mmap_would_end_the_fork(tmp_path: Path) -> None:
    """Why the tally is not mapped with it: its close() in a fork unmaps memory that is not its own."""
    size = 64 * 1024
    with (tmp_path / "file").open("w+b") as file:
        file.truncate(size)
        memory = mmap.mmap(file.fileno(), size)
    view = (ctypes.c_char * size).from_buffer(memory)
    address = ctypes.addressof(view)
    del view
    memory.madvise(mmap.MADV_DONTFORK)
    with pytest.raises(ChildDied) as died:
        in_child(close_and_use, memory, address, size)
    assert died.value.signal == signal.SIGSEGV
    memory.close()


def test_words_are_written_to_the_file_until_they_are_closed(tmp_path: Path) -> None:
    descriptor = os.open(tmp_path / "words", os.O_RDWR | os.O_CREAT, 0o600)
    words = SharedWords(descriptor, 512)
    os.close(descriptor)
    assert words.is_ours
    words.words[511] = 7
    assert (tmp_path / "words").read_bytes()[-8:] == (7).to_bytes(8, "little")
    words.close()
    words.close()
    assert not words.is_ours
    with pytest.raises(IndexError):
        words.words[0]


def test_the_header_names_the_process(tmp_path: Path) -> None:
    tally = Tally.take(str(tmp_path))
    header = memoryview((tmp_path / "0").read_bytes()[: 64 * 8]).cast("Q")
    assert (header[Header.PID], header[Header.STARTED]) == (os.getpid(), proc.start_time(os.getpid()))
    tally.close()
    header = memoryview((tmp_path / "0").read_bytes()[: 64 * 8]).cast("Q")
    assert header[Header.PID] == 0
    assert (sequence_at(0), record_at(0, 1000)) == (64, 1064)


def test_a_lock_on_the_directory_does_not_stop_a_server(tmp_path: Path) -> None:
    """Code with the server's user can open the directory, and lock it for ever."""
    descriptor = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        with pytest.raises(KernelError) as caught:
            Tally.take(str(tmp_path))
        assert caught.value.errno == errno.EAGAIN
    finally:
        os.close(descriptor)
    Tally.take(str(tmp_path)).close()
