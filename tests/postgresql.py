"""A real PostgreSQL on loopback for one test run, in a folder of its own."""

from __future__ import annotations

import itertools
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import psycopg

from tests.integrations.celery.redis_server import PATIENCE, free_port

#: Whom the server runs as: it refuses root. The package makes this user.
USER = "postgres"
#: What a server of tests need not do: survive a crash of the machine.
OPTIONS = ("fsync=off", "synchronous_commit=off", "full_page_writes=off", "max_connections=200")


class PostgresServer:
    """One PostgreSQL server; `stop`, or the end of a ``with`` block, ends it."""

    host = "127.0.0.1"

    def __init__(self) -> None:
        self.owner = pwd.getpwnam(USER)
        self.directory = Path(tempfile.mkdtemp(prefix="rcon-postgres-", dir="/var/tmp"))
        shutil.chown(self.directory, self.owner.pw_uid, self.owner.pw_gid)
        self._data = self.directory / "data"
        self._databases = itertools.count()
        self._run("initdb", "--pgdata", self._data, "--username", USER, "--auth", "trust", "--no-sync")
        for _ in range(10):
            self.port = free_port()
            self.process = self._start()
            if self._answers():
                return
            self.stop()  # another process took the port, or it does not start
        raise AssertionError(f"PostgreSQL did not start:\n{self._log.read_text()}")

    def __enter__(self) -> PostgresServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        shutil.rmtree(self.directory)

    def database(self, template: str = "template1") -> str:
        """Make a database, empty or like another one; return its name."""
        name = f"shop{next(self._databases)}"
        self.execute("postgres", f'CREATE DATABASE "{name}" TEMPLATE "{template}"')
        return name

    def connect(self, database: str) -> psycopg.Connection[Any]:
        """Return a connection whose statements are transactions of their own."""
        return psycopg.connect(host=self.host, port=self.port, user=USER, dbname=database, autocommit=True)

    def execute(self, database: str, statement: str, *values: object) -> list[tuple[Any, ...]]:
        """Run one statement, in a connection of its own; return the rows."""
        with self.connect(database) as connection:
            cursor = connection.execute(statement.encode(), values or None)
            return cursor.fetchall() if cursor.description else []

    def end_sessions(self, database: str) -> int:
        """End all sessions of a database, as its restart does. Return how many there were."""
        ended = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
        return len(
            self.execute(database, f"{ended} WHERE datname = %s AND pid <> pg_backend_pid()", database)
        )

    def stop(self) -> None:
        """End the server, and all sessions."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
        try:
            self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise

    @property
    def _log(self) -> Path:
        return self.directory / "log"

    def _start(self) -> subprocess.Popen[bytes]:
        command = [program("postgres"), "-D", str(self._data), "-p", str(self.port)]
        command += ["-c", f"listen_addresses={self.host}", "-c", f"unix_socket_directories={self.directory}"]
        for option in OPTIONS:
            command += ["-c", option]
        with self._log.open("ab") as log:
            return subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, **self._as_owner()
            )

    def _answers(self) -> bool:
        deadline = time.monotonic() + PATIENCE
        while self.process.poll() is None and time.monotonic() < deadline:
            try:
                ((directory,),) = self.execute("postgres", "SHOW data_directory")
            except psycopg.OperationalError:
                time.sleep(0.02)
            else:
                return bool(directory == str(self._data))  # not another server on this port
        return False

    def _run(self, name: str, *arguments: object) -> None:
        command = [program(name), *map(str, arguments)]
        subprocess.run(
            command, check=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, **self._as_owner()
        )

    def _as_owner(self) -> dict[str, Any]:
        return {
            "user": self.owner.pw_uid,
            "group": self.owner.pw_gid,
            "extra_groups": [],
            "cwd": self.directory,
        }


def program(name: str) -> str:
    """Return the path of a program of the newest PostgreSQL, which Debian keeps out of PATH."""
    found = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"), key=lambda path: int(path.parts[-3]))
    if not found:
        raise RuntimeError(f"{name} not found. As root: apt-get install postgresql")
    return str(found[-1])
