"""Read a TOML file, with errors that show the line at fault and name the remedy."""

from __future__ import annotations

import errno
import os
import re
import stat
import tomllib
from typing import Any, Final

from rcon_plugins.errors import SettingsError
from rcon_plugins.settings.units import show

#: The longest file, bytes.
LONGEST: Final = 4 * 2**20
#: The most parts of a dotted key. The parser takes time with the square of their number.
MOST_PARTS: Final = 64

_BYTE_ORDER_MARK: Final = b"\xef\xbb\xbf"
_PART: Final = r"""(?:[A-Za-z0-9_-]++|"(?:[^"\\\n]|\\.)*+"|'[^'\n]*+')"""
_DOTTED: Final = re.compile(rf"{_PART}(?:[ \t]*+\.[ \t]*+{_PART})*+")
_WHERE: Final = re.compile(r"(.*) \(at (?:line (\d+), column (\d+)|end of document)\)", re.DOTALL)
#: Remedies, by words of the parser's message.
_REMEDIES: Final = (
    ("twice|overwrite|Duplicate|redefine|mutate", "write each table and each key once"),
    ("at the end of a table", "a table begins with [policy.NAME] or [[route]] on a line of its own"),
    ("Unclosed", "close each [ with ] and each { with }"),
    (
        "Unterminated|Illegal character|invalid character|Unescaped|Escaped|hex value",
        "close each text on its line with the quote that it begins with, and write a backslash twice",
    ),
    ("after a key|key part|Invalid statement", "a line is KEY = VALUE, [policy.NAME] or [[route]]"),
)
_NEEDS_QUOTES: Final = 'text needs quotes, as in memory = "256M"'


def read_toml(file: str) -> dict[str, Any]:
    """Return the contents of a TOML file. Raises `SettingsError`, with file and remedy."""
    try:
        return _parsed(_content_of(file))
    except SettingsError as error:
        error.file = file
        raise


def _content_of(file: str) -> bytes:
    try:
        with open(file, "rb", buffering=0, opener=_open) as opened:
            kind = os.fstat(opened.fileno()).st_mode
            if stat.S_ISFIFO(kind):
                os.set_blocking(opened.fileno(), True)
            elif not stat.S_ISREG(kind):
                raise SettingsError("is not a regular file", hint="give the path of a file with policies")
            content = b""
            while len(content) <= LONGEST and (piece := opened.read(LONGEST + 1 - len(content))):
                content += piece
            if piece is None:  # a file of the kernel, such as /proc/kmsg, without data
                raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
    except (OSError, ValueError) as error:  # ValueError: a path that no file can have
        reason = error.strerror if isinstance(error, OSError) else error
        raise SettingsError(
            f"cannot be read: {reason}", hint="give the path of a file this user can read"
        ) from error
    if len(content) > LONGEST:
        raise SettingsError(
            f"is longer than {LONGEST // 2**20} MiB", hint="give the path of a file with policies"
        )
    return content


def _open(path: str, flags: int) -> int:
    # A FIFO without a writer is empty; opening it otherwise would wait for one.
    return os.open(path, flags | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)


def _parsed(content: bytes) -> dict[str, Any]:
    if content.startswith(_BYTE_ORDER_MARK):
        raise SettingsError("begins with a byte order mark", hint="save the file as UTF-8 without one")
    if (place := content.find(b"\0")) >= 0:
        raise SettingsError(f"byte {place} is NUL", hint="save the file as text, in UTF-8")
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        raise SettingsError(f"byte {error.start} is not UTF-8", hint="save the file as UTF-8") from error
    _check_dotted_keys(text)
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise _explained(str(error), text) from error
    except ValueError as error:  # Python reads no integers of more digits
        raise SettingsError(
            "has an integer of more than 4300 digits", hint="write a smaller number"
        ) from error
    except RecursionError as error:
        raise SettingsError(
            "is nested too deeply", hint="put fewer tables and arrays into each other"
        ) from error


def _explained(message: str, text: str) -> SettingsError:
    """Return the parser's error with the line at fault and a remedy."""
    found = _WHERE.fullmatch(message)
    problem, where, otherwise = message, "", _NEEDS_QUOTES
    if found is not None:
        problem, at, column = found.groups()
        lines = text.rstrip().split("\n")
        number = int(at) if at else len(lines)
        line = lines[number - 1].strip() if number <= len(lines) else ""
        where = f"line {number}{f', column {column}' if column else ''}: {show(line)}: "
        otherwise = _NEEDS_QUOTES if at else "the file ends here: complete this line"
    # It names a table as a tuple of Python.
    problem = re.sub(r"\((?:'[^']*'(?:, )?)+,?\)", "a table", problem)
    remedy = next((remedy for words, remedy in _REMEDIES if re.search(words, problem)), otherwise)
    return SettingsError(f"is not TOML: {where}{problem}", hint=remedy)


def _check_dotted_keys(text: str) -> None:
    for number, line in enumerate(text.split("\n"), 1):
        if line.count(".") < MOST_PARTS:
            continue
        for found in _DOTTED.finditer(line):
            if found[0].count(".") >= MOST_PARTS and len(re.findall(_PART, found[0])) > MOST_PARTS:
                raise SettingsError(
                    f"line {number}: {show(found[0])} has more than {MOST_PARTS} parts",
                    hint="the keys of a settings file have at most six",
                )
