"""rcon check with and without a usable cgroup; the commands of docs/reference/check.md."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rcon_plugins import Manager, Plan, load
from rcon_plugins.cli.machine import check
from rcon_plugins.cli.rcon import run_main
from rcon_plugins.errors import DelegationError, SettingsError
from rcon_plugins.kernel.cgroup import Cgroup, Hierarchy
from tests.directories import let_others_read

ROOT = Path(__file__).resolve().parents[3]
NOBODY = 65534
FEWEST = 6


@pytest.fixture
def base() -> Iterator[Cgroup]:
    """Return a cgroup that does not exist yet. Remove the cgroups below it afterwards."""
    cgroup = Hierarchy.discover().cgroup(f"/rcon-check-{os.getpid()}")
    try:
        yield cgroup
    finally:
        cgroup.delete()
        assert not any(Path(directory).exists() for directory in cgroup.directories)


@pytest.mark.smoke
@pytest.mark.each_layout
def test_settings_that_can_be_enforced(
    base: Cgroup, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "rcon.toml"
    path = f"/rcon-check-{os.getpid()}"
    file.write_text(
        f'cgroup = "{path}"\n[policy.web]\npids = 8\n[policy.site]\nuser = "nobody"\nmemory = "64M"\n'
    )
    assert run_main(["check", str(file)]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "\nsite: process - " in out
    assert out.endswith(f"\n{file}: 2 policies can be enforced here, below the cgroup {path}\n")
    assert "REFUSED" not in out
    assert not any(Path(directory).exists() for directory in base.directories)

    assert run_main(["check", "--json", str(file)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found.keys() == {"file", "good", "cgroup", "policies", "notes", "problem"}
    assert (found["good"], found["cgroup"], found["problem"]) == (True, path, None)
    assert {name: one["isolation"] for name, one in found["policies"].items()} == {
        "web": "inline",
        "site": "process",
    }


@pytest.mark.once
@pytest.mark.each_layout
def test_a_refused_file_makes_no_cgroup(
    base: Cgroup, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "rcon.toml"
    file.write_text(f'cgroup = "/rcon-check-{os.getpid()}"\n[policy.web]\ncpus = "4000"\n')
    assert run_main(["check", str(file)]) == 1
    assert "REFUSED: cpus: CPUs 4000 do not exist" in capsys.readouterr().out
    assert not any(Path(directory).exists() for directory in base.directories)


def test_a_cgroup_that_is_a_file_of_the_kernel_is_refused_with_its_key(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also characters that control a terminal do not reach it, as TOML allows them in keys."""
    file = tmp_path / "rcon.toml"
    file.write_text('cgroup = "/cgroup.procs"\n[policy.web]\npids = 5\n')
    assert run_main(["check", str(file)]) == 1
    said = " ".join(capsys.readouterr().out.split())
    assert f"REFUSED: {file}: cgroup: " in said
    assert 'is a file of the kernel (choose another path: cgroup = "/rcon")' in said
    with pytest.raises(DelegationError, match=rf"^{file}: cgroup: .* is a file of the kernel") as refused:
        Manager(load(file)).deploy()
    assert run_main(["check", "--json", str(file)]) == 1
    problem = json.loads(capsys.readouterr().out)["problem"]
    assert (problem["key"], problem["remedy"]) == (None, refused.value.hint)
    assert f"{file}: {problem['reason']}" == refused.value.problem

    file.write_text('[policy.web]\n"a\\u001b[31m\\nb" = 5\n')
    assert run_main(["check", str(file)]) == 1
    assert 'policy.web."a\\x1b[31m\\nb": unknown key' in capsys.readouterr().out


