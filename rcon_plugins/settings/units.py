"""The units in settings: text to numbers and numbers to text. Past this door, values are plain int, float and str.

``share``: CPU time per time, in CPUs. ``cpu_time`` and ``duration``: seconds. ``size``: bytes. ``memory``: bytes,
also written as a share of the machine's memory. ``factor``: times.
``umask``: the bits. ``cpus``: the numbers of CPUs, as text. ``count``: a number. ``device``: text. These are the units
of the rows of `rcon_plugins.settings.limit_table`, and ``umask``.

Each parser takes the value of a settings file. It refuses a number without a unit if the unit would be a guess, and
raises `SettingsError`, without a key, for a value that is invalid or out of range. Each formatter returns a spelling
that the parser reads again::

    >>> parse_size("256M") // 2
    134217728
    >>> format_size(134217728)
    '128M'
"""

from __future__ import annotations

import datetime
import os
import re
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from typing import Any, Final, NamedTuple

from rcon_plugins.errors import KernelError, SettingsError

_DECIMAL = r"\d{1,12}(?:\.\d{1,6})?"
_PERCENT = r"\d{1,7}(?:\.\d{1,6})?%"  # the kernel takes no quota of 10**5 CPUs and more
_TIMES = r"\d{1,3}(?:\.\d{1,3})?x"
#: As people write sizes: ``256M``, ``512m``, ``0.5G``, and ``100 KiB`` as messages print it. Not ``MB``: it is 10**6.
_SIZE = r"\d{1,19}|\d{1,19}(?:\.\d{1,6})?(?:[KMGTkmgt]| ?[KMGT]iB)"
_SHARE_OF_MEMORY = r"\d{1,3}(?:\.\d{1,6})?%"
_SIZES: Final = {"T": 1024**4, "G": 1024**3, "M": 1024**2, "K": 1024, "": 1}
_TIME_UNITS: Final = {"h": Decimal(3600), "m": Decimal(60), "s": Decimal(1), "ms": Decimal("0.001")}
_LARGEST_SIZE = 2**63 - 1  # the largest value of the kernel's signed 64-bit counters
_LONGEST = Decimal(24 * 24 * 3600)  # poll(2) counts milliseconds in 31 bits: 24.8 days
_HIGHEST_CPU = 65535  # far above the maximum that a kernel can be built for
_LONG_NUMBER = 256  # bits: Python writes no integers of more than 4300 digits

_HINT_CPUS = '"30%" is 30 % of one CPU, "150%" is one and a half'
_HINT_SIZE = 'write "256M", "64K" or "0.5G", in steps of 1024'
_HINT_MEMORY = 'write "50%" of the machine, more than "0%" and at most "100%", or a size: "256M"'
_HINT_DURATION = 'write "20s", "500ms", "2m" or "1h"'
_HINT_FACTOR = '"2x" is twice as much each time, "1.5x" half as much again'
_HINT_CPU_LIST = 'write "0-1,3" for the CPUs 0, 1 and 3'


def parse_cpus(value: object) -> float:
    """Return CPU time per time, in CPUs: ``"30%"`` is 0.3, three tenths of one CPU; ``"150%"`` is 1.5.

    At least 1 %: the kernel accepts no quota below 1 ms, and a period has 100 ms.
    """
    if not isinstance(value, str):
        raise SettingsError(f"{show(value)} has no unit", value=value, hint=_HINT_CPUS)
    if not re.fullmatch(_PERCENT, value, re.ASCII):
        raise SettingsError(f"{show(value)} is not a share of CPU time", value=value, hint=_HINT_CPUS)
    cpus = Decimal(value[:-1]) / 100
    if cpus < Decimal("0.01"):
        raise SettingsError(f"{show(value)} is too little to run", value=value, hint='the least is "1%"')
    return float(cpus)


def format_cpus(cpus: float) -> str:
    """Return CPUs as a share of one CPU: 0.3 is ``"30%"``."""
    return f"{_plain(round(_exactly(cpus) * 100, 6))}%"


def parse_size(value: object) -> int:
    """Return a number of bytes: ``"256M"``, in steps of 1024 (K, M, G, T); a plain number is bytes. 0 is a size.

    ``"256m"``, ``"0.5G"`` and ``"256 MiB"`` are read, too. A part of a byte is left out.
    """
    if isinstance(value, str):
        size = _size_of_text(value)
    elif isinstance(value, int) and not isinstance(value, bool):
        size = value
    else:
        raise SettingsError(f"{show(value)} is not a size", value=value, hint=_HINT_SIZE)
    if not 0 <= size <= _LARGEST_SIZE:
        sign = "negative" if size < 0 else "more than the kernel can count"
        raise SettingsError(f"{show(value)} is {sign}", value=value, hint=_HINT_SIZE)
    return size


