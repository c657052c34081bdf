"""Fixtures of all integration tests: one PostgreSQL for each test run."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.postgresql import PostgresServer


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[PostgresServer]:
    """The PostgreSQL of this test run. ``postgres_server.database()`` returns the name of an empty database."""
    with PostgresServer() as server:
        yield server
