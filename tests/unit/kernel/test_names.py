"""What may be the name of a cgroup is decided before any system call."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rcon_plugins.kernel.cgroup import Hierarchy
from rcon_plugins.kernel.cgroup.branch import check_name, check_path
from rcon_plugins.kernel.cgroup.mounts import Mount

BASE = Hierarchy.of([Mount(2, "/nowhere")]).cgroup("/base")

BREAKING_OUT = [
    "", ".", "..", "../../x", "a/b", "/", "a\0b", "a\nb", "x" * 256, "é" * 128, "a\u2028b", "\ud800",
    "\x7f", "tasks", "notify_on_release", "release_agent", "cgroup.procs", "cgroup.x", "memory.max", "cpu.max",
]  # fmt: skip


@pytest.mark.parametrize("name", BREAKING_OUT)
def test_names_that_leave_the_directory_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r".+"):
        BASE.child(name)


@pytest.mark.parametrize("name", ["a", "tenant~www.example.org", "12-3", "x" * 255, "...", "müller", "cpu"])
def test_names(name: str) -> None:
    assert BASE.child(name).path == f"/base/{name}"
    assert BASE.child(name).name == name


@given(st.text())
def test_a_name_is_one_component_or_refused(name: str) -> None:
    try:
        check_name(name)
    except ValueError:
        return
    assert "/" not in name
    assert name not in ("", ".", "..")
    assert len(name.encode()) <= 255


@pytest.mark.parametrize("path", ["", "a", "/a//b", "/a/", "/..", "/a/../b", "/a\n", "/\0"])
def test_paths_that_are_not_plain_are_refused(path: str) -> None:
    with pytest.raises(ValueError, match=r".+"):
        check_path(path)


@pytest.fixture(autouse=True)
def no_system_calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Opening anything fails the test."""

    def refuse(*arguments: object, **keywords: object) -> int:
        raise AssertionError(arguments)

    with monkeypatch.context() as patch:
        patch.setattr("os.open", refuse)
        patch.setattr("os.mkdir", refuse)
        yield
