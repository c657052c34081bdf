"""A real gunicorn on loopback, as the tests see it from outside."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from tests.integrations.gunicorn import template
from tests.integrations.gunicorn.fields import fields_in
from tests.processes import PATIENCE, children, executor_pids, instance_directories, until

HERE = Path(__file__).resolve().parent


class Answer(NamedTuple):
    """What a request brought."""

    status: int
    headers: http.client.HTTPMessage
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


class Gunicorn:
    """One gunicorn with `application`; ended by `stop`, and by leaving a ``with`` block."""

    def __init__(
        self,
        directory: Path,
        settings: str | None,
        *arguments: str,
        config: str = "python:rcon_gunicorn.conf",
        environ: dict[str, str] | None = None,
        app: str = "application:app",
        inherit: bool = True,
        control: Path | None = None,
        health: str = "/free/who",
        plain: bool = False,
        confined: bool = True,
    ) -> None:
        """``plain`` keeps gunicorn's own log lines; else the fields of rcon's records stand behind them.

        ``confined``: with ``config``, that of rcon.

        ``inherit`` hands the socket over, so that no port is ever taken; else gunicorn binds it itself.

        ``control``: the path of gunicorn's control socket. ``health``: a path that answers 200 once it serves.
        """
        self.health = health
        self._confined = confined
        self.directory = directory
        self.arguments = arguments
        self.settings = directory / "rcon.toml"
        self.log_file = directory / "log"
        self._instance: list[Path] = []
        if settings is not None:
            self.settings.write_text(settings)
        listener = socket.create_server(("127.0.0.1", 0), backlog=512)
        self.port: int = listener.getsockname()[1]
        command = ["--chdir", str(HERE)]
        command += ["--control-socket", str(control)] if control is not None else ["--no-control-socket"]
        command += ["--bind", f"fd://{listener.fileno()}" if inherit else f"127.0.0.1:{self.port}"]
        command += ["--graceful-timeout", "10", *(["--config", config] if confined else [])]
        command += [] if plain else ["--logger-class", "fields.FieldsLogger"]
        command += ["--worker-tmp-dir", "/dev/shm", *arguments, app]
        if not inherit:
            listener.close()
        whole = {**os.environ, "RCON_SETTINGS": str(self.settings), **(environ or {})}
        with self.log_file.open("ab") as log:
            self.process = template.start(
                command, whole, log.fileno(), listener.fileno() if inherit else None
            )
        listener.close()

    def __enter__(self) -> Gunicorn:
        return self.wait_until_served()

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        return self.process.pid

    def wait_until_served(self) -> Gunicorn:
        try:
            until(lambda: self.process.poll() is not None or self.status(self.health) == 200)
            until(self.is_booted)  # gunicorn does not make all workers at once
            assert self.process.poll() is None
        except AssertionError:
            self.stop()
            raise AssertionError(f"the server did not start:\n{self.log()[-3000:]}") from None
        return self

    def is_booted(self) -> bool:
        """Whether each worker has come as far as to its fork server, if it has one; or the master is gone."""
        gone = self.process.poll() is not None
        return gone or not self._confined or all(map(children, self.workers()))

    def log(self) -> str:
        return self.log_file.read_text(errors="replace")

    def lines(self) -> list[dict[str, Any]]:
        """The fields of the records in the log."""
        return fields_in(self.log())

    def get(self, path: str, **headers: str) -> Answer:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        with contextlib.closing(connection):
            connection.request("GET", path, headers={"Connection": "close", **headers})
            response = connection.getresponse()
            return Answer(response.status, response.headers, response.read())

    def status(self, path: str) -> int | str:
        """The status of a request, "cut" where the connection broke, "none" where no answer came in time."""
        try:
            return self.get(path).status
        except TimeoutError:
            return "none"
        except (OSError, http.client.HTTPException):
            return "cut"

    def workers(self) -> list[int]:
        return children(self.pid)

    def cgroups(self) -> list[Path]:
        """The directories of this server's instance, one in each hierarchy."""
        return instance_directories(self.pid)

    def instance(self) -> list[Path]:
        """`cgroups`, which it looks for once: each look reads all cgroups of this machine."""
        if not self._instance:
            self._instance = self.cgroups()
        return self._instance

    def executors(self, policy: str = "free") -> list[int]:
        """The pids of the executor processes of a policy, and of what they started."""
        return executor_pids(self.instance(), policy)

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def stop(self) -> int:
        """End it, gracefully first, and return its exit status."""
        with contextlib.suppress(AssertionError):
            until(self.is_booted, 5)  # gunicorn loses a SIGTERM sent to a worker that just began
        if self.process.poll() is None:
            self.process.terminate()
        try:
            return self.process.wait(timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            for pid in (*self.workers(), self.pid):
                os.kill(pid, signal.SIGKILL)
            self.process.wait()
            raise AssertionError(f"the server did not end:\n{self.log()}") from None


class Load:
    """Clients that ask for one path again and again while the ``with`` block runs."""

    def __init__(self, server: Gunicorn, path: str = "/free/who", clients: int = 4) -> None:
        self.answers: Counter[int | str] = Counter()
        #: How often code ran that was not confined.
        self.unconfined = 0
        self._server = server
        self._path = path
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run) for _ in range(clients)]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def wait_for_answers(self, more: int) -> None:
        """Wait until so many more requests were served."""
        aim = self.answers[200] + more
        until(lambda: self.answers[200] >= aim)

    def wait_for_answers_of_any_kind(self, more: int) -> None:
        """Wait until so many more requests ended, however."""
        aim = self.answers.total() + more
        until(lambda: self.answers.total() >= aim)

    def _run(self) -> None:
        while not self._stop.is_set():
            status: int | str
            try:
                answer = self._server.get(self._path)
                status = answer.status
                if status == 200 and not answer.json()["confined"]:
                    self.unconfined += 1
            except TimeoutError:
                status = "none"
            except (OSError, http.client.HTTPException):
                status = "cut"
            self.answers[status] += 1
            # Without a pause the clients take the CPU from the processes that the test waits for.
            time.sleep(0.01 if status == 200 else 0.02)
