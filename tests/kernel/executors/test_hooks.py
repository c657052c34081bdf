"""Every hook, used by a plugin as a third party would write it."""

from __future__ import annotations

import os
from collections.abc import Iterable

import pytest

import rcon_plugins
from rcon_plugins import Limits, Outcome, Policy, Settings, Work, hookimpl
from rcon_plugins.builtin.plugins import make_plugin_manager
from rcon_plugins.errors import ConfinementError, SettingsError
from rcon_plugins.kernel.cgroup import Resources
from rcon_plugins.settings.file import from_mapping
from tests.kernel.executors.service import ask, begin, end, managing


@pytest.mark.smoke
def test_rcon_policies_contributes_and_rcon_select_policy_chooses_before_the_router() -> None:
    class FromTheDatabase:
        @hookimpl
        def rcon_policies(self, settings: Settings) -> Iterable[Policy]:
            assert "p" in settings.policies
            return [Policy.make("gold", each={"timeout": "60s"}), Policy.make("silver", pids=9)]

        @hookimpl
        def rcon_select_policy(self, work: Work) -> str | None:
            return "gold" if work.attributes.get("host") == "rich.example" else None

    with managing({"each": {"timeout": "30s"}}, plugins=[FromTheDatabase()]) as manager:
        assert ask(manager, "pid", host="rich.example")[1].policy == "gold"
        assert ask(manager, "pid", host="poor.example")[1].policy == "p"


def test_a_policy_that_a_plugin_selects_has_to_exist() -> None:
    class Dreamer:
        @hookimpl
        def rcon_select_policy(self) -> str:
            return "platinum"

    with (
        managing({"each": {"timeout": "30s"}}, plugins=[Dreamer()]) as manager,
        pytest.raises(ConfinementError, match="platinum"),
    ):
        ask(manager, "pid")


@pytest.mark.each_layout
def test_rcon_resources_adds_limits() -> None:
    class Weighty:
        @hookimpl
        def rcon_resources(self, limits: Limits, policy: Policy) -> Resources | None:
            return Resources(pids_max=3) if limits is policy.each else None

    with managing({"each": {"timeout": "30s"}}, plugins=[Weighty()]) as manager:
        assert ask(manager, "fork_bomb", 0.1)[1].ending == "pids"


def test_rcon_drop_acts_in_the_new_process() -> None:
    class Quiet:
        @hookimpl
        def rcon_drop(self, policy: Policy, target: str) -> None:
            os.environ["DROPPED"] = f"{policy.name} {target} {os.getpid()}"

    class Teller:
        @hookimpl
        def rcon_work_started(self, work: Work, policy: Policy) -> None:
            seen.append(f"{work.name} {policy.name}")

        @hookimpl
        def rcon_work_finished(self, work: Work, outcome: Outcome) -> None:
            seen.append(f"{work.name} {outcome.ending}")

    seen: list[str] = []
    with managing({"each": {"timeout": "30s"}}, plugins=[Quiet(), Teller()]) as manager:
        assert ask(manager, "environment", "DROPPED")[0] == f"p process {ask(manager, 'pid')[0]}"
    assert "DROPPED" not in os.environ
    assert seen == ["environment p", "environment ok", "pid p", "pid ok"]


def test_rcon_prepare_is_called_in_the_fork_server_and_what_it_made_is_there_in_the_new_process() -> None:
    class Baker:
        def __init__(self) -> None:
            self.made: list[str] = []

        @hookimpl
        def rcon_prepare(self, policy: Policy) -> None:
            self.made.append(f"{policy.name} {os.getpid()}")

        @hookimpl
        def rcon_drop(self) -> None:
            os.environ["MADE"] = ", ".join(self.made)

    baker = Baker()
    with managing({"max_uses": 1, "pids": 9, "each": {"timeout": "30s"}}, plugins=[baker]) as manager:
        call = f"p {manager.fork_server_pid}"
        made = ask(manager, "environment", "MADE")[0].split(", ")
        assert len(made) == 2  # that of the trial at the start, too
        assert set(made) == {call}
        made = ask(manager, "environment", "MADE")[0].split(", ")
        assert len(made) >= 3  # of its predecessors', too, and perhaps of a successor's
        assert set(made) == {call}
    assert baker.made == []


