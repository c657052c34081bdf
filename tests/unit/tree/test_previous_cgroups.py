"""The record of the previous cgroups of attached processes: what it says where it cannot be read."""

from __future__ import annotations

import errno
import os
import resource
from pathlib import Path

import pytest

from rcon_plugins.errors import KernelError
from rcon_plugins.tree import previous_cgroups, runtime
from rcon_plugins.tree.previous_cgroups import PreviousCgroups

INSTANCE = "rcon-1-1"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(runtime, "folder", lambda: str(tmp_path))
    return tmp_path


def test_a_record_that_cannot_be_read_is_no_empty_one() -> None:
    """Processes would be moved to the root of the tree, out of limits that held for them before."""
    saved = PreviousCgroups({(1, 2): {"/sys/fs/cgroup": "/outer"}})
    previous_cgroups.save(INSTANCE, saved)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.dup(0)
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free, hard))
    try:
        with pytest.raises(KernelError) as caught:
            previous_cgroups.load(INSTANCE)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert caught.value.errno == errno.EMFILE
    assert previous_cgroups.load(INSTANCE) == saved


def test_a_missing_or_damaged_record_is_empty(folder: Path) -> None:
    assert previous_cgroups.load(INSTANCE) == PreviousCgroups({})
    for damaged in (b"", b"[", b"[5]", b"{}", b"\xff"):
        (folder / f"{INSTANCE}.json").write_bytes(damaged)
        assert previous_cgroups.load(INSTANCE) == PreviousCgroups({})
