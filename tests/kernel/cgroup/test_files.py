"""Files of controllers that no field of Resources sets: written, restored, refused; set by the example plugin."""

from __future__ import annotations

import errno
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

import rcon_plugins
from rcon_plugins.confinement.admission import InlineAdmission
from rcon_plugins.errors import KernelError, SettingsError
from rcon_plugins.kernel.cgroup import MAX, Cgroup, Hierarchy, Resources, change_limits
from rcon_plugins.settings.policy import Policy
from rcon_plugins.work import Work
from tests.kernel.cgroup.helpers import settings_of
from tests.kernel.executors.service import ask, managing

pytestmark = [pytest.mark.kernel, pytest.mark.each_layout]
EXAMPLE = Path(rcon_plugins.__file__).parent.parent / "examples" / "idle-plugin"
IDLE = Resources(files={"cpu.idle": "1"})
NOWHERE = Resources(files={"cpu.no-such-file": "1"})


def test_a_file_is_written_after_the_fields(group: Cgroup) -> None:
    group.configure(Resources(cpu_quota=0.5, files={"cpu.idle": "1"}))
    group.configure(IDLE)
    assert settings_of(group, "cpu.idle") == "1"


def test_a_file_that_is_missing_is_refused(hierarchy: Hierarchy, group: Cgroup) -> None:
    (refusal,) = hierarchy.refusals(NOWHERE)
    assert refusal.limit == "files.cpu.no-such-file"
    assert "/cpu.no-such-file" in refusal.reason
    assert refusal.remedy
    with pytest.raises(KernelError) as caught:
        group.configure(NOWHERE)
    assert caught.value.errno == errno.ENOENT
    assert str(caught.value.path).endswith("/cpu.no-such-file")
    assert caught.value.hint


def test_a_controller_that_is_missing_is_refused(hierarchy: Hierarchy, group: Cgroup) -> None:
    nowhere = Resources(files={"no_such.max": "1"})
    (refusal,) = hierarchy.refusals(nowhere)
    assert "no_such controller" in refusal.reason
    with pytest.raises(KernelError, match="no_such controller"):
        group.configure(nowhere)


def test_all_limits_are_restored_if_one_cannot_be_written(group: Cgroup) -> None:
    group.configure(Resources(cpu_quota=0.5, files={"cpu.idle": "0"}))
    with pytest.raises(KernelError):
        change_limits(group, Resources(cpu_quota=0.2, files={"cpu.idle": "1", "cpu.no-such-file": "1"}))
    assert settings_of(group, "cpu.idle") == "0"
    change_limits(group, Resources(cpu_quota=MAX, files={"cpu.idle": "1"}))
    assert settings_of(group, "cpu.idle") == "1"


@pytest.fixture
def idle_plugin(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(EXAMPLE))
    monkeypatch.setenv("RCON_IDLE", "other,p")
    yield import_module("rcon_idle")
    del sys.modules["rcon_idle"]


def test_the_example_plugin_makes_groups_of_processes_idle(idle_plugin: Any) -> None:
    with managing({"each": {"timeout": "30s"}}, plugins=[idle_plugin]) as manager:
        ask(manager, "pid")
        assert manager.instance is not None
        assert settings_of(manager.instance.policy_cgroup("p"), "cpu.idle") == "1"


def test_the_example_plugin_makes_groups_of_threads_idle(idle_plugin: Any) -> None:
    with managing({"isolation": "inline"}, plugins=[idle_plugin]) as manager:
        admission = manager.admit(Work("call", "x"))
        assert isinstance(admission, InlineAdmission)
        with admission.entered():
            pass
        admission.finish()
        assert manager.instance is not None
        assert settings_of(manager.instance.threaded("p"), "cpu.idle") == "1"


def test_the_example_plugin_refuses_a_weight(idle_plugin: Any) -> None:
    policy = Policy.make("p", cpu_weight=50)
    with pytest.raises(SettingsError, match="an idle group has no weight"):
        idle_plugin.rcon_resources(limits=policy, policy=policy)
    assert idle_plugin.rcon_resources(limits=policy.each, policy=policy) is None
