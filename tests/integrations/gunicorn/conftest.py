"""What the tests with gunicorn find ready."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.integrations.gunicorn.tenants import TENANTS


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
