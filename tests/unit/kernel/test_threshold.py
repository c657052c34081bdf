"""Thresholds of memory usage on cgroup v1, with files and notices made by hand."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from rcon_plugins.kernel.cgroup.swap import CHARGED_AHEAD
from rcon_plugins.kernel.events import sources

MIB = 1 << 20
AT = 48 * MIB


class Group:
    """A directory with the files of a cgroup, and a threshold there."""

    def __init__(self, directory: Path, of_need: bool) -> None:
        self._directory = directory
        (directory / "memory.stat").write_text("total_mapped_file 0\n")
        self.use(MIB)
        self.threshold = sources.Threshold("/group", str(directory), AT, of_need)
        assert self.events() == 0

    def use(self, usage: int) -> None:
        (self._directory / "memory.usage_in_bytes").write_text(f"{usage}\n")

    def notify(self) -> None:
        os.eventfd_write(self.threshold.descriptor, 1)

    def events(self) -> int:
        return sum(event.count for event in self.threshold.take())


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], Group]:
    flags = os.EFD_CLOEXEC | os.EFD_NONBLOCK
    monkeypatch.setattr(sources, "open_notice", lambda *_: os.eventfd(0, flags))
    return lambda of_need: Group(tmp_path, of_need)


def test_what_was_charged_ahead_and_given_back_hides_no_need(make: Callable[[bool], Group]) -> None:
    group = make(True)
    group.notify()
    group.use(AT - CHARGED_AHEAD // 2)
    assert group.events() == 0
    assert group.threshold.due is not None  # the kernel may notify no more
    group.use(3 * AT)
    assert group.events() == 1
    group.use(AT - 2 * CHARGED_AHEAD)
    assert group.events() == 0
    assert group.threshold.due is None


def test_a_crossing_counts_once_though_it_was_given_back(make: Callable[[bool], Group]) -> None:
    group = make(False)
    group.notify()
    group.use(AT - CHARGED_AHEAD // 2)
    assert group.events() == 1
    group.notify()  # now the kernel has seen it, too
    assert group.events() == 0
    group.notify()
    group.use(AT)
    assert group.events() == 1
    group.notify()
    group.use(MIB)
    assert group.events() == 0
