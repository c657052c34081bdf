"""A real RabbitMQ on loopback for one test run, with its own ports, node name, cookie and directories."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import itertools
import json
import os
import secrets
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

from kombu.connection import Connection

from tests.integrations.celery.redis_server import free_port
from tests.processes import family

#: How long it may take to start, or to end, seconds. Erlang takes some on a machine with other things to do.
PATIENCE = 120.0
#: What starts it, and not what is in the PATH: that becomes another user, and uses the machine's own directories.
PROGRAM = Path("/usr/lib/rabbitmq/bin/rabbitmq-server")
#: How many virtual hosts it has: each test gets one for itself.
HOSTS = 16


class RabbitServer:
    """One RabbitMQ without plugins; `stop`, or the end of a ``with`` block, ends it.

    Its node registers with a daemon of Erlang's, epmd, which goes on when the node has ended. That one is started here,
    as a child of the tests; else the node would start it.
    """

    def __init__(self, directory: Path) -> None:
        epmd = shutil.which("epmd")
        if epmd is None or not PROGRAM.exists():
            raise RuntimeError("RabbitMQ not found. As root: apt-get install rabbitmq-server")
        self._hosts = itertools.count()
        for number in range(5):
            home = directory / str(number)
            home.mkdir()
            self._output = home / "output"
            self._user, self._password = "tests", secrets.token_hex(8)
            self.port, ports = free_port(), {"epmd": free_port(), "distribution": free_port()}
            self._configure(home)
            environ = self._environment(home, **ports)
            with self._output.open("wb") as output:
                self._epmd, self._server = (
                    subprocess.Popen(
                        command,
                        env=environ,
                        cwd=home,
                        stdin=subprocess.DEVNULL,
                        stdout=output,
                        stderr=output,
                        start_new_session=True,  # Ctrl-C is for pytest, which ends them
                    )
                    for command in ([epmd, "-port", str(ports["epmd"]), "-address", "127.0.0.1"], [PROGRAM])
                )
            if self._answers():
                return
            self.stop()  # another process took a port, or it does not start
        raise AssertionError(f"RabbitMQ did not start:\n{self._output.read_text()}")

    def __enter__(self) -> RabbitServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def host(self) -> str:
        """Return the URL of an unused virtual host."""
        number = next(self._hosts)
        if number >= HOSTS:
            raise RuntimeError(
                f"more than {HOSTS} virtual hosts; rabbitmq_server.HOSTS says how many there are"
            )
        return self._url(number)

    def stop(self) -> None:
        """Kill all its processes; its files are not needed any more."""
        everybody = family(self._server.pid)  # they have sessions of their own
        for process in (self._server, self._epmd):
            if process.poll() is None:
                process.kill()
            process.wait(PATIENCE)
        for pid in everybody:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _url(self, number: int) -> str:
        return f"amqp://{self._user}:{self._password}@127.0.0.1:{self.port}/h{number}"

    def _configure(self, home: Path) -> None:
        salt = os.urandom(4)
        digest = salt + hashlib.sha256(salt + self._password.encode()).digest()
        hosts = [f"h{number}" for number in range(HOSTS)]
        everything = {"configure": ".*", "write": ".*", "read": ".*"}
        definitions = {
            "users": [{"name": self._user, "password_hash": base64.b64encode(digest).decode(), "tags": ""}],
            "vhosts": [{"name": host} for host in hosts],
            "permissions": [{"user": self._user, "vhost": host, **everything} for host in hosts],
        }
        (home / "definitions.json").write_text(json.dumps(definitions))
        (home / "rabbitmq.conf").write_text(
            f"listeners.tcp.1 = 127.0.0.1:{self.port}\nload_definitions = {home}/definitions.json\n"
        )
        cookie = home / ".erlang.cookie"
        cookie.write_text(secrets.token_hex(16))
        cookie.chmod(0o400)

    def _environment(self, home: Path, *, epmd: int, distribution: int) -> dict[str, str]:
        theirs = {
            name: value for name, value in os.environ.items() if not name.startswith(("RABBITMQ_", "ERL_"))
        }
        return {
            **theirs,
            "HOME": str(home),
            "ERL_EPMD_PORT": str(epmd),
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODENAME": f"rcon-{os.getpid()}@localhost",
            "RABBITMQ_DIST_PORT": str(distribution),
            "RABBITMQ_CONF_ENV_FILE": str(home / "none"),
            "RABBITMQ_CONFIG_FILE": str(home / "rabbitmq.conf"),
            "RABBITMQ_MNESIA_BASE": str(home / "mnesia"),
            "RABBITMQ_LOG_BASE": str(home / "log"),
            "RABBITMQ_LOGS": str(home / "rabbitmq.log"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(home / "plugins"),  # there is none: no plugins
            "RABBITMQ_PID_FILE": str(home / "pid"),
        }

    def _answers(self) -> bool:
        deadline = time.monotonic() + PATIENCE
        while self._server.poll() is None and self._epmd.poll() is None and time.monotonic() < deadline:
            # Its own password: another server may have taken the port.
            connection: Any = Connection(self._url(HOSTS - 1), connect_timeout=5)  # type: ignore[no-untyped-call]
            with contextlib.suppress(*connection.connection_errors), connection:
                connection.connect()
                return True
            time.sleep(0.1)
        return False
