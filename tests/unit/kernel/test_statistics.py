"""Pressure files, as the kernel writes them."""

from __future__ import annotations

from rcon_plugins.kernel.cgroup.statistics import Pressure, Stall, parse_pressure


def test_pressure() -> None:
    told = parse_pressure(
        "some avg10=25.00 avg60=30.51 avg300=8.82 total=35500000\n"
        "full avg10=0.00 avg60=0.00 avg300=0.00 total=250000"
    )
    assert told == Pressure(Stall(0.25, 35.5), Stall(0.0, 0.25))


def test_pressure_before_there_was_a_full_one_of_the_cpu() -> None:
    assert parse_pressure("some avg10=1.00 avg60=0.00 avg300=0.00 total=5").full is None
