"""No confined code leaves its cgroup by clone3(CLONE_INTO_CGROUP), which Landlock does not see, in any ABI."""

from __future__ import annotations

import errno
import json
import os
import platform
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rcon_plugins import Plan, Server
from rcon_plugins.errors import CapabilityError, ConfinementError, KernelError
from rcon_plugins.kernel import seccomp
from rcon_plugins.kernel.capability import (
    CAP_SETGID,
    CAP_SETPCAP,
    CAP_SETUID,
    CAP_SYS_ADMIN,
    Capabilities,
    set_capabilities,
    set_no_new_privs,
)
from rcon_plugins.settings.file import from_mapping
from rcon_plugins.tree.doctor import examine
from tests.children import in_child
from tests.kernel.capcon.command import capcon
from tests.kernel.command.harness import rcon
from tests.kernel.executors import ways_back
from tests.kernel.executors.service import ask, managing, status
from tests.kernel.seccomp import births
from tests.system_calls import refuse_system_call

pytestmark = pytest.mark.each_layout

NOBODY = 65534
TENANT = 61001
SECCOMP = {"x86_64": 317, "aarch64": 277}[platform.machine()]
ALL_REFUSED = dict.fromkeys(births.ways(), "ENOSYS")
POLICIES: dict[str, dict[str, Any]] = {
    "as the server": {"isolation": "process"},
    "as a tenant": {"user": TENANT, "group": TENANT},
    "may gain privileges": {"isolation": "process", "no_new_privs": False},
    "with all capabilities": {"isolation": "process", "capabilities": ["all"]},
}


@pytest.fixture
def elsewhere() -> Iterator[str]:
    """A cgroup v2 where everybody may move processes to."""
    path = Path(births.root()) / f"rcon-elsewhere-{os.getpid()}"
    path.mkdir()
    try:
        yield str(path)
    finally:
        deadline = time.monotonic() + 5
        while True:
            try:
                path.rmdir()
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.01)
            else:
                break


@pytest.mark.smoke
def test_clone3_is_refused_in_every_abi_and_works_without_the_filter(elsewhere: str) -> None:
    def filtered() -> tuple[dict[str, str], str]:
        seccomp.forbid_leaving_cgroups()
        return births.all_ways(elsewhere), Path("/proc/self/status").read_text()

    free = in_child(births.all_ways, elsewhere)
    assert free["native"] == f"/{Path(elsewhere).name}"
    assert free.get("i386", free["native"]) == free["native"]
    refused, state = in_child(filtered)
    assert refused == ALL_REFUSED
    assert "Seccomp:\t2\n" in state
    assert "Seccomp_filters:\t1\n" in state


TIOCSTI, TIOCLINUX, TIOCGWINSZ = 0x5412, 0x541C, 0x5413


@pytest.mark.once
def test_typing_is_refused_in_every_abi() -> None:
    def tried(filtered: bool) -> list[dict[str, str]]:
        if filtered:
            seccomp.forbid_typing()
        file = os.open("/dev/null", os.O_RDWR)
        return [births.requested(file, request) for request in (TIOCSTI, TIOCLINUX, TIOCGWINSZ)]

    refused = dict.fromkeys(births.ways(), "EPERM")
    free = in_child(tried, False)
    assert free[0]["native"] == "ENOTTY"
    assert in_child(tried, True) == [refused, refused, free[2]]


@pytest.mark.once
@pytest.mark.parametrize("by", ["rcon run --user", "rcon run --policy", "capcon run --user"])
def test_a_command_of_another_user_cannot_type_into_the_shell(by: str, tmp_path: Path) -> None:
    code = "import fcntl, os; fcntl.ioctl(os.open('/dev/null', os.O_RDWR), 0x5412, b'x')"
    command = ("--", "/usr/bin/python3", "-c", code)
    if by.startswith("capcon"):
        err = capcon("run", "--user", str(NOBODY), "--group", str(NOBODY), *command).err
    elif by.endswith("--user"):
        err = rcon("run", "--user", "nobody", *command).err
    else:
        settings = tmp_path / "rcon.toml"
        settings.write_text(f"[policy.p]\nuser = {NOBODY}\ngroup = {NOBODY}\n")
        err = rcon("run", "--policy", "p", "--settings", settings, *command).err
    assert err.strip().endswith("PermissionError: [Errno 1] Operation not permitted")


@pytest.mark.once
def test_speculation_stays_as_it_was() -> None:
    """Without its flag, kernels before 5.16 make a process with a filter slower."""

    def speculation(after: bool) -> list[str]:
        if after:
            seccomp.forbid_leaving_cgroups()
        lines = Path("/proc/self/status").read_text().splitlines()
        return [line for line in lines if line.startswith("Speculation")]

    assert in_child(speculation, True) == in_child(speculation, False) != []


@pytest.mark.once
def test_a_thread_without_privileges_needs_no_new_privs(elsewhere: str) -> None:
    def tried() -> tuple[str, dict[str, str]]:
        os.setgid(NOBODY)
        os.setuid(NOBODY)
        with pytest.raises(CapabilityError, match="no_new_privs") as raised:
            seccomp.forbid_leaving_cgroups()
        set_no_new_privs()
        seccomp.forbid_leaving_cgroups()
        return str(raised.value.errno), births.all_ways(elsewhere)

    assert in_child(tried) == (str(errno.EACCES), ALL_REFUSED)


