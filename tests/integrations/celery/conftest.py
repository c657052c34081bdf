"""What the tests of Celery share: one redis-server for all of them, and one RabbitMQ where it is asked for."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import celery
import pytest

from tests.integrations.celery import application
from tests.integrations.celery.office import Offices
from tests.integrations.celery.producers import closing
from tests.integrations.celery.rabbitmq_server import RabbitServer
from tests.integrations.celery.redis_server import RedisServer
from tests.integrations.celery.worker import Worker


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """A redis-server of this test run; ask it for a database: ``redis_server.database()``."""
    with RedisServer(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture(scope="session")
def rabbitmq_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RabbitServer]:
    """A RabbitMQ of this test run; ask it for a virtual host: ``rabbitmq_server.host()``."""
    with RabbitServer(tmp_path_factory.mktemp("rabbitmq")) as server:
        yield server


class Open(NamedTuple):
    """A shop that is open: its worker, its producer's application, and what its worker wrote down."""

    worker: Worker
    app: celery.Celery
    records: application.Records
    url: str


class Shop:
    """Starts workers with the application of these tests, each on a database of its own."""

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
    ) -> Iterator[Open]:
        """A worker that takes tasks, and who sends it some, while the ``with`` block runs."""
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
            yield Open(worker, app, records, url)


@pytest.fixture(scope="session")
def shop(redis_server: RedisServer, tmp_path_factory: pytest.TempPathFactory) -> Shop:
    return Shop(redis_server, tmp_path_factory.mktemp("workers"))


@pytest.fixture(scope="session")
def offices(redis_server: RedisServer, tmp_path_factory: pytest.TempPathFactory) -> Offices:
    return Offices(redis_server, tmp_path_factory.mktemp("offices"))
