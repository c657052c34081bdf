"""Fixtures of the Celery tests: one redis-server for all, one RabbitMQ for the tests that use it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import celery
import pytest

from tests.integrations.celery import application
from tests.integrations.celery.launcher import Launcher
from tests.integrations.celery.producers import closing
from tests.integrations.celery.rabbitmq_server import RabbitServer
from tests.integrations.celery.redis_server import RedisServer
from tests.integrations.celery.sessions import Sessions
from tests.integrations.celery.worker import Worker


@pytest.fixture(scope="session", autouse=True)
def launcher() -> Iterator[Launcher]:
    """The process that starts workers, and the commands that tests give to it."""
    with contextlib.closing(Launcher()) as launcher:
        Worker.launcher = launcher
        yield launcher
        Worker.launcher = None


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """The redis-server of this test run. ``redis_server.database()`` returns an empty database."""
    with RedisServer(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture(scope="session")
def rabbitmq_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RabbitServer]:
    """The RabbitMQ of this test run. ``rabbitmq_server.host()`` returns a new virtual host."""
    with RabbitServer(tmp_path_factory.mktemp("rabbitmq")) as server:
        yield server


class RunningWorker(NamedTuple):
    """A worker, the application of its producer, and the records that its tasks wrote."""

    worker: Worker
    app: celery.Celery
    records: application.Records
    url: str


class ApplicationWorkers:
    """Starts workers with the application of these tests, each with its own database."""

    def __init__(self, server: RedisServer, directory: Path) -> None:
        self._server = server
        self._directory = directory

    @contextlib.contextmanager
    def open(
        self,
        *arguments: str,
        pool: str = "prefork",
        confined: bool = True,
        serializer: str = "json",
        concurrency: int = 2,
    ) -> Iterator[RunningWorker]:
        """Run a worker and its producer during the ``with`` block."""
        url = self._server.database()
        environ = application.environment(url, confined=confined, serializer=serializer)
        directory = self._directory / url.rpartition("/")[2]
        directory.mkdir()
        worker = Worker(
            directory, application.__name__, *arguments, pool=pool, concurrency=concurrency, environ=environ
        )
        records = application.Records(url)
        app = application.make(url, serializer=serializer)
        with closing(app), contextlib.closing(records), worker:
            yield RunningWorker(worker, app, records, url)


@pytest.fixture(scope="session")
def application_workers(
    redis_server: RedisServer, tmp_path_factory: pytest.TempPathFactory
) -> ApplicationWorkers:
    return ApplicationWorkers(redis_server, tmp_path_factory.mktemp("workers"))


@pytest.fixture(scope="session")
def sessions(redis_server: RedisServer, tmp_path_factory: pytest.TempPathFactory) -> Sessions:
    return Sessions(redis_server, tmp_path_factory.mktemp("sessions"))
