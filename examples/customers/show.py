"""Three customers on one gunicorn, each under its own user: ``python examples/customers/show.py``, as root.

Makes the same requests three times: without users, with ``isolation = "thread"`` and with ``"process"``.

Exits with 0 if every check passed, 1 if not, and 2 if this machine or user cannot run it.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import http.client
import importlib.util
import json
import os
import pwd
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rcon_plugins import Plan
from rcon_plugins import Server as Traits
from rcon_plugins.errors import RconError
from rcon_plugins.kernel.cgroup import Hierarchy
from rcon_plugins.settings.file import from_mapping
from rcon_plugins.tree.base import find_base

HERE = Path(__file__).resolve().parent
NAMES = ("anna", "berta", "clara")
FIRST_UID = 61001
LOW_UID = 99  # below `min_uid`, which is 100 by default
ISOLATIONS = ("none", "thread", "process")
CLIENTS = 2  # per customer
ROUNDS = 12  # per client; a round makes every request once
THREADS = 8
MARKS = {None: "", True: "✓", False: "✗"}
#: How long to wait for an answer, and for the server to start, in seconds.
PATIENCE = 60.0
#: The signals received that end the example. It checks them between requests, where it can clean up.
signals: list[int] = []


class CannotRun(Exception):
    """Raised when this machine or this user cannot run the example. The message has the remedy."""


@dataclass
class Row:
    """The observations of one customer under one isolation."""

    customer: str
    isolation: str
    uid: int
    uids: set[int] = field(default_factory=set)
    gids: set[int] = field(default_factory=set)
    capabilities: set[str] = field(default_factory=set)
    own: set[str] = field(default_factory=set)
    neighbour: set[str] = field(default_factory=set)
    shadow: set[str] = field(default_factory=set)
    wrote: int = 0
    owners: Counter[str] = field(default_factory=Counter)
    requests: int = 0
    wrong: Counter[str] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)

    @property
    def p50(self) -> float | None:
        """The median latency, in milliseconds."""
        return sorted(self.seconds)[len(self.seconds) // 2] * 1000 if self.seconds else None

    @property
    def good(self) -> bool | None:
        """Whether all observations are right; None for isolation "none", which promises nothing."""
        if self.isolation == "none":
            return None
        return (
            self.uids == self.gids == {self.uid}
            and self.capabilities == {"none"}
            and self.own == {"yes"}
            and self.neighbour == {"EACCES"}
            and self.shadow == {expected_of("/etc/shadow")}
            and self.wrote > 0
            and self.owners == {f"{self.uid}:{self.uid} 640": self.wrote}
            and not self.wrong
        )

    def as_dict(self) -> dict[str, Any]:
        """The row for ``--json``."""
        row = {name: sorted(v) if isinstance(v, set) else v for name, v in vars(self).items()}
        del row["seconds"]
        return {**row, "p50_ms": self.p50, "good": self.good}


def expected_of(file: str) -> str:
    """Return what a customer should see of a file of root: the file may be missing, or readable by all."""
    if not Path(file).exists():
        return "ENOENT"
    return "yes" if Path(file).stat().st_mode & 0o004 else "EACCES"


class Srv:
    """A temporary directory with the folders of the customers, and folders whose owners must not be served."""

    def __init__(self) -> None:
        taken = {entry.pw_uid for entry in pwd.getpwall()}
        uids = (uid for uid in range(FIRST_UID, 65000) if uid not in taken)
        self.customers = {f"{name}.example": next(uids) for name in NAMES}
        self.unserved = {
            "nobody.example": "there is no folder",
            "root.example": "the folder is root's",
            "low.example": f"the folder is that of uid {LOW_UID}",
        }
        self.path = Path(tempfile.mkdtemp(prefix="rcon-customers-"))

    def fill(self) -> None:
        """Make the folders. Raises `CannotRun` if the customers could not reach them."""
        self.path.chmod(0o755)
        for parent in self.path.parents:
            if not parent.stat().st_mode & 0o001:
                raise CannotRun(
                    f"the customers cannot enter {parent}: set TMPDIR to a directory open to all users"
                )
        try:
            for host, uid in {**self.customers, "root.example": 0, "low.example": LOW_UID}.items():
                self._folder(host, uid)
        except OSError as error:
            raise CannotRun(f"cannot change the owner of a folder: {error} (run it with CAP_CHOWN)") from None

    def _folder(self, host: str, uid: int) -> None:
        folder = self.path / host
        folder.mkdir()
        secret = folder / "secret.txt"
        secret.write_text(f"the secret of {host}\n")
        for path, mode in ((secret, 0o640), (folder, 0o750)):
            os.chown(path, uid, uid)
            path.chmod(mode)

    def take_written(self, host: str) -> Counter[str]:
        """Count the written files by owner and mode, and remove them."""
        found = {file: file.stat() for file in (self.path / host).glob("written-*")}
        for file in found:
            file.unlink()
        return Counter(f"{s.st_uid}:{s.st_gid} {s.st_mode & 0o7777:o}" for s in found.values())

    def close(self) -> None:
        """Remove the directory."""
        shutil.rmtree(self.path)


class Server:
    """One gunicorn with the application; confined, unless the isolation is "none"."""

    def __init__(self, srv: Srv, isolation: str) -> None:
        self.log_file = srv.path / f"{isolation}.log"
        command = [sys.executable, "-m", "gunicorn", "app:app", "--chdir", str(HERE), "--no-control-socket"]
        command += ["--worker-class", "gthread", "--threads", str(THREADS), "--graceful-timeout", "5"]
        environ = {**os.environ, "CUSTOMERS": str(srv.path)}
        if isolation != "none":
            settings = srv.path / f"{isolation}.toml"
            settings.write_text(policy(srv.path, isolation))
            command += ["--config", "python:rcon_gunicorn.conf"]
            environ["RCON_SETTINGS"] = str(settings)
        with socket.create_server(("127.0.0.1", 0), backlog=256) as listener, self.log_file.open("wb") as log:
            self._port: int = listener.getsockname()[1]
            command += ["--bind", f"fd://{listener.fileno()}"]
            self._process = subprocess.Popen(
                command,
                env=environ,
                pass_fds=[listener.fileno()],
                start_new_session=True,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                # PR_SET_PDEATHSIG: end gracefully when the example itself is killed
                preexec_fn=lambda: ctypes.CDLL(None).prctl(1, signal.SIGTERM),
            )

    def connect(self) -> contextlib.closing[http.client.HTTPConnection]:
        """Return a connection to the server, as a context manager."""
        return contextlib.closing(http.client.HTTPConnection("127.0.0.1", self._port, timeout=PATIENCE))

    def wait_until_served(self, host: str) -> None:
        """Wait until a request is answered with 200. Raises `RuntimeError` if none is in time."""
        deadline = time.monotonic() + PATIENCE
        while self._process.poll() is None and time.monotonic() < deadline:
            with self.connect() as connection:
                if ask(connection, host, "/whoami")[0] == "200":
                    return
            check_signals()
            time.sleep(0.05)
        raise RuntimeError(f"the server does not serve:\n{self.log_file.read_text(errors='replace')}")

    def forbidden(self, host: str) -> str:
        """Return the reason in the log for refusing the requests of this host."""
        for line in self.log_file.read_text(errors="replace").splitlines():
            found = re.search(r"rcon: forbidden policy=\S+ key=(\S+) [^:]*: (.*)", line)
            if found is not None and found[1] == host:
                return found[2]
        return ""

    def stop(self) -> None:
        """Stop the server, gracefully first."""
        self._process.terminate()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


def policy(directory: Path, isolation: str) -> str:
    """Return the policy file with this directory and isolation."""
    text = (
        (HERE / "rcon.toml")
        .read_text()
        .replace('"owner:/srv/{host}"', json.dumps(f"owner:{directory}/{{host}}"))
    )
    return text.replace('isolation = "process"', f'isolation = "{isolation}"')


def ask(connection: http.client.HTTPConnection, host: str, path: str) -> tuple[str, dict[str, Any]]:
    """Make one request; return its status, or "none" without an answer, and the decoded body."""
    try:
        connection.request("GET", path, headers={"Host": host})
        response = connection.getresponse()
        return str(response.status), json.loads(response.read())
    except (OSError, http.client.HTTPException, ValueError):
        connection.close()
        return "none", {}


def visit(server: Server, srv: Srv, isolation: str) -> list[Row]:
    """Run all clients of all customers at once; each makes every request once a round, in random order."""
    rows = [Row(host, isolation, uid) for host, uid in srv.customers.items()]
    lock = threading.Lock()

    def client(row: Row, seed: int) -> None:
        neighbours = [other.customer for other in rows if other is not row]
        requests = ["/whoami", f"/read?of={row.customer}/secret.txt", "/read?of=/etc/shadow", "/write"]
        requests += [f"/read?of={neighbour}/secret.txt" for neighbour in neighbours]
        chance = random.Random(seed)
        with server.connect() as connection:
            for _ in range(ROUNDS):
                for path in chance.sample(requests, len(requests)):
                    start = time.monotonic()
                    status, answer = ask(connection, row.customer, path)
                    with lock:
                        row.seconds.append(time.monotonic() - start)
                        note(row, path, status, answer)
                    if signals or not answer:
                        return

    work = [(row, seed) for row in rows for seed in range(CLIENTS)]
    threads = [threading.Thread(target=client, args=one) for one in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for row in rows:
        row.owners = srv.take_written(row.customer)
    return rows


def note(row: Row, path: str, status: str, answer: dict[str, Any]) -> None:
    """Add one answer to the observations."""
    row.requests += 1
    match path.partition("?of=")[::2], answer:
        case ("/whoami", _), {"uids": uids, "gids": gids, "capabilities": capabilities}:
            row.uids.update(uids)
            row.gids.update(gids)
            row.capabilities.add("some" if any(capabilities.values()) else "none")
        case ("/write", _), {"file": _}:
            row.wrote += 1
        case ("/read", file), ({"bytes": _} | {"error": _}) if status in ("200", "403"):
            whose = {f"{row.customer}/secret.txt": row.own, "/etc/shadow": row.shadow}
            whose.get(file, row.neighbour).add(str(answer.get("error", "yes")))
        case _:
            row.wrong[f"{path}: {status} {answer.get('error', '')}".rstrip()] += 1


def show(srv: Srv) -> tuple[list[Row], list[dict[str, Any]]]:
    """Run the server under each isolation, one after the other, and return the observations."""
    rows, refused = list[Row](), list[dict[str, Any]]()
    for number, isolation in enumerate(ISOLATIONS, 1):
        how = "without users" if isolation == "none" else f'isolation = "{isolation}"'
        say(f"  {number}/{len(ISOLATIONS)}  {how} …")
        server = Server(srv, isolation)
        try:
            server.wait_until_served(next(iter(srv.customers)))
            rows += visit(server, srv, isolation)
            check_signals()
            for host, why in srv.unserved.items() if isolation != "none" else ():
                with server.connect() as connection:
                    status, _ = ask(connection, host, "/whoami")
                found = {"host": host, "why": why, "logged": server.forbidden(host), "status": status}
                good = status == "403" and found["logged"] != ""
                refused.append({**found, "isolation": isolation, "good": good})
        finally:
            server.stop()
    return rows, refused


def write_table(rows: Sequence[Row], refused: Sequence[dict[str, Any]]) -> None:
    """Print the observations."""
    print()
    heads = "customer, isolation, uid, capabilities, own secret, neighbour's, /etc/shadow, files written"
    lines = [[*heads.split(", "), "requests", "p50", ""]]
    for row in rows:
        owners = {f"{count} by {owner}" for owner, count in row.owners.items()}
        seen: list[set[Any]] = [row.uids, row.capabilities, row.own, row.neighbour, row.shadow, owners]
        cells = [", ".join(str(value) for value in sorted(values)) or "-" for values in seen]
        p50 = f"{row.p50:.1f} ms" if row.p50 is not None else "-"
        lines.append([row.customer, row.isolation, *cells, str(row.requests), p50, MARKS[row.good]])
    columns(lines)
    print("\n  Hosts that must be refused:\n")
    columns([[r["host"], r["isolation"], r["status"], r["why"], MARKS[r["good"]]] for r in refused])
    for row in rows:
        for what, count in row.wrong.items():
            print(f"\n  {row.customer}, {row.isolation}: {count} x {what}")


def columns(lines: Sequence[Sequence[str]]) -> None:
    """Print lines in columns."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        cells = [cell.ljust(width) for cell, width in zip(line, widths, strict=True)]
        print("  " + "  ".join(cells).rstrip())