@pytest.mark.once
@pytest.mark.parametrize("error", [errno.ENOSYS, errno.EPERM])
def test_a_kernel_without_filters_is_known_from_a_failure(error: int) -> None:
    def without(error: int) -> tuple[bool, str]:
        seccomp.is_available.cache_clear()
        refuse_system_call(SECCOMP, error)
        try:
            return seccomp.is_available(), ""
        except KernelError as failed:
            return True, str(failed)

    assert in_child(without, error) == (False, "")
    found, failed = in_child(without, errno.ENOMEM)
    assert found
    assert "seccomp" in failed


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_executors_their_children_and_their_programs_stay_in_their_cgroup(
    policy: dict[str, Any], elsewhere: str
) -> None:
    program = dict.fromkeys(births.ways(), "ENOSYS")
    with managing(policy) as manager:
        assert ask(manager, "births", elsewhere)[0] == ALL_REFUSED
        assert ask(manager, "births", births.root())[0] == ALL_REFUSED
        assert ask(manager, "births_of_a_child", elsewhere)[0] == ["ENOSYS", "ENOSYS"]
        if policy.get("user") is None:  # a tenant may not read the interpreter
            assert ask(manager, "births_after_execve", elsewhere)[0] == program


@pytest.mark.once
def test_the_c_library_starts_processes_and_threads_without_clone3() -> None:
    with managing({"isolation": "process"}) as manager:
        found, outcome = ask(manager, "children_of_the_c_library")
    assert found == ["0 spawned", "forked", "thread"]
    assert outcome.ending == "ok"


def test_a_user_namespace_gives_no_other_mount_of_the_cgroups() -> None:
    assert in_child(ways_back.mount_cgroups_anew) == "WORKED"
    with managing({"isolation": "process", "max_uses": 1}) as manager:
        assert ask(manager, "mount_cgroups_anew")[0] == "ENOSYS"


def test_a_command_under_a_policy_stays_in_its_cgroup(elsewhere: str, tmp_path: Path) -> None:
    settings = tmp_path / "rcon.toml"
    settings.write_text('[policy.p]\nmemory = "64M"\n')
    policy = ("--policy", "p", "--settings", settings)
    done = rcon("run", *policy, "--", sys.executable, births.__file__, elsewhere)
    assert json.loads(done.out) == ALL_REFUSED, done.err


def test_capcon_with_rules_for_files_keeps_the_command_in_its_cgroup(elsewhere: str) -> None:
    rules = ("run", "--no-new-privs", "--read-only", "/", "--")
    done = capcon(*rules, sys.executable, births.__file__, elsewhere)
    assert json.loads(done.out) == ALL_REFUSED, done.err
    free = capcon("run", "--no-new-privs", "--", sys.executable, births.__file__, elsewhere)
    assert json.loads(free.out)["native"] == f"/{Path(elsewhere).name}", free.err


@pytest.mark.once
def test_without_filters_the_caveat_and_the_doctor_say_so() -> None:
    def judged() -> tuple[str | None, str | None, list[Any]]:
        seccomp.is_available.cache_clear()
        refuse_system_call(SECCOMP)
        settings = from_mapping(
            {"policy": {"p": {"isolation": "process"}, "q": {"user": TENANT, "group": TENANT}}, "route": []}
        )
        verdicts = Plan.make(settings, Server()).verdicts
        findings = [(found.state, found.remedy) for found in examine().findings if found.name == "seccomp"]
        return verdicts["p"].caveat, verdicts["q"].caveat, findings

    own, tenant, findings = in_child(judged)
    assert own is not None
    assert "can leave their cgroups: this kernel has no seccomp filters" in own
    assert tenant is None
    assert findings == [("absent", seccomp.REMEDY)]
    caveat = (
        Plan.make(from_mapping({"policy": {"p": {"isolation": "process"}}, "route": []})).verdicts["p"].caveat
    )
    assert caveat is not None
    assert "leave their cgroups" not in caveat


@pytest.mark.once
def test_filters_that_were_there_at_the_start_must_be_there_in_every_executor() -> None:
    """An executor that gets none runs nothing."""

    def refused() -> str:
        assert seccomp.is_available()
        refuse_system_call(SECCOMP)
        try:
            with managing({"isolation": "process"}) as manager:
                ask(manager, "pid")
        except ConfinementError as error:
            return str(error)
        return "ran"

    assert seccomp.NONE_HERE in in_child(refused)


@pytest.mark.once
def test_without_no_new_privs_a_server_needs_a_capability() -> None:
    def refusals(*held: int) -> list[str]:
        wanted = Capabilities.of(CAP_SETUID, CAP_SETGID, CAP_SETPCAP, *held)
        set_capabilities(wanted, Capabilities.none(), Capabilities.none())
        settings = from_mapping(
            {"policy": {"p": {"isolation": "process", "no_new_privs": False}}, "route": []}
        )
        return [refusal.limit for refusal in Plan.make(settings).verdicts["p"].refusals]

    assert in_child(refusals) == ["no_new_privs"]
    assert in_child(refusals, CAP_SYS_ADMIN) == []


@pytest.mark.once
def test_a_server_that_holds_the_capability_without_effect_raises_it(elsewhere: str) -> None:
    def program() -> tuple[dict[str, str], dict[str, Any]]:
        with managing({"isolation": "process", "no_new_privs": False}) as manager:
            found, _ = ask(manager, "births", elsewhere)
            state, _ = ask(manager, "state")
        return found, state

    def lowered() -> tuple[dict[str, str], dict[str, Any]]:
        everything = Capabilities(status_capabilities())
        set_capabilities(everything, everything - Capabilities.of(CAP_SYS_ADMIN), Capabilities.none())
        return program()

    found, state = in_child(lowered)
    assert found == ALL_REFUSED
    assert (state["no_new_privs"], state["CapEff"], state["CapPrm"]) == (False, 0, 0)


def status_capabilities() -> int:
    """Return the permitted set of this process, as a mask."""
    return int(status(Path("/proc/self/status"))["CapPrm"])
