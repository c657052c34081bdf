"""The units in settings: CPUs, sizes, durations, lists of CPUs.

Each type derives from the number or text it stands for, so that it computes, compares and pickles like one. ``str()``
returns a spelling that the type reads again::

    >>> Size("256M") // 2
    134217728
    >>> str(Size(134217728))
    '128M'
"""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Any, ClassVar, Self, SupportsFloat

from rcon_plugins.errors import SettingsError

_DECIMAL = r"\d{1,12}(?:\.\d{1,6})?"
_PAGE = 4096
_PERCENT = r"\d{1,7}(?:\.\d{1,6})?%"  # the kernel takes no quota of 10**5 CPUs and more


class Written:
    """A type that is written as text in settings. A subclass also derives from float, int or str."""

    __slots__ = ()

    #: The JSON schema of its spellings in a settings file.
    schema: ClassVar[dict[str, Any]] = {"type": "string"}

    @classmethod
    def parse(cls, value: object) -> Self:
        """Return the value that ``value`` means in a settings file.

        It is stricter than the constructor: it refuses a number without a unit if the unit would be a guess. Raises
        `SettingsError`, without a key, for a value that is invalid or out of range.
        """
        raise NotImplementedError


class WrittenNumber(Written):
    """A number that is written as text in settings. Its constructor accepts both."""

    __slots__ = ()

    def __new__(cls, value: str | SupportsFloat) -> Self:
        return cls.parse(value) if isinstance(value, str) else super().__new__(cls, value)  # type: ignore[call-arg]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self)!r})"


class Cpus(WrittenNumber, float):
    """CPU time per time, in CPUs: ``"30%"`` is 0.3, three tenths of one CPU; ``"150%"`` is 1.5.

    At least 1 %: the kernel accepts no quota below 1 ms, and a period has 100 ms.
    """

    __slots__ = ()
    schema: ClassVar[dict[str, Any]] = {"type": "string", "pattern": rf"^{_PERCENT}$"}
    _hint = '"30%" is 30 % of one CPU, "150%" is one and a half'

    @classmethod
    def parse(cls, value: object) -> Self:
        if isinstance(value, cls):
            return value
        if not isinstance(value, str):
            raise SettingsError(f"{show(value)} has no unit", value=value, hint=cls._hint)
        if not re.fullmatch(_PERCENT, value, re.ASCII):
            raise SettingsError(f"{show(value)} is not a share of CPU time", value=value, hint=cls._hint)
        cpus = Decimal(value[:-1]) / 100
        if cpus < Decimal("0.01"):
            raise SettingsError(f"{show(value)} is too little to run", value=value, hint='the least is "1%"')
        return cls(float(cpus))

    def __str__(self) -> str:
        return f"{_plain(round(_exactly(self) * 100, 6))}%"


class Size(WrittenNumber, int):
    """A number of bytes: ``"256M"``, in steps of 1024 (K, M, G, T); a plain number is bytes.

    Zero is a size; negative numbers are refused.
    """

    __slots__ = ()
    schema: ClassVar[dict[str, Any]] = {
        "anyOf": [{"type": "string", "pattern": r"^\d{1,19}[KMGT]?$"}, {"type": "integer", "minimum": 0}]
    }
    _units: ClassVar[dict[str, int]] = {"T": 1024**4, "G": 1024**3, "M": 1024**2, "K": 1024, "": 1}
    _largest = 2**63 - 1  # the largest value of the kernel's signed 64-bit counters
    _hint = 'write "256M", "64K" or "2G", in steps of 1024'

    @classmethod
    def parse(cls, value: object) -> Self:
        if isinstance(value, cls):
            return value
        if isinstance(value, str):
            size = cls._from_text(value)
        elif isinstance(value, int) and not isinstance(value, bool):
            size = value
        else:
            raise SettingsError(f"{show(value)} is not a size", value=value, hint=cls._hint)
        if not 0 <= size <= cls._largest:
            sign = "negative" if size < 0 else "more than the kernel can count"
            raise SettingsError(f"{show(value)} is {sign}", value=value, hint=cls._hint)
        return cls(size)

    @classmethod
    def _from_text(cls, text: str) -> int:
        if found := re.fullmatch(r"(\d{1,19})([KMGT]?)", text, re.ASCII):
            return int(found[1]) * cls._units[found[2]]
        hint = cls._hint
        almost = re.fullmatch(rf"({_DECIMAL}) ?([KMGT]?)(?:i?B)?", text, re.ASCII | re.IGNORECASE)
        if almost:
            size = Decimal(almost[1]) * cls._units[almost[2].upper()]
            if size == int(size):
                hint = f'write "{cls(int(size))}": whole numbers of bytes, K, M, G or T, in steps of 1024'
        raise SettingsError(f"{show(text)} is not a size", value=text, hint=hint)

    def __str__(self) -> str:
        number = int(self)
        for letter, unit in self._units.items():
            if number and number % unit == 0:
                return f"{number // unit}{letter}"
        return "0"


def check_a_page(size: int | None, key: str) -> None:
    """Raise `SettingsError` for a memory limit below one page; None is "not set"."""
    if size is not None and size < _PAGE:
        text = str(size)
        hint = f'write "{text}M"?' if text.isdigit() else 'at least "4K"'
        raise SettingsError(f"{int(size)} bytes are less than one page", key=key, value=size, hint=hint)