def check_signals() -> None:
    """Raise KeyboardInterrupt if a signal was received."""
    if signals:
        raise KeyboardInterrupt


def say(text: str) -> None:
    """Print progress on standard error."""
    print(text, file=sys.stderr, flush=True)


def check(srv: Srv) -> None:
    """Raise `CannotRun` if the policies cannot be enforced here."""
    if importlib.util.find_spec("gunicorn") is None:
        raise CannotRun("gunicorn is not installed: pip install 'rcon-plugins[gunicorn]'")
    try:
        hierarchy = Hierarchy.discover()
        for settings in (from_mapping(tomllib.loads(policy(srv.path, how))) for how in ISOLATIONS[1:]):
            Plan.make(settings, Traits(threads=True), hierarchy=hierarchy).check()
        find_base(hierarchy, None)
    except RconError as error:
        raise CannotRun(str(error)) from None


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the example and return the exit status."""
    parser = argparse.ArgumentParser(description="Three customers on one gunicorn, each under its own user.")
    parser.add_argument("--json", action="store_true", help="write the result as JSON instead of a table")
    options = parser.parse_args(arguments)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: signals.append(number))
    try:
        if os.geteuid() != 0:
            raise CannotRun("this needs root, which can switch users (sudo make demo-customers)")
        with contextlib.closing(Srv()) as srv:
            srv.fill()
            check(srv)
            say(f"gunicorn, {THREADS} threads; {len(NAMES)} customers, {CLIENTS} clients each, all at once")
            rows, refused = show(srv)
    except (CannotRun, RuntimeError) as error:
        say(f"{'This cannot run here: ' if isinstance(error, CannotRun) else ''}{error}")
        return 2 if isinstance(error, CannotRun) else 1
    except KeyboardInterrupt:
        say("\ninterrupted")
        return 130
    good = all(row.good is not False for row in rows) and all(one["good"] for one in refused)
    if options.json:
        data = [row.as_dict() for row in rows]
        print(json.dumps({"good": good, "rows": data, "refused": refused}, indent=2))
    else:
        write_table(rows, refused)
        print("\n  Every check passed." if good else "\n  A check failed: see ✗.")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
