"""Kernel files, read and written below a directory."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from rcon_plugins.errors import KernelError
from rcon_plugins.kernel import files


def test_whether_files_are_empty(tmp_path: Path) -> None:
    (tmp_path / "full").write_text("1")
    (tmp_path / "void").touch()
    assert files.are_empty(str(tmp_path), ["void", "missing"])
    assert not files.are_empty(str(tmp_path), ["void", "full"])
    assert files.are_empty(str(tmp_path / "missing"), ["full"])


def test_a_file_that_cannot_be_read_is_not_taken_for_empty(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "full")
    (tmp_path / "full").touch()
    with pytest.raises(KernelError) as caught:
        files.are_empty(str(tmp_path), ["link"])
    assert caught.value.errno == errno.ELOOP
    assert caught.value.path == f"{tmp_path}/link"


def test_an_open_directory_writes_and_looks_for_its_files(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "file")
    with files.Directory(str(tmp_path)) as opened:
        assert opened.has("file")
        assert not opened.has("missing")
        assert not opened.has("link")
        opened.write("file", "12")
        with pytest.raises(KernelError) as caught:
            opened.write("missing", "12")
    assert (tmp_path / "file").read_text() == "12"
    assert (caught.value.errno, caught.value.path, caught.value.value) == (
        errno.ENOENT,
        f"{tmp_path}/missing",
        "12",
    )