def _size_of_text(text: str) -> int:
    if re.fullmatch(_SIZE, text, re.ASCII):
        number = text.removesuffix("iB").rstrip("KMGTkmgt ")
        return int(Decimal(number) * _SIZES[text.removesuffix("iB")[len(number) :].strip().upper()])
    hint = _HINT_SIZE
    almost = re.fullmatch(rf"({_DECIMAL}) ?([KMGT]?)(?:i?B)?", text, re.ASCII | re.IGNORECASE)
    if almost:
        size = Decimal(almost[1]) * _SIZES[almost[2].upper()]
        if size == int(size):
            hint = f'write "{format_size(int(size))}": bytes, K, M, G or T, in steps of 1024'
    raise SettingsError(f"{show(text)} is not a size", value=text, hint=hint)


def parse_memory(value: object) -> int:
    """Return a number of bytes of memory: a size, or ``"50%"`` of what this process can use, in whole pages.

    That is the memory of the machine, or the least limit of the cgroups around this process, as in a container:
    `Hierarchy.usable_memory`. It is read when the value is parsed.
    """
    if not isinstance(value, str) or not value.endswith("%"):
        return parse_size(value)
    if not re.fullmatch(_SHARE_OF_MEMORY, value, re.ASCII) or not 0 < (share := Decimal(value[:-1])) <= 100:
        raise SettingsError(f"{show(value)} is no share of the memory", value=value, hint=_HINT_MEMORY)
    from rcon_plugins.kernel.cgroup import Hierarchy

    try:
        memory = Hierarchy.discover().usable_memory()
    except KernelError as error:
        problem = f"{show(value)}: the memory of this machine cannot be read: {error.problem}"
        raise SettingsError(problem, value=value, hint=_HINT_SIZE) from None
    page = os.sysconf("SC_PAGE_SIZE")
    return int(share * memory / 100) // page * page


def format_size(size: int) -> str:
    """Return bytes in the largest unit that divides them: 67108864 is ``"64M"``."""
    for letter, unit in _SIZES.items():
        if size and size % unit == 0:
            return f"{size // unit}{letter}"
    return "0"


def parse_duration(value: object) -> float:
    """Return a length of time, in seconds: ``"20s"``, ``"500ms"``, ``"2m"``, ``"1.5h"``. More than 0."""
    return _seconds(value, may_be_zero=False)


def parse_cpu_time(value: object) -> float:
    """Return CPU time, in seconds: ``"30ms"``; ``"0ms"`` is none."""
    return _seconds(value, may_be_zero=True)


def _seconds(value: object, *, may_be_zero: bool) -> float:
    if not isinstance(value, str):
        raise SettingsError(f"{show(value)} has no unit of time", value=value, hint=_HINT_DURATION)
    found = re.fullmatch(rf"({_DECIMAL})(ms|s|m|h)", value, re.ASCII)
    if not found:
        raise SettingsError(f"{show(value)} is not a length of time", value=value, hint=_HINT_DURATION)
    seconds = Decimal(found[1]) * _TIME_UNITS[found[2]]
    if (not seconds and not may_be_zero) or seconds > _LONGEST:
        problem = "longer than can be waited for" if seconds else "no time at all"
        raise SettingsError(f"{show(value)} is {problem}", value=value, hint='more than "0s", at most "576h"')
    return float(seconds)


def format_duration(seconds: float) -> str:
    """Return seconds in the largest unit of which they are a whole number: 90.0 is ``"90s"``, 7200.0 is ``"2h"``."""
    exact = _exactly(seconds)
    for letter, unit in _TIME_UNITS.items():
        if exact and exact % unit == 0:
            return f"{_plain(exact / unit)}{letter}"
    return f"{_plain(round(exact * 1000, 6))}ms"


def parse_factor(value: object) -> float:
    """Return a factor: ``"2x"``, ``"1.5x"``. At least 1.1, at most 100."""
    if not isinstance(value, str) or not re.fullmatch(_TIMES, value, re.ASCII):
        raise SettingsError(f"{show(value)} does not say how many times", value=value, hint=_HINT_FACTOR)
    times = Decimal(value[:-1])
    if not Decimal("1.1") <= times <= 100:
        raise SettingsError(f"{show(value)} is not between 1.1x and 100x", value=value, hint=_HINT_FACTOR)
    return float(times)


def format_factor(factor: float) -> str:
    """Return a factor as text: 2.0 is ``"2x"``."""
    return f"{factor:g}x"


def parse_umask(value: object) -> int:
    """Return a umask, written as text in octal: ``"027"``. See umask(2)."""
    if isinstance(value, str) and re.fullmatch(r"0?[0-7]{3}", value):
        return int(value, 8)
    hint = 'write "027": three octal digits, in quotes'
    if isinstance(value, int) and not isinstance(value, bool):
        # 27 and 0o33 are the same number by the time it arrives here.
        raise SettingsError(f"{show(value)} could be octal or decimal", value=value, hint=hint)
    raise SettingsError(f"{show(value)} is not a umask", value=value, hint=hint)


def format_umask(umask: int) -> str:
    """Return a umask in octal: 23 is ``"027"``."""
    return f"{umask:03o}"


def parse_cpu_list(value: object) -> str:
    """Return the numbers of some CPUs, as the kernel lists them: ``"0-1,3"``. Ordered, each named once."""
    if not isinstance(value, str):
        raise SettingsError(f"{show(value)} is not a list of CPUs", value=value, hint=_HINT_CPU_LIST)
    return _ranges(cpu_numbers(value))