class Duration(WrittenNumber, float):
    """A length of time, in seconds: ``"20s"``, ``"500ms"``, ``"2m"``, ``"1.5h"``. More than 0."""

    __slots__ = ()
    schema: ClassVar[dict[str, Any]] = {"type": "string", "pattern": rf"^{_DECIMAL}(ms|s|m|h)$"}
    _units: ClassVar[dict[str, Decimal]] = {
        "h": Decimal(3600),
        "m": Decimal(60),
        "s": Decimal(1),
        "ms": Decimal("0.001"),
    }
    _may_be_zero: ClassVar[bool] = False
    _longest = Decimal(24 * 24 * 3600)  # poll(2) counts milliseconds in 31 bits: 24.8 days
    _hint = 'write "20s", "500ms", "2m" or "1h"'

    @classmethod
    def parse(cls, value: object) -> Self:
        if isinstance(value, cls):
            return value
        if not isinstance(value, str):
            raise SettingsError(f"{show(value)} has no unit of time", value=value, hint=cls._hint)
        found = re.fullmatch(rf"({_DECIMAL})(ms|s|m|h)", value, re.ASCII)
        if not found:
            raise SettingsError(f"{show(value)} is not a length of time", value=value, hint=cls._hint)
        seconds = Decimal(found[1]) * cls._units[found[2]]
        if (not seconds and not cls._may_be_zero) or seconds > cls._longest:
            problem = "longer than can be waited for" if seconds else "no time at all"
            raise SettingsError(
                f"{show(value)} is {problem}", value=value, hint='more than "0s", at most "576h"'
            )
        return cls(float(seconds))

    def __str__(self) -> str:
        seconds = _exactly(self)
        for letter, unit in self._units.items():
            if seconds and seconds % unit == 0:
                return f"{_plain(seconds / unit)}{letter}"
        return f"{_plain(round(seconds * 1000, 6))}ms"


class CpuTime(Duration):
    """CPU time, in seconds: ``"30ms"``; ``"0ms"`` is none."""

    __slots__ = ()
    _may_be_zero = True


class CpuList(Written, str):
    """The numbers of some CPUs, as the kernel lists them: ``"0-1,3"``. Ordered, each named once."""

    __slots__ = ()
    schema: ClassVar[dict[str, Any]] = {
        "type": "string",
        "pattern": r"^\d{1,5}(-\d{1,5})?(,\d{1,5}(-\d{1,5})?)*$",
    }
    _highest = 65535  # far above the maximum that a kernel can be built for
    _hint = 'write "0-1,3" for the CPUs 0, 1 and 3'

    def __new__(cls, value: str) -> Self:
        return super().__new__(cls, _ranges(cls._numbers(value)))

    @classmethod
    def parse(cls, value: object) -> Self:
        if not isinstance(value, str):
            raise SettingsError(f"{show(value)} is not a list of CPUs", value=value, hint=cls._hint)
        return cls(value)

    @property
    def numbers(self) -> frozenset[int]:
        """The numbers of the CPUs."""
        return frozenset(self._numbers(self))

    @classmethod
    def _numbers(cls, text: str) -> set[int]:
        numbers: set[int] = set()
        for part in text.split(","):
            found = re.fullmatch(r"(\d{1,5})(?:-(\d{1,5}))?", part, re.ASCII)
            if not found:
                raise SettingsError(f"{show(text)} is not a list of CPUs", value=text, hint=cls._hint)
            first, last = int(found[1]), int(found[2] or found[1])
            if last < first:
                raise SettingsError(
                    f"{show(text)} counts down", value=text, hint=f'write "{last}-{first}" for that range'
                )
            if last > cls._highest:
                raise SettingsError(
                    f"{show(text)} names a CPU that no machine has",
                    value=text,
                    hint=f"at most {cls._highest}",
                )
            numbers.update(range(first, last + 1))
        return numbers


def parse(unit: str, text: str) -> float | int | str:
    """Return the value of the text of an option: CPUs, bytes, seconds, a count, a list of CPUs, or the text itself.

    ``unit`` is the unit of a row of `rcon_plugins.settings.limit_table`. Raises `SettingsError`, without a key.
    """
    match unit:
        case "share":
            return float(Cpus.parse(text))
        case "cpu_time":
            return float(CpuTime.parse(text))
        case "size":
            return int(Size.parse(text))
        case "duration":
            return float(Duration.parse(text))
        case "cpus":
            return str(CpuList.parse(text))
        case "count":
            if not (text.isascii() and text.isdigit() and len(text) < 20):
                raise SettingsError(f"{text!r} is not a whole number", value=text, hint="for example 100")
            return int(text)
    return text


def written(unit: str, value: Any) -> str:
    """Return a number in the spelling of a settings file: ``written("size", 67108864)`` is ``"64M"``."""
    kind = {"share": Cpus, "cpu_time": CpuTime, "size": Size, "duration": Duration}.get(unit)
    return str(value if kind is None else kind(value))


def show(value: object) -> str:
    """Return ``value`` for an error message: as Python writes it, and not too long."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:76]}..."


def _exactly(number: float) -> Decimal:
    return Decimal(float.__repr__(number))


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