def test_an_error_in_rcon_prepare_means_that_the_work_does_not_run() -> None:
    class Empty:
        @hookimpl
        def rcon_prepare(self) -> None:
            self.left -= 1
            if self.left < 0:
                raise LookupError("no flour")

        def __init__(self, left: int) -> None:
            self.left = left

    with managing({"each": {"timeout": "30s"}}, plugins=[Empty(1)]) as manager:  # enough for the trial
        for _ in range(2):
            with pytest.raises(ConfinementError, match="LookupError: no flour"):
                ask(manager, "pid")
    with (
        pytest.raises(ConfinementError, match="no executor process can serve: LookupError: no flour"),
        managing({"each": {"timeout": "30s"}}, plugins=[Empty(0)]),
    ):
        pass


def test_an_error_in_rcon_work_started_means_that_the_work_does_not_run() -> None:
    class Closed:
        @hookimpl
        def rcon_work_started(self) -> None:
            raise LookupError("closed today")

    with managing({"concurrency": 1, "each": {"timeout": "30s"}}, plugins=[Closed()]) as manager:
        for _ in range(3):  # and gives its slot back
            with pytest.raises(ConfinementError, match="closed today"):
                ask(manager, "pid")


def test_an_error_in_rcon_work_finished_is_only_logged(caplog: pytest.LogCaptureFixture) -> None:
    class Clumsy:
        @hookimpl
        def rcon_work_finished(self) -> None:
            raise LookupError("lost the book")

    with managing({"concurrency": 1, "each": {"timeout": "30s"}}, plugins=[Clumsy()]) as manager:
        assert [ask(manager, "pid")[1].ending for _ in range(3)] == ["ok"] * 3
    assert "lost the book" in caplog.text


def test_every_refusal_and_limit_hit_is_one_line_with_fields(caplog: pytest.LogCaptureFixture) -> None:
    settings = {
        "policy": {
            "p": {"per": "host", "concurrency": 1, "isolation": "process"},
            "short": {"per": "host", "each": {"timeout": "500ms"}},
        },
        "route": [{"host": "late", "policy": "short"}, {"policy": "p"}],
    }
    with managing({}, settings=settings) as manager:
        held = begin(manager, "pid", host="a\nb")  # done at once, and finished by `end`
        with pytest.raises(rcon_plugins.errors.ConcurrencyLimitExceeded):
            begin(manager, "pid", host="a\nb")
        end(held)
        ask(manager, "sleep", 300, host="late")
        ask(manager, "pid", host="c")
    records = [record for record in caplog.records if record.name == "rcon"]
    assert all("\n" not in record.getMessage() for record in records)
    lines = [vars(record)["rcon"] for record in records if "rcon" in vars(record)]
    assert [(line["event"], line["policy"], line["key"], line["limit"]) for line in lines] == [
        ("concurrency", "p", "a\nb", "concurrency"),
        ("timeout", "short", "late", "each.timeout"),
    ]
    assert lines[1]["usage"]["wall_seconds"] >= 0.5


@pytest.mark.parametrize(
    ("plugin", "message"),
    [
        (type("Typo", (), {"rcon_wrok_started": hookimpl(lambda self: None)})(), "rcon_wrok_started"),
        (type("Greedy", (), {"rcon_drop": hookimpl(lambda self, tip: None)})(), "tip"),
    ],
)
def test_a_plugin_with_a_wrong_hook_is_refused(plugin: object, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        make_plugin_manager(Settings(), [plugin])


def test_a_plugin_that_is_not_installed_is_refused() -> None:
    with pytest.raises(SettingsError, match="no installed distribution offers the plugin 'nobody'"):
        make_plugin_manager(from_mapping({"plugins": ["nobody"], "unmatched": "allow"}))
