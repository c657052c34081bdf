"""The redis-server and the Celery worker of the demonstration."""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
#: The number of processes of the worker's pool.
PROCESSES = 4
#: What bounds the first half of the demonstration: one limit around the whole worker, as a container has.
WHOLE = {"memory": "1G", "pids": "200"}
#: How long a server may take to start or to end, seconds.
PATIENCE = 60.0


class CannotStart(Exception):
    """Raised when the demonstration cannot start; the message gives the remedy."""


class Redis:
    """A redis-server on a socket in a directory, without files on disk."""

    def __init__(self, directory: Path) -> None:
        program = shutil.which("redis-server")
        if program is None:
            raise CannotStart("redis-server is not installed. As root: apt-get install redis-server")
        path = directory / "redis.sock"
        self.url = f"redis+socket://{path}"
        command = [program, "--port", "0", "--unixsocket", str(path), "--unixsocketperm", "700"]
        command += ["--save", "", "--appendonly", "no", "--dir", str(directory)]
        self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + PATIENCE
        with socket.socket(socket.AF_UNIX) as client:
            while client.connect_ex(str(path)):
                if self._process.poll() is not None or time.monotonic() > deadline:
                    self.close()
                    raise CannotStart(f"redis-server did not start: run {' '.join(command)}")
                time.sleep(0.02)

    def close(self) -> None:
        """End the server."""
        self._process.terminate()
        self._process.wait()


class Worker:
    """A Celery worker that runs the application of the example.

    Without ``confined`` its tasks have no limits. `WHOLE` bounds the worker then, so that it harms nothing else.
    """

    def __init__(self, directory: Path, *, confined: bool) -> None:
        self._log = directory / f"worker-{'confined' if confined else 'unconfined'}.log"
        application = "tasks" if confined else "unconfined"
        command = [
            sys.executable,
            "-m",
            "celery",
            "-A",
            application,
            "worker",
            "--concurrency",
            str(PROCESSES),
        ]
        command += ["--hostname", "photos@localhost", "--loglevel", "INFO"]
        command += ["--without-gossip", "--without-mingle"]
        #: The number of processes between this one and the worker.
        self._around = 0 if confined else 1
        if not confined:
            limits = [word for name, value in WHOLE.items() for word in (f"--{name}", value)]
            # Only the process that needs too much is killed, as without a group.
            command = [
                str(Path(sys.executable).with_name("rcon")),
                "run",
                *limits,
                "--oom",
                "process",
                "--",
                *command,
            ]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                command, cwd=HERE, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        self._family: set[int] = set()

    def wait_until_ready(self) -> None:
        """Wait until it takes jobs. Raises `CannotStart` with the end of its log."""
        deadline = time.monotonic() + PATIENCE
        while " ready." not in self.log():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise CannotStart(f"the worker did not start:\n{self.log()[-2000:]}")
            time.sleep(0.05)

    def log(self) -> str:
        """Return its log."""
        return self._log.read_text(errors="replace")

    def children(self) -> list[int]:
        """Return the pids of its pool."""
        parents = [self._process.pid]
        for _ in range(self._around):
            parents = [child for pid in parents for child in children(pid)]
        return [child for pid in parents for child in children(pid)]

    def stop(self) -> int:
        """End it once its running jobs are done; return its exit status."""
        if self._process.poll() is None:
            self._family = family(self._process.pid)
            self._process.terminate()
        try:
            return self._process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()

    def left_behind(self) -> str:
        """Return its processes that still live and its cgroups that still exist, as text; empty if none."""
        time.sleep(0.2)
        processes = [str(pid) for pid in self._family if Path(f"/proc/{pid}").exists()]
        cgroups = list(Path("/sys/fs/cgroup").glob(f"**/rcon-{self._process.pid}-*"))
        return " ".join([*processes, *map(str, cgroups)])


def children(pid: int) -> list[int]:
    """Return the pids of the children of a process."""
    with contextlib.suppress(OSError):
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def family(pid: int) -> set[int]:
    """Return the pids of a process and all its descendants."""
    return {pid}.union(*(family(child) for child in children(pid)))