@pytest.mark.each_layout
def test_a_missing_disk_is_reported_with_its_policy(
    base: Cgroup, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "rcon.toml"
    file.write_text(
        f'cgroup = "/rcon-check-{os.getpid()}"\n[policy.web]\npids = 8\n'
        '[policy.a]\nio."/no/such" = { write = "5M" }\n'
        '[policy.b]\neach = { io."/proc" = { read = "5M" } }\n'
    )
    assert run_main(["check", "--json", str(file)]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["problem"] is None
    told = {name: [one["limit"] for one in policy["problems"]] for name, policy in found["policies"].items()}
    assert told == {"web": [], "a": ["io./no/such"], "b": ["each.io./proc"]}
    assert not any(Path(directory).exists() for directory in base.directories)
    with pytest.raises(
        SettingsError, match=r": policy\.a\.io\./no/such: cannot be enforced on this machine: "
    ):
        Plan.make(load(file)).check()


@pytest.mark.each_layout
def test_without_a_delegated_cgroup(tmp_path: Path, in_child: Any) -> None:
    """An ordinary user gets the commands that make a cgroup, each on a line of its own."""
    file = tmp_path / "rcon.toml"
    file.write_text("[policy.web]\npids = 8\n")
    file.chmod(0o644)
    here = os.open(tmp_path, os.O_PATH)

    def of_nobody() -> tuple[str, bool, str, bool]:
        os.fchdir(here)
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
        file = "rcon.toml"
        return (*check.check(file, "gthread", False), *check.check(file, "gthread", True))

    let_others_read(tmp_path)
    try:
        text, good, as_json, good_too = in_child(of_nobody)
    finally:
        os.close(here)
    assert (good, good_too) == (False, False)
    lines = text.splitlines()
    refused = next(number for number, line in enumerate(lines) if line.startswith("REFUSED: rcon.toml: "))
    problem = json.loads(as_json)["problem"]
    # On v2 the reason also says why systemd gives no cgroup.
    assert problem["reason"].startswith("no cgroup is delegated to this process")
    first = next(number for number, line in enumerate(lines) if line.startswith(" " * 8))
    lead, *steps = lines[first - 1 :]
    assert len(steps) > 1
    assert f"{lead.strip()} {'; '.join(step.strip() for step in steps)}" == problem["remedy"]
    assert (
        " ".join(line.strip() for line in lines[refused : first - 1])
        == f"REFUSED: rcon.toml: {problem['reason']}"
    )
    assert (lead[:4], steps[0][:8]) == (" " * 4, " " * 8)
    assert steps[-1].startswith(("    and set cgroup = ", "    or start it with: "))


@pytest.mark.once
@pytest.mark.each_layout
def test_a_limit_is_named_by_its_key(base: Cgroup, tmp_path: Path) -> None:
    """The reason for isolation = "process" names the limit by its key."""
    file = tmp_path / "rcon.toml"
    file.write_text(f'cgroup = "/rcon-check-{os.getpid()}"\n[policy.web]\nmemory = "64M"\n')
    text, good = check.check(str(file), "sync", as_json=False)
    assert good
    assert text.startswith("web: process - memory: a thread cannot have memory limits of its own\n")


def test_commands_of_the_documentation(tmp_path: Path) -> None:
    """The commands use the file in docs/reference/check.md, and print the output shown there."""
    page = (ROOT / "docs/reference/check.md").read_text()
    blocks = re.findall(r"^```(\w+)\n(.*?)^```$", page, re.M | re.S)
    (tmp_path / "rcon.toml").write_text(next(text for language, text in blocks if language == "toml"))
    script = tmp_path / "rcon"
    script.write_text(f"#!{sys.executable}\nfrom rcon_plugins.cli.rcon import main\nmain()\n")
    script.chmod(0o755)
    commands = [text for language, text in blocks if language == "sh"]
    assert len(commands) >= FEWEST
    cgroup = Hierarchy.discover().cgroup("/rcon")
    was_there = any(Path(directory).exists() for directory in cgroup.directories)
    try:
        for (language, text), following in zip(blocks, [*blocks[1:], ("", "")], strict=True):
            if language != "sh":
                continue
            done = subprocess.run(
                ["bash", "-c", text],
                cwd=tmp_path,
                env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)},
                capture_output=True,
                text=True,
                check=False,
            )
            refused = following[0] == "text" and "REFUSED" in following[1]
            assert (done.returncode, done.stderr) == (int(refused), ""), text
            if following[0] == "text":
                assert done.stdout == following[1], text
    finally:
        if not was_there:
            cgroup.delete()
