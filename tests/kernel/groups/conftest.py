"""Instances made by hand, each below a base of its own, gone after the test."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from rcon_plugins.kernel.cgroup import Cgroup, Hierarchy
from rcon_plugins.tree.instance import Instance


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
