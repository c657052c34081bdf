"""A place in the real tree for each test, gone after it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from rcon_plugins.kernel.cgroup import Cgroup, Hierarchy


@pytest.fixture(scope="session")
def hierarchy() -> Hierarchy:
    return Hierarchy.discover()


@pytest.fixture
def base(hierarchy: Hierarchy) -> Iterator[Cgroup]:
    """An existing cgroup at the root of the tree, under a name that no instance has and no other test run."""
    cgroup = hierarchy.cgroup(f"/rcon-tests-{os.getpid()}")
    cgroup.create()
    try:
        yield cgroup
    finally:
        cgroup.kill()
        assert cgroup.delete()
        assert not any(Path(directory).exists() for directory in cgroup.directories)


@pytest.fixture
def group(base: Cgroup) -> Cgroup:
    """For what needs no more than a cgroup."""
    return base
