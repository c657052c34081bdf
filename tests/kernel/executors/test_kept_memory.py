"""An executor process that keeps memory serves more work while that leaves room, and is replaced when it grows."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.kernel.cgroup.helpers import DISK
from tests.kernel.executors.service import ask, managing

pytestmark = pytest.mark.each_layout

WARNING = re.compile(
    r"rcon: policy p: a new process keeps (\d+)M after its first request or task, more than three quarters of "
    r'(?:each\.)?memory = "96M"\. It is replaced, so each process loads its data again\. '
    r'To keep it, set ((?:each\.)?memory) = "(\d+)M"'
)


@pytest.mark.smoke
@pytest.mark.parametrize("policy", [{"each": {"memory": "96M"}}, {"memory": "96M"}], ids=["each", "whole"])
def test_what_the_first_work_keeps_is_loaded_once(
    policy: dict[str, object], caplog: pytest.LogCaptureFixture
) -> None:
    with managing({**policy, "max_uses": 20}) as manager:
        found = [ask(manager, "keep", 58, "model")[0] for _ in range(5)]
    assert found == [[found[0][0], 1]] * 5
    assert not [record for record in caplog.records if "keeps" in record.message]


def test_what_later_work_adds_is_lost_before_there_is_no_room() -> None:
    """Of 96 MiB the first work keeps 52. Half of what is left, 22 MiB, may be added."""
    with managing({"each": {"memory": "96M"}, "max_uses": 20}) as manager:
        found = []
        for size in (52, *[8] * 8):
            answer, outcome = ask(manager, "keep", size)
            assert outcome.ending == "ok"
            found.append(answer)
    first = [uses for pid, uses in found if pid == found[0][0]]
    assert first in ([1, 2, 3], [1, 2, 3, 4])  # the interpreter itself takes a few MiB
    assert len({pid for pid, _ in found}) > 1


@pytest.mark.parametrize("limits", ["each", "whole"])
def test_a_first_work_that_keeps_too_much_is_told_once_with_the_limit_that_helps(
    limits: str, caplog: pytest.LogCaptureFixture
) -> None:
    policy = {"each": {"memory": "96M"}} if limits == "each" else {"memory": "96M"}
    with managing({**policy, "max_uses": 20}) as manager:
        found = [ask(manager, "keep", 78, "model")[0] for _ in range(4)]
    assert len({pid for pid, _ in found}) == 4
    (warning,) = [record.message for record in caplog.records if "keeps" in record.message]
    told = WARNING.fullmatch(warning)
    assert told, warning
    assert 78 <= int(told[1]) <= 95
    assert told[2] == ("each.memory" if limits == "each" else "memory")
    better = {"each": {"memory": f"{told[3]}M"}} if limits == "each" else {"memory": f"{told[3]}M"}
    with managing({**better, "max_uses": 20}) as manager:
        found = [ask(manager, "keep", 78, "model")[0] for _ in range(4)]
    assert found == [[found[0][0], 1]] * 4


def test_what_is_no_cache_costs_one_request(caplog: pytest.LogCaptureFixture) -> None:
    """Each request loses more than half of the limit. The second one has no room; from then on, each is the first."""
    with managing({"each": {"memory": "96M"}, "max_uses": 20}) as manager:
        endings = [ask(manager, "keep", 58)[1].ending for _ in range(6)]
    assert endings == ["ok", "memory", *["ok"] * 4]
    (warning,) = [record.message for record in caplog.records if "had left" in record.message]
    assert re.fullmatch(
        r"rcon: policy p: a process reached its memory limit with \d\dM in use that its first request or task "
        r"had left\. "
        "From now on a process that keeps more than half of the limit is replaced",
        warning,
    )


def test_files_in_memory_are_no_cache() -> None:
    """They may be in the hands of others."""
    with managing({"each": {"memory": "96M"}, "max_uses": 20}) as manager:
        assert [ask(manager, "keep_memfd", 58)[1].ending for _ in range(4)] == ["ok"] * 4


def test_page_cache_does_not_count() -> None:
    path = DISK / "rcon-test-page-cache"
    try:
        with managing({"each": {"memory": "96M"}, "max_uses": 20}) as manager:
            first, outcome = ask(manager, "fill_page_cache", str(path), 90)
            assert outcome.ending == "ok"
            assert (outcome.usage.memory_peak or 0) > 72 * 2**20
            assert ask(manager, "pid")[0] == first
    finally:
        Path(path).unlink(missing_ok=True)