def cpu_numbers(text: str) -> set[int]:
    """Return the numbers in a list of CPUs: ``"0-1,3"`` has 0, 1 and 3. Raises `SettingsError`, without a key."""
    numbers: set[int] = set()
    for part in text.split(","):
        found = re.fullmatch(r"(\d{1,5})(?:-(\d{1,5}))?", part, re.ASCII)
        if not found:
            raise SettingsError(f"{show(text)} is not a list of CPUs", value=text, hint=_HINT_CPU_LIST)
        first, last = int(found[1]), int(found[2] or found[1])
        if last < first:
            raise SettingsError(
                f"{show(text)} counts down", value=text, hint=f'write "{last}-{first}" for that range'
            )
        if last > _HIGHEST_CPU:
            raise SettingsError(
                f"{show(text)} names a CPU that no machine has", value=text, hint=f"at most {_HIGHEST_CPU}"
            )
        numbers.update(range(first, last + 1))
    return numbers


def parse_count(text: str) -> int:
    """Return a whole number. In a settings file it is a number; this is for text, such as an option."""
    if not (text.isascii() and text.isdigit() and len(text) < 20):
        raise SettingsError(f"{show(text)} is not a whole number", value=text, hint="for example 100")
    return int(text)


class Unit(NamedTuple):
    """How values of one unit are written: a parser, a formatter, and the JSON schema of the text in a settings file."""

    parse: Callable[[Any], Any]
    format: Callable[[Any], str]
    schema: Mapping[str, Any]


_DURATION: Final = {"type": "string", "pattern": rf"^{_DECIMAL}(ms|s|m|h)$"}
#: All units, by the names that the table of limits uses.
UNITS: Final[Mapping[str, Unit]] = {
    "share": Unit(parse_cpus, format_cpus, {"type": "string", "pattern": rf"^{_PERCENT}$"}),
    "cpu_time": Unit(parse_cpu_time, format_duration, _DURATION),
    "size": Unit(
        parse_size,
        format_size,
        {"anyOf": [{"type": "string", "pattern": rf"^({_SIZE})$"}, {"type": "integer", "minimum": 0}]},
    ),
    "memory": Unit(
        parse_memory,
        format_size,
        {
            "anyOf": [
                {"type": "string", "pattern": rf"^({_SIZE}|{_SHARE_OF_MEMORY})$"},
                {"type": "integer", "minimum": 0},
            ]
        },
    ),
    "duration": Unit(parse_duration, format_duration, _DURATION),
    "factor": Unit(parse_factor, format_factor, {"type": "string", "pattern": rf"^{_TIMES}$"}),
    "umask": Unit(parse_umask, format_umask, {"type": "string", "pattern": "^0?[0-7]{3}$"}),
    "cpus": Unit(
        parse_cpu_list,
        str,
        {"type": "string", "pattern": r"^\d{1,5}(-\d{1,5})?(,\d{1,5}(-\d{1,5})?)*$"},
    ),
    "count": Unit(parse_count, str, {"type": "integer"}),
    "device": Unit(str, str, {"type": "string"}),
}


def parse(unit: str, text: str) -> float | int | str:
    """Return the value of an option's text. Raises `SettingsError`, without a key."""
    value: float | int | str = UNITS[unit].parse(text)
    return value


def format_value(unit: str, value: float | str) -> str:
    """Return a value in the spelling of a settings file: ``format_value("size", 67108864)`` is ``"64M"``."""
    return UNITS[unit].format(value)


def listed(words: Sequence[str], most: int) -> str:
    """Return at most so many words with commas between them, and how many more there are."""
    more = f" and {len(words) - most} more" if len(words) > most else ""
    return ", ".join(words[:most]) + more


def show(value: object) -> str:
    """Return ``value`` for an error message: as a settings file writes it, at most 80 characters.

    What is cut is in the middle: a path differs from others at its end.
    """
    try:
        text = as_toml(value)
    except RecursionError:
        text = "a table" if isinstance(value, Mapping) else "an array"
    return text if len(text) <= 80 else f"{text[:38]}...{text[-38:]}"


def as_toml(value: object) -> str:
    """Return ``value`` as a settings file writes it. Raises RecursionError."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int) and value.bit_length() > _LONG_NUMBER:
        return f"a number of {value.bit_length()} bits"
    if isinstance(value, Mapping):
        parts = [f"{quoted(str(key))} = {as_toml(part)}" for key, part in value.items()]
        return f"{{ {', '.join(parts)} }}" if parts else "{}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(as_toml, value))}]"
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    return repr(value)


def quoted(key: str) -> str:
    """Return a key of a table, in quotes if TOML needs them."""
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key, re.ASCII) else f'"{key}"'


def _exactly(number: float) -> Decimal:
    return Decimal(repr(float(number)))


def _plain(number: Decimal) -> str:
    """Return the number without exponent and trailing zeros."""
    text = f"{number:f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def _ranges(numbers: set[int]) -> str:
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
