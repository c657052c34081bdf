"""A PostgreSQL of the tests' own, on a Unix socket."""

from __future__ import annotations

import contextlib
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

USER = "postgres"


def _programs() -> Path:
    """The directory of its programs, which Debian keeps out of the path."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[4]))
    assert found, "Debian's package postgresql is missing: make debian"
    return found[-1].parent


def _run(*command: str) -> None:
    account = pwd.getpwnam(USER)
    done = subprocess.run(
        command, user=account.pw_uid, group=account.pw_gid, extra_groups=[], cwd="/", check=False,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout


@contextlib.contextmanager
def postgresql(database: str) -> Iterator[Path]:
    """Run it, with a database that any user of this machine may use. Yields the directory of its socket."""
    programs = _programs()
    directory = Path(tempfile.mkdtemp(prefix="postgresql-", dir="/tmp"))
    try:
        shutil.chown(directory, USER)
        directory.chmod(0o755)
        data, log = str(directory / "data"), str(directory / "log")
        _run(str(programs / "initdb"), "--no-sync", "--auth=trust", "--pgdata", data)
        options = f"-k {directory} -c listen_addresses= -c fsync=off"
        _run(
            str(programs / "pg_ctl"), "--wait", "--pgdata", data, "--log", log, "--options", options, "start"
        )
        try:
            _run(str(programs / "createdb"), "--host", str(directory), database)
            yield directory
        finally:
            _run(str(programs / "pg_ctl"), "--wait", "--mode", "immediate", "--pgdata", data, "stop")
    finally:
        shutil.rmtree(directory)
