"""A worker with the tasks of `limited`, and the producer that sends it some."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import celery
import pytest
import redis

from tests.integrations.celery import limited
from tests.integrations.celery.producers import closing
from tests.integrations.celery.redis_server import RedisServer
from tests.integrations.celery.worker import Worker
from tests.processes import executor_pids

#: No result within so many seconds is a hang.
PATIENCE = 120.0

SETTINGS = """
unmatched = "allow"

[policy.small]
memory = "1G"
each = { memory = "128M", timeout = "60s" }
"""

_E = TypeVar("_E", bound=BaseException)


class Session:
    """One worker and its producer."""

    def __init__(self, worker: Worker, app: celery.Celery, url: str, patience: float = PATIENCE) -> None:
        """``patience``: no result within so many seconds is a hang."""
        self._patience = patience
        self.worker = worker
        self.app = app
        self.url = url
        #: Keeps its connection. A new one for each look, 50 times a second, costs a tenth of a CPU.
        self.redis = redis.Redis.from_url(url)

    def close(self) -> None:
        self.redis.close()

    def send(self, name: str, *args: Any, **options: Any) -> Any:
        return self.app.tasks[name].apply_async(args, **options)

    def wait(self, result: Any) -> Any:
        return result.get(timeout=self._patience)

    def get(self, name: str, *args: Any, **options: Any) -> Any:
        """Send a task; return its result or raise its exception."""
        return self.wait(self.send(name, *args, **options))

    def error(self, name: str, kind: type[_E], *args: Any) -> _E:
        """Send a task; return its exception."""
        with pytest.raises(kind) as caught:
            self.get(name, *args)
        return caught.value

    def celery(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run a command of Celery with this application."""
        launcher = self.worker.launcher
        assert launcher is not None
        environ = {**os.environ, limited.BROKER: self.url}
        return launcher.run("-A", limited.__name__, *arguments, environ=environ)

    def log(self, name: str) -> list[str]:
        """Return the lines that tasks logged under a name."""
        lines: Any = self.redis.lrange(f"log:{name}", 0, -1)
        return [line.decode() for line in lines]

    def executors(self) -> list[int]:
        """Return the pids of all confined processes."""
        return executor_pids(self.worker.cgroups())

    @staticmethod
    def end(pid: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


class Sessions:
    """Open sessions, each with its own database."""

    def __init__(self, server: RedisServer, directory: Path) -> None:
        self._server = server
        self._directory = directory
        self._numbers = itertools.count()

    @contextlib.contextmanager
    def __call__(
        self,
        *arguments: str,
        settings: str | None = SETTINGS,
        pool: str = "prefork",
        concurrency: int = 2,
        url: str | None = None,
        **environ: str,
    ) -> Iterator[Session]:
        worker, app, url = self.make(
            *arguments, settings=settings, pool=pool, concurrency=concurrency, url=url, **environ
        )
        with closing(app), worker, contextlib.closing(Session(worker, app, url)) as session:
            yield session

    @contextlib.contextmanager
    def of_one_process(self) -> Iterator[Session]:
        """Open a session whose pool has a single process, and check that no task ends it."""
        with self(concurrency=1) as session:
            (process,) = session.worker.children()
            yield session
            assert session.worker.children() == [process]

    def make(
        self,
        *arguments: str,
        settings: str | None = SETTINGS,
        pool: str = "prefork",
        concurrency: int = 2,
        url: str | None = None,
        name: str = "w",
        **environ: str,
    ) -> tuple[Worker, celery.Celery, str]:
        """Return a worker that is starting, its producer, and the URL of its Redis."""
        directory = self._directory / str(next(self._numbers))
        directory.mkdir()
        url = url or self._server.database()
        environ[limited.BROKER] = url
        if settings is not None:
            path = directory / "rcon.toml"
            path.write_text(settings)
            environ[limited.SETTINGS] = str(path)
        worker = Worker(
            directory,
            limited.__name__,
            *arguments,
            pool=pool,
            concurrency=concurrency,
            name=name,
            environ=environ,
        )
        return worker, limited.make(url, accept=environ.get(limited.ACCEPT, "json"), environ=environ), url


Maker = Callable[..., contextlib.AbstractContextManager[Session]]
