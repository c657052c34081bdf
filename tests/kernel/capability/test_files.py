"""File capabilities on real files, and the attributes read from a file that will be executed."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rcon_plugins.errors import CapabilityError, KernelError
from rcon_plugins.kernel.capability import (
    Capabilities,
    FileCapabilities,
    Identity,
    drop,
    read_file_capabilities,
    write_file_capabilities,
)
from rcon_plugins.kernel.capability.exec_rule import File

RAW = Capabilities.of("net_raw")
HIGH = Capabilities.of("chown", "checkpoint_restore")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "program"
    path.write_bytes(b"")
    return path


@pytest.mark.parametrize(
    "capabilities",
    [
        FileCapabilities(RAW, Capabilities.none(), True),
        FileCapabilities(HIGH, RAW, False),
        FileCapabilities(),
        FileCapabilities(HIGH, HIGH, True, rootid=1000),
    ],
    ids=str,
)
def test_write_and_read(file: Path, capabilities: FileCapabilities) -> None:
    assert read_file_capabilities(str(file)) is None
    write_file_capabilities(str(file), capabilities)
    assert read_file_capabilities(str(file)) == capabilities
    descriptor = os.open(file, os.O_RDONLY)
    try:
        assert read_file_capabilities(descriptor) == capabilities
        write_file_capabilities(descriptor, None)
        assert read_file_capabilities(str(file)) is None
        write_file_capabilities(descriptor, None)  # the file has no capabilities: no error
    finally:
        os.close(descriptor)


@pytest.mark.smoke
def test_version_3_of_uid_0_is_shown_as_version_2(file: Path) -> None:
    write_file_capabilities(str(file), FileCapabilities(RAW, RAW, True, rootid=0))
    assert read_file_capabilities(str(file)) == FileCapabilities(RAW, RAW, True)


def test_files_without_support_for_capabilities(file: Path) -> None:
    with pytest.raises(KernelError) as caught:
        read_file_capabilities(f"{file}-missing")
    assert caught.value.errno == errno.ENOENT
    assert read_file_capabilities("/proc/self/status") is None  # the file system has no extended attributes
    with pytest.raises(KernelError, match=r"no file capabilities|Operation not supported|not permitted"):
        write_file_capabilities("/proc/self/status", FileCapabilities(RAW))


def test_writing_takes_a_capability(file: Path, in_child: Any) -> None:
    def child() -> str:
        drop(Identity(0, 0))
        with pytest.raises(CapabilityError) as caught:
            write_file_capabilities(str(file), FileCapabilities(RAW))
        return str(caught.value)

    assert "cap_setfcap is not effective (run as root)" in in_child(child)


def test_a_binary(file: Path) -> None:
    os.chown(file, 12, 34)
    file.chmod(0o6751)
    write_file_capabilities(str(file), FileCapabilities(Capabilities.of("net_raw", 63), RAW, True))
    assert File.of(str(file)) == File(
        path=str(file),
        mode=stat.S_ISUID | stat.S_ISGID | 0o751,
        uid=12,
        gid=34,
        capabilities=FileCapabilities(RAW, RAW, True),  # the kernel ignores capability 63
        nosuid=False,
    )


def test_nosuid() -> None:
    """Each of these paths is on a mount that exists in this test tier."""
    mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    for path in ("/proc", "/sys", "/dev/pts"):
        options = [words[3].split(",") for words in mounts if words[1] == path][-1]
        assert File.of(path).nosuid == ("nosuid" in options)


@pytest.mark.parametrize(
    "line",
    ["#!{}", "#!{}\n", "#! {} \nrest", "#!\t{}\t-x y\n", "#!{} argument", "#!  {}\0 hidden"],
)
def test_a_script(tmp_path: Path, file: Path, line: str) -> None:
    script = tmp_path / "script"
    script.write_text(line.format(file))
    script.chmod(0o4755)
    found = File.of(str(script))
    assert found.path == str(file)
    assert [(one.path, one.sets_uid) for one in found.scripts] == [(str(script), True)]


@pytest.mark.parametrize(
    "content", ["", "#", "#!", "#!\n", "#! \n/bin/sh", "#!" + "/x" * 200, "#!/bin/sh-missing\n"]
)
def test_invalid_scripts_fail_as_execve_does(tmp_path: Path, content: str) -> None:
    script = tmp_path / "script"
    script.write_text(content)
    script.chmod(0o755)
    answer = errno_of(File.of, str(script))
    if not content.startswith("#!"):
        assert answer == 0  # the file counts as a binary, whose format is not checked
    else:
        assert answer == errno_of(execute, str(script)) != 0


@pytest.mark.parametrize("count", [5, 6])
def test_scripts_of_scripts(tmp_path: Path, count: int) -> None:
    interpreter = "/bin/true"
    for number in range(count):
        script = tmp_path / str(number)
        script.write_text(f"#!{interpreter}\n")
        script.chmod(0o755)
        interpreter = str(script)
    answer = errno_of(File.of, interpreter)
    assert answer == errno_of(execute, interpreter) == (errno.ELOOP if count > 5 else 0)
    if count <= 5:
        assert len(File.of(interpreter).scripts) == count


def execute(path: str) -> None:
    subprocess.run([path], check=False, timeout=10)


def errno_of(act: Callable[..., object], *arguments: object) -> int | None:
    """Return the errno of the call; 0 if it succeeds."""
    try:
        act(*arguments)
    except OSError as error:
        return error.errno
    return 0
