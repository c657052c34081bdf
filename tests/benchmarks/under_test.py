"""The gunicorn servers that are compared. They differ only in how they are confined."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from wire import Connection

HERE = Path(__file__).resolve().parent

#: The policy of each server. Servers without one are plain gunicorn.
POLICIES = {
    "inline": 'isolation = "inline"\npids = 256',
    "thread": 'isolation = "thread"\npids = 256\nuser = 65534\ngroup = 65534',
    "process": 'isolation = "process"\nmemory = "256M"\npids = 64\ncpu = "200%"',
}
#: The application of each server that does not serve the plain hello-world application.
APPLICATIONS = {"new thread": "each_anew:new_thread", "new process": "each_anew:new_process"}


class Gunicorn:
    """A server with the hello-world application: one gthread worker with eight threads."""

    def __init__(self, mode: str, checkout: Path | None = None) -> None:
        """``checkout`` is the directory to import rcon_plugins and the adapters from; None: what is installed."""
        self.mode = mode
        self._files = tempfile.TemporaryDirectory(prefix="rcon-bench-")
        listener = socket.create_server(("127.0.0.1", 0), backlog=256)
        self.port: int = listener.getsockname()[1]
        command = [sys.executable, "-m", "gunicorn", APPLICATIONS.get(mode, "hello:app")]
        command += ["--chdir", str(HERE), "--no-control-socket"]
        command += ["--worker-class", "gthread", "--threads", "8", "--keep-alive", "60"]
        command += ["--bind", f"fd://{listener.fileno()}"]
        environ = dict(os.environ)
        if checkout is not None:
            environ["PYTHONPATH"] = f"{checkout}:{checkout / 'integrations'}"
        policy = POLICIES.get(mode)
        if policy is not None:
            settings = Path(self._files.name, "rcon.toml")
            settings.write_text(f"[policy.default]\n{policy}\n")
            command += ["--config", "python:rcon_gunicorn.conf"]
            environ["RCON_SETTINGS"] = str(settings)
        self._log = Path(self._files.name, "log")
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                command,
                cwd=self._files.name,  # `python -m` imports from the working directory first
                env=environ,
                stdout=log,
                stderr=log,
                pass_fds=[listener.fileno()],
                start_new_session=True,
            )
        listener.close()
        self._wait_until_served()

    @property
    def pid(self) -> int:
        """The process id of the master."""
        return self._process.pid

    def stop(self) -> None:
        """Stop the server."""
        self._process.terminate()
        try:
            self._process.wait(timeout=15)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._files.cleanup()

    def _wait_until_served(self) -> None:
        deadline = time.monotonic() + 20
        while True:
            try:
                Connection(self.port).close()
            except (OSError, RuntimeError) as error:
                if self._process.poll() is not None or time.monotonic() > deadline:
                    log = self._log.read_text()
                    self.stop()
                    raise RuntimeError(f"the {self.mode} server did not start: {error}\n{log}") from error
                time.sleep(0.1)
            else:
                return
