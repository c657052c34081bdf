"""Start the example under gunicorn on a loopback port, and stop it."""

from __future__ import annotations

import ctypes
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

from rcon_plugins import load as load_settings
from rcon_plugins.confinement.isolation import Server as Traits
from rcon_plugins.confinement.plan import Plan
from rcon_plugins.errors import RconError
from rcon_plugins.kernel.cgroup import Hierarchy
from rcon_plugins.tree.base import find_base

HERE = Path(__file__).resolve().parent
SETTINGS = HERE / "rcon.toml"
WORKERS = 2
THREADS = 8

_PR_SET_PDEATHSIG = 1


def why_not(cgroup: str | None) -> str | None:
    """Return why the example cannot be confined here, with the remedy; None if it can."""
    if importlib.util.find_spec("gunicorn") is None:
        return "gunicorn is not installed (run `make demo`, or pip install 'rcon-plugins[gunicorn]')"
    try:
        hierarchy = Hierarchy.discover()
        Plan.make(load_settings(str(SETTINGS)), Traits(threads=True), hierarchy=hierarchy).check()
        find_base(hierarchy, cgroup)
    except RconError as error:
        if os.geteuid() == 0 or cgroup is not None:
            return str(error)
        steps = str(error).replace("; ", ";\n    ")
        return (
            "run it as root: sudo make demo\n"
            "or, without root, get a cgroup of your own and name it with --cgroup:\n"
            f"    {steps}"
        )
    return None


class Server:
    """One gunicorn with the example application, confined by ``rcon.toml`` or unconfined."""

    def __init__(self, *, confined: bool, port: int = 0, cgroup: str | None = None) -> None:
        self.mark = f"tenants-{os.getpid()}-{'confined' if confined else 'unconfined'}"
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as the server runs
        listener = socket.create_server(("127.0.0.1", port), backlog=256)
        self.port: int = listener.getsockname()[1]
        command = [sys.executable, "-m", "gunicorn", "app:app", "--chdir", str(HERE), "--name", self.mark]
        command += ["--worker-class", "gthread", "--workers", str(WORKERS), "--threads", str(THREADS)]
        command += ["--bind", f"fd://{listener.fileno()}", "--no-control-socket", "--graceful-timeout", "5"]
        environ = dict(os.environ)
        if confined:
            command += ["--config", "python:rcon_gunicorn.conf"]
            environ["RCON_SETTINGS"] = str(SETTINGS)
            if cgroup is not None:
                self._settings = tempfile.NamedTemporaryFile("w", suffix=".toml")  # noqa: SIM115 - as above
                self._settings.write(f"cgroup = {json.dumps(cgroup)}\n{SETTINGS.read_text()}")
                self._settings.flush()
                environ["RCON_SETTINGS"] = self._settings.name
        self._process = subprocess.Popen(
            command,
            env=environ,
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            pass_fds=[listener.fileno()],
            start_new_session=True,
            preexec_fn=_end_with_parent,
        )
        listener.close()

    @property
    def pid(self) -> int:
        """The pid of gunicorn's master."""
        return self._process.pid

    def running(self) -> bool:
        """Return whether the master is running."""
        return self._process.poll() is None

    def wait(self) -> int:
        """Wait until the master ends."""
        return self._process.wait()

    def log(self) -> str:
        """Return what the server has written to its log."""
        size = os.fstat(self._log.fileno()).st_size
        return os.pread(self._log.fileno(), size, 0).decode(errors="replace")

    def stop(self) -> None:
        """Stop the server, gracefully first."""
        if self.running():
            self._process.terminate()
        try:
            self._process.wait(timeout=15)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._log.close()


def _end_with_parent() -> None:
    """In the child: have the kernel send SIGTERM when the demonstration itself is killed."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
