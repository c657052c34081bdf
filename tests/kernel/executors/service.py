"""A service for executor processes that does what the tests ask of it, and the host's side of asking."""

from __future__ import annotations

import contextlib
import ctypes
import json
import logging
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

from rcon_plugins import Manager, Outcome, RunningManager, Work
from rcon_plugins.confinement.admission import ProcessAdmission
from rcon_plugins.executors.channel import FIRST_SERVICE_KIND, Channel, ChannelClosed, Frame
from rcon_plugins.settings.file import from_mapping
from tests.kernel.cgroup.helpers import write_directly
from tests.kernel.executors import ways_back
from tests.kernel.quota import quota_in_force
from tests.kernel.seccomp import births

ASK, ANSWER, RAISED = range(FIRST_SERVICE_KIND, FIRST_SERVICE_KIND + 3)


def serve(channel: Channel, frame: Frame) -> None:
    """Call one of the acts below by name, and answer with what it returns."""
    name, *arguments = json.loads(frame.payload)
    _channel[:] = [channel]
    try:
        result = getattr(Acts, name)(*arguments)
    except SystemExit:
        return  # it has answered
    except Exception as error:
        channel.send((RAISED, repr(error).encode()))
    else:
        channel.send((ANSWER, json.dumps(result).encode()))


_channel: list[Channel] = []
_kept: dict[str, list[bytes]] = {}


