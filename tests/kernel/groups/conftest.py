"""Instances made by hand, each below a base of its own, gone after the test."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from rcon_plugins.instance import Instance
from rcon_plugins.kernel.cgroup import Cgroup, Hierarchy


@pytest.fixture(scope="session")
def hierarchy() -> Hierarchy:
    return Hierarchy.discover()


@pytest.fixture
def base(hierarchy: Hierarchy) -> Iterator[Cgroup]:
    """A cgroup at the root of the tree; its name is in the names of the groups, which others' tests have too."""
    cgroup = hierarchy.cgroup(f"/rcon-tests-{os.getpid()}")
    cgroup.create()
    try:
        yield cgroup
    finally:
        cgroup.kill()
        assert cgroup.delete()


@pytest.fixture
def instance(hierarchy: Hierarchy, base: Cgroup) -> Iterator[Instance]:
    made = Instance.create(hierarchy, base=base.path)
    try:
        yield made
    finally:
        assert made.close()


@pytest.fixture
def own() -> str:
    """A prefix for names of groups that no other test on this machine has."""
    return f"t{os.getpid()}"
