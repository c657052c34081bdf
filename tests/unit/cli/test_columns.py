"""Tables of plain text, and numbers in a form for people."""

from __future__ import annotations

import pytest

from rcon_plugins.cli.columns import (
    count,
    cut,
    limits_as_json,
    limits_in_words,
    percent,
    printable,
    seconds,
    short_command,
    size,
    table,
)
from rcon_plugins.kernel.cgroup import MAX, Device, IoMax, Resources

DISK = Device(254, 0)


def test_a_column_is_as_wide_as_its_widest_cell() -> None:
    assert table(("NAME", ">N", "LAST"), [["a", "1", "x"], ["longer", "100", ""]]) == (
        "NAME      N  LAST\na         1  x\nlonger  100"
    )
    assert (
        table(("NAME", ">N", "LAST"), [["a", "1", "a long command"]], 16) == "NAME  N  LAST\na     1  a long…"
    )
    assert table(("N", ">M"), [["日本", "1"], ["abcde", "2"]]) == "N      M\n日本   1\nabcde  2"


def test_text_columns_shrink_to_the_width() -> None:
    """The last text column shrinks first, the first one last. Columns of numbers never shrink."""
    row = ["rcon-123-4567/tenant~a.example", "123456789", "cpu 30%, memory 64M, pids 16", "gunicorn app:app"]
    heads = ("GROUP", ">MEMORY", "LIMITS", "OWNER")
    assert table(heads, [row], 80).splitlines()[1] == (
        "rcon-123-4567/tenant~a.example  123456789  cpu 30%, memory 64M, p…  gunicorn ap…"
    )
    assert table(heads, [row], 50).splitlines()[1] == "rcon-123-45…  123456789  cpu 30%, me…  gunicorn a…"


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (None, "-"),
        (0, "0"),
        (999, "999"),
        (1000, "1K"),
        (1536, "1.5K"),
        (10 * 1024 + 512, "10K"),
        (64 << 20, "64M"),
        (1023 << 20, "1G"),
        (5 << 30, "5G"),
        (2**63 - 1, "8192P"),
    ],
)
def test_sizes(number: int | None, text: str) -> None:
    assert size(number) == text


def test_numbers() -> None:
    assert [seconds(number) for number in (None, 0, 1.234, 12.34, 4520.7)] == [
        "-",
        "0.00",
        "1.23",
        "12.3",
        "4521",
    ]
    assert [percent(share) for share in (None, 0, 0.031, 0.0999, 0.314, 1.5)] == [
        *("-", "0%", "3.1%", "10%", "31%", "150%"),
    ]
    assert [count(number) for number in (None, 0, 7)] == ["-", "0", "7"]


def test_control_characters_do_not_reach_the_terminal() -> None:
    assert printable("a\x1b[2Jb\r\n\u202e\udc80") == "a?[2Jb????"
    assert cut("abcdef", 4) == "abc…"
    assert cut("日本語", 4) == "日…"
    assert cut("abc", 3) == "abc"


def test_limits() -> None:
    limits = Resources(
        cpu_quota=0.3,
        cpu_burst=0.02,
        cpu_weight=50,
        cpus="0-1",
        memory_max=64 << 20,
        memory_high=MAX,
        swap_max=0,
        io={DISK: IoMax(MAX, 5 << 20, 100, MAX)},
        pids_max=16,
    )
    assert limits_in_words(limits) == [
        "cpu 30%",
        "cpu-burst 20ms",
        "cpu-weight 50",
        "cpus 0-1",
        "memory 64M",
        "swap 0",
        "pids 16",
        "write 5M on 254:0",
        "read-iops 100 on 254:0",
    ]
    assert limits_as_json(limits) == {
        "cpu": 0.3,
        "cpu_burst": 0.02,
        "cpu_weight": 50,
        "cpus": "0-1",
        "memory": 64 << 20,
        "memory_high": "max",
        "swap": 0,
        "io": {"254:0": {"read": "max", "write": 5 << 20, "read_iops": 100, "write_iops": "max"}},
        "pids": 16,
    }
    nothing = Resources(cpu_quota=MAX, cpu_burst=0, cpu_weight=100, memory_max=MAX, pids_max=MAX)
    assert limits_in_words(nothing) == limits_in_words(Resources()) == []


@pytest.mark.parametrize(
    ("words", "short"),
    [
        ("/usr/bin/python3 /usr/local/bin/rcon run -- make -C /srv", "rcon run -- make -C /srv"),
        ("/srv/.venv/bin/python3.11 -I -u /srv/.venv/bin/gunicorn app:app", "gunicorn app:app"),
        ("/srv/bin/python -m gunicorn /x", "python -m gunicorn /x"),
        ("python app.py /x", "python app.py /x"),
        (".venv/bin/python .venv/bin/rcon run -- make", "rcon run -- make"),
        ("python -W error /srv/app.py", "python -W error /srv/app.py"),
        ("/usr/bin/python3", "python3"),
        ("/x/python -I -S /x/rcon_plugins/tree/attach_watcher.py /rcon rcon-1-2 backup", "rcon attach"),
        ("gunicorn: master [app:app]", "gunicorn: master [app:app]"),
        ("./job /srv", "job /srv"),
        ("[kthreadd]", "[kthreadd]"),
        ("/", "/"),
        ("", ""),
    ],
)
def test_the_short_form_of_a_command(words: str, short: str) -> None:
    assert short_command(words) == short