class Acts:
    """What a work may be asked to do."""

    @staticmethod
    def pid() -> int:
        return os.getpid()

    @staticmethod
    def sleep(seconds: float) -> None:
        time.sleep(seconds)

    @staticmethod
    def wait_for(path: str) -> None:
        while not Path(path).exists():
            time.sleep(0.01)

    @staticmethod
    def burn(seconds: float, processes: int = 1) -> None:
        children = [pid for _ in range(processes - 1) if (pid := _forked(lambda: _spin(seconds)))]
        _spin(seconds)
        for child in children:
            os.waitpid(child, 0)

    @staticmethod
    def quota() -> float | None:
        return quota_in_force()

    @staticmethod
    def use_cpu(seconds: float) -> None:
        """Use so much CPU time, however long that takes on a busy machine."""
        until = time.process_time() + seconds
        while time.process_time() < until:
            pass

    @staticmethod
    def allocate_and_hold(mebibytes: int, seconds: float) -> int:
        held = [bytearray(os.urandom(4096) * 256) for _ in range(mebibytes)]
        time.sleep(seconds)
        return len(held)

    @staticmethod
    def allocate_slowly(mebibytes: int, seconds: float) -> int:
        held = []
        for _ in range(mebibytes):
            held.append(bytearray(os.urandom(4096) * 256))
            time.sleep(seconds)
        return len(held)

    @staticmethod
    def allocate_and_wait(mebibytes: int, path: str, more: int = 0) -> int:
        """Hold memory until there is such a file, then take more."""
        held = [bytearray(os.urandom(4096) * 256) for _ in range(mebibytes)]
        Acts.wait_for(path)
        held += [bytearray(os.urandom(4096) * 256) for _ in range(more)]
        return len(held)

    @staticmethod
    def allocate(mebibytes: int) -> int:
        held = [bytearray(os.urandom(4096) * 256) for _ in range(mebibytes)]
        return len(held)

    @staticmethod
    def keep(mebibytes: int, name: str = "") -> list[int]:
        """Keep memory, under a name only once, as a cache does. Return the pid, and how often this process took any."""
        if name not in _kept:
            _kept[name or str(len(_kept))] = [os.urandom(4096) * 256 for _ in range(mebibytes)]
        return [os.getpid(), len(_kept)]

    @staticmethod
    def keep_memfd(mebibytes: int) -> int:
        file = os.memfd_create("kept")
        return sum(os.write(file, os.urandom(4096) * 256) for _ in range(mebibytes))

    @staticmethod
    def fill_page_cache(path: str, mebibytes: int) -> int:
        with Path(path).open("wb") as file:
            for _ in range(mebibytes):
                file.write(os.urandom(4096) * 256)
            os.fsync(file.fileno())
        return os.getpid()

    @staticmethod
    def lose_child(mebibytes: int, seconds: float = 0.0) -> str:
        """A child takes so much memory; wait for its end, and then for a while."""
        child = _forked(lambda: Acts.allocate(mebibytes))
        status = os.waitpid(child, 0)[1]
        time.sleep(seconds)
        return f"child ended with {os.waitstatus_to_exitcode(status)}"

    @staticmethod
    def write_directly(path: str, mebibytes: int) -> float:
        """Bytes per second, past the page cache."""
        size = mebibytes * 1024 * 1024
        return size / write_directly(path, size)

    @staticmethod
    def leave_sleepers(count: int) -> list[int]:
        """Sleepers in sessions of their own, whose parent has ended."""
        return [_orphan(lambda: time.sleep(300)) for _ in range(count)]

    @staticmethod
    def tidy_child(path: str) -> None:
        """Wait for a child that tidies up at SIGTERM, and takes a second for it."""
        script = f"trap 'sleep 1; printf tidy > {path}; exit' TERM; while :; do sleep 0.1; done"
        subprocess.run(["setsid", "sh", "-c", script], check=False)

    @staticmethod
    def deaf_children(count: int) -> list[int]:
        """Children that ignore SIGTERM."""
        return [subprocess.Popen(["sh", "-c", "trap '' TERM; sleep 300"]).pid for _ in range(count)]

    @staticmethod
    def deaf_for_ever() -> None:
        """Start a child that ignores SIGTERM, and ignore it, too."""
        Acts.deaf_children(1)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        while True:
            time.sleep(1)

    @staticmethod
    def answer_after_sigterm() -> str:
        """Answer when SIGTERM has come."""
        came: list[int] = []
        signal.signal(signal.SIGTERM, lambda number, _: came.append(number))
        while not came:
            time.sleep(0.05)
        return "late"

    @staticmethod
    def orphans(count: int, seconds: float = 30.0) -> int:
        """Processes that end after their parent has. Wait for a place for the next one while there is none."""
        end = time.monotonic() + seconds
        made = 0
        while made < count and time.monotonic() < end:
            try:
                _orphan(lambda: None)
                made += 1
            except BlockingIOError:
                time.sleep(0.01)
        return made

    @staticmethod
    def adopts_orphans() -> tuple[int, str]:
        """PR_GET_CHILD_SUBREAPER, and what os.wait() has after an orphan was made."""
        flag = ctypes.c_int(-1)
        ctypes.CDLL(None).prctl(37, ctypes.byref(flag), 0, 0, 0)
        _orphan(lambda: None)
        time.sleep(0.2)
        try:
            return flag.value, f"child {os.wait()}"
        except ChildProcessError:
            return flag.value, "none"

    @staticmethod
    def stop_as_traced() -> None:
        """Have the fork server told of each stop, whether it wants that or not."""
        ctypes.CDLL(None).ptrace(0, 0, 0, 0)
        os.kill(os.getpid(), signal.SIGSTOP)

    @staticmethod
    def be_traced_by_a_child() -> int:
        """The child outlives this process, which stays a zombie as long as its tracer does not look."""
        reading, writing = os.pipe()
        parent = os.getpid()
        if os.fork() == 0:
            libc = ctypes.CDLL(None, use_errno=True)
            result = libc.ptrace(0x4206, parent, 0, 0)  # PTRACE_SEIZE
            os.write(writing, str(ctypes.get_errno() if result else 0).encode())
            time.sleep(300)
            os._exit(0)
        return int(os.read(reading, 10))

    @staticmethod
    def fork_bomb(seconds: float) -> int:
        """Fork, fork in forks, leave the session, for a while; then fail for want of processes."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            with contextlib.suppress(OSError):
                if os.fork() == 0:
                    if os.getpid() % 2:
                        with contextlib.suppress(OSError):
                            os.setsid()
                    while time.monotonic() < end + 300:
                        with contextlib.suppress(OSError):
                            os.fork()
                        time.sleep(0.01)
                    os._exit(0)
        return sum(1 for _ in range(64) if _forked(lambda: time.sleep(300)))  # a slow machine is not full yet

    @staticmethod
    def return_twice() -> str:
        """A fork that goes back where its parent came from."""
        os.fork()
        return "answered"

    @staticmethod
    def environment(name: str) -> str | None:
        return os.environ.get(name)

    @staticmethod
    def many(count: int) -> int:
        """Children that burn CPU for ever."""
        for _ in range(count):
            _forked(lambda: _spin(300))
        time.sleep(300)
        return count

    @staticmethod
    def speak_later(seconds: float) -> None:
        """A thread that answers for somebody else, later."""
        channel = _channel[0]

        def speak() -> None:
            time.sleep(seconds)
            channel.send((ANSWER, b'"forged"'))

        threading.Thread(target=speak).start()

    @staticmethod
    def go_on(path: str) -> None:
        """Answer, and do not come back before there is this file."""
        _channel[0].send((ANSWER, json.dumps(os.getpid()).encode()))
        while not Path(path).exists():
            time.sleep(0.01)
        raise SystemExit

    @staticmethod
    def end(status: int) -> None:
        os._exit(status)

    @staticmethod
    def say(text: str, descriptor: int = 2, times: int = 1) -> int:
        """Write a text to a descriptor, as often as that."""
        for _ in range(times):
            os.write(descriptor, text.encode())
        return times

    @staticmethod
    def say_and_die(text: str, times: int) -> None:
        Acts.say(text, 2, times)
        os.kill(os.getpid(), signal.SIGKILL)

    @staticmethod
    def speak_from_a_child(seconds: float, text: str) -> None:
        """A child that outlives the work says something later."""

        def speak() -> None:
            time.sleep(seconds)
            Acts.say(text)

        _orphan(speak)

    @staticmethod
    def flood(text: str, seconds: float) -> int:
        """Write a text to standard error for a while: how often."""
        data, end, times = text.encode(), time.monotonic() + seconds, 0
        while time.monotonic() < end:
            os.write(2, data)
            times += 1
        return times

    @staticmethod
    def tell_loggers(*names: str) -> None:
        for name in names:
            logging.getLogger(name).warning("told %s", name)

    @staticmethod
    def harm_files() -> dict[str, list[str]]:
        """Do all that can be done with each inherited descriptor but the channel: what worked."""
        channel = _channel[0].fileno()
        found = {}
        for entry in list(Path("/proc/self/fd").iterdir()):
            if (number := int(entry.name)) not in (0, channel):
                with contextlib.suppress(FileNotFoundError):
                    found[f"{number} {entry.readlink()}"] = ways_back.by_descriptor(number)
        return found

    @staticmethod
    def write_memory(start: int, text: str) -> list[str]:
        """Write into a mapping of one page: what was there before and after."""
        before = ctypes.string_at(start)
        if ctypes.CDLL(None).mprotect(ctypes.c_void_p(start), ctypes.c_size_t(4096), 3) == 0:
            ctypes.memmove(start, text.encode(), len(text))
        return [before.decode(), ctypes.string_at(start).decode()]

    @staticmethod
    def read_file(descriptor: int) -> str:
        return os.read(descriptor, 100).decode()

    @staticmethod
    def descriptors() -> dict[str, str]:
        found = {}
        for entry in Path("/proc/self/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):
                found[entry.name] = str(entry.readlink())
        return found

    @staticmethod
    def state() -> dict[str, Any]:
        """Who this process is and what it may do, in the kernel's own words."""
        return status(Path("/proc/self/status"))

    @staticmethod
    def ways_back(others: int, setuid_root: str, pids: dict[str, int]) -> dict[str, str]:
        """Every way back that there is."""
        found = {**ways_back.by_identity(others=others), **ways_back.by_program(setuid_root)}
        for name, pid in pids.items():
            found.update(ways_back.by_process(pid, name))
            found.update(ways_back.by_signal(pid, name))
        return {**found, **ways_back.by_cgroup()}

    @staticmethod
    def ways_out(cgroup: str) -> dict[str, str]:
        """Every way to other limits that there is: to the cgroups' files, to mounts of them, to another cgroup."""
        into = {f"clone3 by {way}": said for way, said in births.all_ways(cgroup).items()}
        return {**ways_back.by_attributes(), **ways_back.by_mounts(), **ways_back.by_user_namespace(), **into}

    @staticmethod
    def ways_back_of_root(pids: dict[str, int]) -> dict[str, str]:
        """The ways back of one that has the server's own user."""
        found = ways_back.by_capability()
        for name, pid in pids.items():
            found.update(ways_back.by_process(pid, name))
        return {**found, **ways_back.by_cgroup()}

    @staticmethod
    def rights_of_root(pids: dict[str, int], folder: str) -> dict[str, str]:
        return ways_back.by_rights_of_root(pids, folder)

    @staticmethod
    def births(cgroup: str) -> dict[str, str]:
        """Start a child in another cgroup, in each way."""
        return births.all_ways(cgroup)

    @staticmethod
    def births_after_execve(cgroup: str) -> dict[str, str]:
        """As a child that is another program."""
        done = subprocess.run([sys.executable, births.__file__, cgroup], capture_output=True, check=True)
        return dict(json.loads(done.stdout))

    @staticmethod
    def births_of_a_child(cgroup: str) -> list[str]:
        """As a forked child, and in a thread of this process."""
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            os.write(writing, births.born_in(cgroup).encode())
            os._exit(0)
        os.waitpid(child, 0)
        found = [os.read(reading, 4096).decode()]
        thread = threading.Thread(target=lambda: found.append(births.born_in(cgroup)))
        thread.start()
        thread.join()
        return found

    @staticmethod
    def children_of_the_c_library() -> list[str]:
        """A process by posix_spawn, one by fork and execve, and a thread: what they answered."""
        found = []
        reading, writing = os.pipe()
        actions = [(os.POSIX_SPAWN_DUP2, writing, 1)]
        pid = os.posix_spawn("/bin/echo", ["echo", "spawned"], os.environ, file_actions=actions)
        found.append(
            f"{os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])} {os.read(reading, 100).decode().strip()}"
        )
        found.append(
            subprocess.run(["echo", "forked"], capture_output=True, text=True, check=True).stdout.strip()
        )
        thread = threading.Thread(target=found.append, args=("thread",))
        thread.start()
        thread.join()
        return found

    @staticmethod
    def mount_cgroups_anew() -> str:
        """Become root of a user namespace, and mount the cgroups there without a mount point: fsopen(2)."""
        return ways_back.mount_cgroups_anew()

    @staticmethod
    def hold_memfds(name: str, count: int) -> int:
        """Receive files over an abstract socket. Return how many MiB they hold."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
            receiver.bind(f"\0{name}")
            files = [socket.recv_fds(receiver, 1, 1)[1][0] for _ in range(count)]
        held = sum(os.fstat(file).st_blocks * 512 for file in files) >> 20
        for file in files:
            os.close(file)
        return held

    @staticmethod
    def pass_memfd(name: str, mebibytes: int) -> None:
        """Fill a memfd, and send it to the process that holds them."""
        file = os.memfd_create("passed")
        for _ in range(mebibytes):
            os.write(file, bytes(2**20))
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            for _ in range(200):
                with contextlib.suppress(ConnectionRefusedError):  # not there yet, or dead
                    sender.connect(f"\0{name}")
                    break
                time.sleep(0.01)
            socket.send_fds(sender, [b"x"], [file])
        os.close(file)

    @staticmethod
    def fill(path: str, mebibytes: int) -> str:
        """Write a file; "ok", or the name of the errno."""
        return ways_back.attempt(lambda: _fill(path, mebibytes))

    @staticmethod
    def entries(path: str) -> list[str]:
        return sorted(entry.name for entry in Path(path).iterdir())

    @staticmethod
    def make_segment(key: int, mebibytes: int) -> int:
        """Make a segment of System V and write to it: shmget(2), shmat(2). Return its id."""
        return ways_back.make_segment(key, mebibytes)

    @staticmethod
    def make_queue_and_semaphores(key: int, size: int) -> tuple[int, int]:
        """Make a message queue of System V with one message in it, and a set of ten semaphores. Return their ids."""
        return ways_back.make_queue(key, size), ways_back.make_semaphores(key)

    @staticmethod
    def find_segment(key: int) -> str:
        return ways_back.find_segment(key)

    @staticmethod
    def change_attributes() -> dict[str, str]:
        return ways_back.by_attributes()

    @staticmethod
    def namespaces() -> dict[str, str]:
        return {name: str(Path(f"/proc/self/ns/{name}").readlink()) for name in ("mnt", "ipc")}

    @staticmethod
    def signals(pids: dict[str, int]) -> dict[str, str]:
        """Signals to other processes."""
        return {
            key: value for name, pid in pids.items() for key, value in ways_back.by_signal(pid, name).items()
        }

    @staticmethod
    def open_descriptors() -> dict[str, str]:
        return ways_back.descriptors()

    @staticmethod
    def siblings(count: int) -> list[int]:
        """Processes that are no children of this one, but of its parent; they end at once."""
        return [ways_back.clone_sibling() for _ in range(count)]

    @staticmethod
    def read_key(key: int) -> str:
        return ways_back.read_key(key)

    @staticmethod
    def session() -> tuple[int, int]:
        return os.getpid(), os.getsid(0)

    @staticmethod
    def create(path: str) -> str:
        """A new file: its owner, group and permissions, or the errno."""
        try:
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        except OSError as error:
            return os.strerror(error.errno or 0)
        found = Path(path).stat()
        return f"{found.st_uid}:{found.st_gid} {found.st_mode & 0o777:03o}"

    @staticmethod
    def reach_file(path: str, but: Collection[str] = ()) -> dict[str, str]:
        """Try to change or remove a file of the server in every way that needs no open descriptor."""
        file = Path(path)

        def open_to(flags: int, name: str) -> None:
            os.close(os.open(name, flags, 0o600))

        ways: dict[str, Callable[[], object]] = {
            "write": lambda: open_to(os.O_WRONLY, path),
            "truncate": lambda: os.truncate(path, 0),
            "remove": file.unlink,
            "rename": lambda: file.rename(f"{path}.away"),
            "make beside": lambda: open_to(os.O_WRONLY | os.O_CREAT, f"{path}.more"),
            "rename the directory": lambda: file.parent.rename(f"{file.parent}.away"),
        }
        found = {}
        for name, way in ways.items():
            if name in but:
                continue
            try:
                way()
            except OSError as error:
                found[name] = os.strerror(error.errno or 0)
            else:
                found[name] = "done"
        return found

    @staticmethod
    def reach_file_but_truncate(path: str) -> dict[str, str]:
        """The same without truncate(2)."""
        return Acts.reach_file(path, but=("truncate",))

    @staticmethod
    def traces_of(path: str) -> list[str]:
        """Where this process has files of the server below ``path``: mappings, descriptors, shared memory."""
        found = [line for line in Path("/proc/self/maps").read_text().splitlines() if path in line]
        for link in Path("/proc/self/fd").iterdir():
            with contextlib.suppress(OSError):
                if path in (target := str(link.readlink())):
                    found.append(f"descriptor {link.name}: {target}")
        return found + [str(one) for one in Path("/dev/shm").iterdir() if Path(path).name in one.name]

    @staticmethod
    def rlimits(*names: str) -> list[tuple[int, int]]:
        return [resource.getrlimit(getattr(resource, f"RLIMIT_{name.upper()}")) for name in names]

    @staticmethod
    def raises() -> None:
        raise ValueError("as asked")


def _fill(path: str, mebibytes: int) -> None:
    with Path(path).open("wb", buffering=0) as file:
        for _ in range(mebibytes):
            file.write(bytes(1 << 20))


def _spin(seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pass


def _forked(act: Any) -> int:
    pid = os.fork()
    if pid == 0:
        act()
        os._exit(0)
    return pid


def _orphan(act: Any) -> int:
    reading, writing = os.pipe()
    between = os.fork()
    if between == 0:
        os.setsid()
        os.write(writing, str(_forked(act)).encode())
        os._exit(0)
    os.waitpid(between, 0)
    pid = int(os.read(reading, 20))
    os.close(reading)
    os.close(writing)
    return pid


def take_out_of_its_cgroups(pid: int) -> None:
    """Move a process to the root of each hierarchy, where it could move itself to if nothing forbade it."""
    for mount in Path("/proc/self/mounts").read_text().splitlines():
        directory, kind = mount.split()[1:3]
        if kind.startswith("cgroup"):
            (Path(directory) / "cgroup.procs").write_text(str(pid))


@contextlib.contextmanager
def managing(
    policy: dict[str, Any],
    *,
    settings: Any = None,
    on_lost: Any = None,
    after_fork: Any = (),
    **parameters: Any,
) -> Iterator[RunningManager]:
    """A running manager with one policy, `p`, that all work gets."""
    keys = {"policy": {"p": policy}, "route": [{"policy": "p"}], **(settings or {})}
    manager = Manager(from_mapping(keys), **parameters).start(serve, on_lost=on_lost, after_fork=after_fork)
    try:
        yield manager
    finally:
        manager.close()


def begin(manager: RunningManager, act: str, *arguments: Any, **attributes: str) -> ProcessAdmission:
    """Start an act without waiting for it."""
    admission = manager.admit(Work("call", act, attributes))
    assert isinstance(admission, ProcessAdmission)
    # Over before it began, on a slow machine with a short deadline: `end` tells by what.
    with contextlib.suppress(ChannelClosed):
        admission.channel.send((ASK, json.dumps([act, *arguments]).encode()))
    return admission


def end(admission: ProcessAdmission) -> tuple[Any, Outcome]:
    """What an act answered, and how it ended."""
    try:
        frame = admission.channel.receive()
    except ChannelClosed:
        return None, admission.died()
    if frame.kind == RAISED:
        return frame.payload.decode(), admission.finish("error")
    return json.loads(frame.payload), admission.finish()


def ask(manager: RunningManager, act: str, *arguments: Any, **attributes: str) -> tuple[Any, Outcome]:
    """Do an act: what it answered, and how it ended."""
    return end(begin(manager, act, *arguments, **attributes))


class Left(Exception):
    """What a signal handler raises in a thread that waits for a call."""


def leaving(act: Callable[..., Any]) -> Callable[..., Any]:
    """Make the caller of an act in an executor thread leave the call as soon as the act runs: it raises `Left`."""

    def leave(*_: object) -> None:
        raise Left

    def run(*arguments: Any) -> Any:
        os.kill(os.getpid(), signal.SIGALRM)  # the main thread, which waits, runs the handler
        return act(*arguments)

    signal.signal(signal.SIGALRM, leave)
    return run


def status(path: Path) -> dict[str, Any]:
    """Identity and capabilities from a status file of /proc."""
    lines = dict(line.split(":", 1) for line in path.read_text().splitlines())
    return {
        "uids": [int(uid) for uid in lines["Uid"].split()],
        "gids": [int(gid) for gid in lines["Gid"].split()],
        "groups": [int(group) for group in lines["Groups"].split()],
        "no_new_privs": lines["NoNewPrivs"].strip() == "1",
        **{name: int(lines[name], 16) for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")},
    }


def soon(condition: Any, seconds: float = 30.0) -> bool:
    """Whether a condition comes true in time."""
    end_of_patience = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end_of_patience:
            return False
        time.sleep(0.01)
    return True
