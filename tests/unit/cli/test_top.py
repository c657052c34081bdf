"""The rates, the order and the three forms of rcon top's table, from samples made by hand."""

from __future__ import annotations

import io
import json
from dataclasses import replace

import pytest
from rich.console import Console

from rcon_plugins.cli.groups.commands import _SORTS
from rcon_plugins.cli.top.samples import Rates, Row, View
from rcon_plugins.cli.top.table import (
    COLUMNS,
    SORTS,
    as_json,
    as_text,
    help_screen,
    ordered,
    screen,
    server_as_json,
    summary,
)
from rcon_plugins.errors import ConfinementError
from rcon_plugins.groups.sample import Sample, Samples, ServerSample, from_data, to_data
from rcon_plugins.kernel.cgroup import MAX, Reading, Resources
from rcon_plugins.kernel.cgroup.statistics import Pressure, Stall, Statistics

MIB = 1 << 20


def sample(when: float, *, cpu: float = 0.0, name: str = "a", hits: int = 0, periods: int = 0) -> Sample:
    return Sample(
        id=name,
        name=name,
        owner="python app.py",
        when=when,
        reading=Reading(
            cpu_seconds=cpu,
            memory_current=48 * MIB,
            io_read_bytes=int(when * MIB),
            io_write_bytes=0,
            pids_current=3,
            oom_kills=0,
            memory_limit_hits=hits,
            pids_limit_hits=1,
        ),
        limits=Resources(memory_max=64 * MIB, pids_max=MAX),
        statistics=Statistics(cpu_periods=periods, cpu_throttled=periods // 2),
        pressure={"cpu": Pressure(Stall(0.25, 1.0), None), "memory": Pressure(), "io": Pressure(Stall(0, 0))},
    )


def row(name: str, **values: float) -> Row:
    return Row(name=name, owner="o", pressure={}, **values)  # type: ignore[arg-type]


def test_a_rate_takes_two_samples() -> None:
    rates = Rates()
    (first,) = rates.rows([sample(10.0)])
    assert (first.cpu, first.read, first.throttled, first.new_hits) == (None, None, None, 0)
    assert (first.memory, first.memory_share, first.pids, first.pids_limit) == (48 * MIB, 0.75, 3, None)
    (second,) = rates.rows([sample(12.0, cpu=0.5, hits=4, periods=20)])
    assert (second.cpu, second.read, second.written, second.throttled) == (0.25, MIB, 0.0, 0.5)
    assert (second.hits, second.new_hits) == (5, 4)
    assert second.pressure == {"cpu": 0.25, "memory": None, "io": 0.0}


def test_a_group_in_another_one_counts_once_in_the_sum() -> None:
    """The usage of a group includes that of a server or command that runs in it."""
    outer, inner = "/rcon/rcon-1-1/work/a", "/rcon/rcon-1-1/work/a/main/rcon-2-2/work/b"
    beside = "/rcon/rcon-1-1/work/ab"
    rates = Rates()
    for when, cpu in ((10.0, 0.0), (12.0, 0.5)):
        rows = rates.rows([sample(when, cpu=cpu, name=name) for name in (outer, inner, beside)])
    assert [(one.name, one.nested) for one in rows] == [(outer, False), (inner, True), (beside, False)]
    assert summary(View(rows, []), "cpu", 2).startswith("3 groups, CPU 50%, memory 96M;")


def test_a_sample_from_another_machine_gives_the_same_row() -> None:
    here = [sample(10.0), sample(12.0, cpu=0.5, hits=4, periods=20)]
    there = [
        from_data(json.loads(json.dumps(to_data(one))), id="n a", name="n/a", owner="worker n", node="n")
        for one in here
    ]
    remote, local = Rates(), Rates()
    for far, near in zip(there, here, strict=True):
        (expected,) = local.rows([near])
        pressure = {name: share for name, share in expected.pressure.items() if share is not None}
        expected = replace(expected, name="n/a", owner="worker n", node="n", pressure=pressure)
        assert remote.rows([far]) == [expected]
    with pytest.raises(ConfinementError, match=r"^n/a: n sent no valid sample"):
        from_data({"when": "now"}, id="n a", name="n/a", owner="", node="n")


def test_groups_come_and_go() -> None:
    rates = Rates()
    rates.rows([sample(1.0, name="a"), sample(1.0, name="b")])
    found = rates.rows([sample(2.0, name="b", cpu=1.0), sample(2.0, name="c")])
    assert [(one.name, one.cpu) for one in found] == [("b", 1.0), ("c", None)]
    # A new group of the same name, or a clock that does not advance, gives no negative rate.
    assert rates.rows([sample(2.0, name="b", cpu=0.2)])[0].cpu is None
    assert rates.rows([sample(3.0, name="b", cpu=0.1)])[0].cpu == 0


def test_unknown_values_stay_unknown() -> None:
    bare = Sample(id="a", name="a", owner="", when=1.0, reading=Reading())
    rates = Rates()
    rates.rows([bare])
    (found,) = rates.rows([Sample(id="a", name="a", owner="", when=2.0, reading=Reading())])
    assert {found.cpu, found.read, found.memory, found.memory_share, found.throttled} == {None}
    assert as_text([found]).splitlines()[1].split() == ["a", *"----------"]


@pytest.mark.parametrize(
    ("by", "first"),
    [
        ("cpu", "b"),
        ("throttled", "c"),
        ("memory", "c"),
        ("share", "b"),
        ("read", "c"),
        ("write", "b"),
        ("pids", "c"),
        ("pressure", "d"),
        ("hits", "b"),
        ("name", "a"),
    ],
)
def test_the_highest_is_first(by: str, first: str) -> None:
    rows = [
        row("c", cpu=0.1, throttled=0.9, memory=300, memory_limit=1000, read=9, pids=9),
        row("b", cpu=0.9, memory=200, memory_limit=200, written=9, hits=2),
        row("a"),
        Row(name="d", owner="o", pressure={"cpu": None, "io": 0.5}),
    ]
    assert ordered(rows, by)[0].name == first
    assert ordered(rows, by, backwards=True)[-1].name == first


def test_every_sort_key_is_an_option_and_a_letter() -> None:
    assert tuple(SORTS) == _SORTS
    assert len({sort.letter for sort in SORTS.values()} - {"q", "R", "?"}) == len(SORTS)


def test_plain_text() -> None:
    rates = Rates()
    rates.rows([sample(10.0)])
    rows = rates.rows([sample(12.0, cpu=3.0, hits=4)])
    heads, line = as_text(rows).splitlines()
    assert heads.split() == [
        *("GROUP", "CPU", "THROTTLED", "MEMORY", "PROCS", "STALLED", "HITS"),
        *("READ/s", "WRITE/s", "KILLS", "OWNER"),
    ]
    assert line.split() == [
        *("a", "150%", "-", "48M", "75%", "3", "25%", "cpu", "5"),
        *("1M", "0", "0", "python", "app.py"),
    ]
    assert summary(View(rows, []), "cpu", 2.0) == "1 group, CPU 150%, memory 48M; sorted by cpu, every 2 s"


def server(name: str, unroutable: int | None) -> ServerSample:
    return ServerSample(instance=name, owner="gunicorn", unroutable=unroutable)


@pytest.mark.parametrize(
    ("counts", "shown"),
    [
        ([], ""),
        ([0, 0], ""),
        ([3, 0, 4], ", unroutable 7"),
        ([3, None], ", unroutable 3 or more"),
        ([0, None], ", unroutable -"),
        ([None], ", unroutable -"),
    ],
)
def test_what_no_route_names_is_above_the_table(counts: list[int | None], shown: str) -> None:
    """What is unknown is never 0."""
    servers = [server(str(number), count) for number, count in enumerate(counts)]
    view = Rates().view(Samples([], servers))
    assert summary(view, "cpu", 2.0) == f"0 groups, CPU 0%, memory 0{shown}; sorted by cpu, every 2 s"


def test_servers_as_json() -> None:
    rates = Rates()
    rates.view(Samples([], [server("rcon-1-2", 3), server("rcon-3-4", None)]))
    found = rates.view(Samples([], [server("rcon-1-2", 5), server("rcon-3-4", None), server("rcon-5-6", 1)]))
    keys = ("instance", "owner", "node", "unroutable", "new_unroutable")
    assert [server_as_json(one) for one in found.servers] == [
        dict(zip(keys, values, strict=True))
        for values in (
            ("rcon-1-2", "gunicorn", None, 5, 2),
            ("rcon-3-4", "gunicorn", None, None, 0),
            ("rcon-5-6", "gunicorn", None, 1, 0),
        )
    ]


def test_json() -> None:
    (only,) = Rates().rows([sample(10.0, hits=2)])
    assert as_json(only) == {
        "group": "a",
        "owner": "python app.py",
        "node": None,
        "cpu": None,
        "throttled": None,
        "memory": 48 * MIB,
        "memory_limit": 64 * MIB,
        "read": None,
        "write": None,
        "pids": 3,
        "pids_limit": None,
        "pressure": {"cpu": 0.25, "memory": None, "io": 0.0},
        "hits": {"total": 3, "memory": 2, "pids": 1, "oom_kills": 0},
        "new_hits": 0,
        "tally": None,
    }


def screenful(rows: list[Row], width: int, height: int, first: int = 0) -> list[str]:
    console = Console(width=width, height=height, file=io.StringIO(), force_terminal=False)
    with console.capture() as captured:
        console.print(screen(rows, "cpu", "title", first, width, height), end="")
    return captured.get().splitlines()


@pytest.mark.parametrize("size", [(80, 24), (200, 50), (110, 10), (60, 8), (40, 6), (20, 5), (10, 3)])
def test_the_screen_fits_the_terminal(size: tuple[int, int]) -> None:
    width, height = size
    rows = [
        row(f"rcon-123-456/tenant~customer{n}.example", cpu=n, memory=n * MIB, oom_kills=n) for n in range(60)
    ]
    lines = screenful(rows, width, height)
    assert max(map(len, lines)) <= width
    assert len(lines) <= max(height, 5)
    if height >= 5:
        assert lines[0].startswith("rcon top: title"[: width - 1])
        assert lines[-1].startswith("q quit"[: width - 1])
        assert "more below" in lines[-2] or width < 20
    if width >= 80:
        assert lines[1].split()[:2] == ["GROUP", "CPU"]
        assert "WRITE/s" in lines[1]
    assert ("OWNER" in lines[1]) == (width >= 120)


def test_names_differ_for_the_same_group_of_several_workers() -> None:
    rows = [
        Row(name=f"{node}/reports-render", owner="o", pressure={}, node=node)
        for node in ("celery@web-1", "celery@web-2", "w")
    ]
    shown_names = [line.split()[0] for line in screenful(rows, 80, 24)[2:5]]
    assert shown_names == ["web-1/…orts-render", "web-2/…orts-render", "w/reports-render"]
    assert summary(View(rows, []), "cpu", 2.0).startswith("3 groups of 3 workers, CPU ")


def test_a_long_name_keeps_its_end() -> None:
    line = screenful([row("rcon-123456-7890123/tenant~a.example", cpu=1)], 80, 24)[2]
    assert line.startswith("…")
    assert "~a.example " in line


def test_names_that_end_alike_are_cut_at_their_end() -> None:
    rows = [row(f"tenant~{name}.customers.example") for name in ("anna", "berta")] + [row("nightly")]
    names = [line.split()[0] for line in screenful(rows, 80, 24)[2:5]]
    assert names == ["tenant~anna.custo…", "tenant~berta.cust…", "nightly"]


def test_rows_further_down() -> None:
    rows = [row(f"g{n:02}") for n in range(40)]
    lines = screenful(rows, 80, 14, first=35)
    assert [line.split()[0] for line in lines[2:7]] == ["g35", "g36", "g37", "g38", "g39"]
    assert "STALLED: " in lines[-2]


def test_names_are_shown_as_text() -> None:
    """Names are interpreted neither as markup of rich nor as terminal escapes."""
    lines = screenful([Row(name="a[red]b\x1b[2J", owner="[bold]x\x1b]0;t\x07", pressure={})], 120, 10)
    assert lines[2].startswith("a[red]b?[2J ")
    assert "[bold]x?]0;t?" in lines[2]
    assert "\x1b" not in "".join(lines)


def test_the_help_screen_explains_every_column_and_letter() -> None:
    console = Console(width=80, height=24, file=io.StringIO(), force_terminal=False)
    with console.capture() as captured:
        console.print(help_screen())
    lines = captured.get().splitlines()
    assert len(lines) <= 24
    assert not any("…" in line for line in lines)
    words = [line.split() for line in lines if line.strip()]
    assert [column.head for column in COLUMNS if column.head not in [line[0] for line in words]] == []
    assert [
        sort.letter for sort in SORTS.values() if [sort.letter, "sort", "by"] not in [w[:3] for w in words]
    ] == []
