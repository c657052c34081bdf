"""What the tests with gunicorn find ready."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integrations.gunicorn import template
from tests.integrations.gunicorn.tenants import TENANTS


@pytest.fixture(scope="session", autouse=True)
def servers_are_forks() -> Iterator[None]:
    """Start the servers of these tests as forks of a process with gunicorn's modules."""
    with template.running():
        yield


@pytest.fixture
def homes(tmp_path: Path) -> Path:
    """A directory for each tenant, that the tenant owns; and some that nobody may be served as the owner of."""
    found = tmp_path / "homes"
    found.mkdir()
    for name, uid in {**TENANTS, "root": 0, "daemon": 1}.items():
        (found / name).mkdir()
        os.chown(found / name, uid, uid)
    (found / "out").symlink_to("/var/empty")
    (found / "elsewhere").symlink_to("tenant1")
    return found
