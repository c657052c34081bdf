"""What a request in an executor process may cost its host: small frames, and text for the log, in measure.

A frame that costs its sender next to nothing costs the host some microseconds. So a tenant held to a twentieth of a
CPU could have the host burn a whole one for it. The bounds here are on rates, so that a response which says little for
hours never meets them.
"""

from __future__ import annotations

import time
from typing import Any, Final
from urllib.parse import quote

from rcon_plugins.executors.channel import ProtocolViolation

#: A frame with less than this many bytes counts.
SMALL: Final = 4096
#: Small frames are counted in lots of this size.
LOT: Final = 1000
#: The least time a lot takes, seconds; the host waits for the rest of it.
_LEAST_SECONDS: Final = 0.04
#: After a lot that took less than this, chunks that are here together are given to the server together.
_HURRY_SECONDS: Final = 1.0

#: What a work may write to the log in each minute: characters, with the prefix of each line, and frames.
LOG_CHARACTERS: Final = 256 * 1024
LOG_FRAMES: Final = 1000
#: The most that is shown of what should be a line, characters.
LINE: Final = 8 * 1024
_MINUTE: Final = 60.0
_KEY_CHARACTERS: Final = 100


class FrameRateLimiter:
    """Counts small frames. ``hurried``: they come faster than one by one is worth while."""

    __slots__ = ("_left", "_since", "hurried")

    def __init__(self) -> None:
        self._left = LOT
        self._since = time.monotonic()
        self.hurried = False

    def count(self) -> float:
        """Count one; how long to wait before the next is taken, seconds."""
        self._left -= 1
        if self._left:
            return 0.0
        now = time.monotonic()
        took = now - self._since
        pause = max(0.0, _LEAST_SECONDS - took)
        self._left = LOT
        self._since = now + pause
        self.hurried = took < _HURRY_SECONDS
        return pause


class ErrorLog:
    """The server's ``wsgi.errors``, as far as an executor may write to it.

    Each line begins with the policy and the key, so that it cannot pass for a line of the server or of ours, and holds
    only characters that can be seen. What a log cannot take is lost: that is no reason to fail a request.
    """

    __slots__ = ("_characters", "_frames", "_prefix", "_since", "_stream")

    def __init__(self, stream: Any, policy: str, key: str | None) -> None:
        self._stream = stream
        self._prefix = owner(policy, key)
        self._characters = self._frames = 0
        self._since = -_MINUTE

    def write(self, payload: bytes) -> None:
        """Log a text. Raises `ProtocolViolation` for an empty one."""
        if not payload:
            raise ProtocolViolation("a text for the log without text")
        now = time.monotonic()
        if now - self._since >= _MINUTE:
            self._since, self._frames, self._characters = now, LOG_FRAMES, LOG_CHARACTERS
        if not self._frames:
            return
        self._frames -= 1
        # No more is looked at than could be logged.
        text = payload[: self._characters].decode("utf-8", "replace")
        lines = []
        for line in text.splitlines():
            shown = f"{self._prefix}{visible(line)}\n"
            self._characters -= len(shown)
            if self._characters < 0:
                self._frames = 0
                break
            lines.append(shown)
        if not self._frames:
            lines.append(
                f"{self._prefix}(rcon: this request logs too much; the rest of a minute is left out)\n"
            )
        try:
            self._stream.write("".join(lines))
            self._stream.flush()
        except Exception:  # noqa: BLE001, S110 - a full disk, a closed file: the server's trouble, not the request's
            pass


def owner(policy: str, key: str | None) -> str:
    """What a line in the log begins with that confined code has written. The key may be what a client sent."""
    shown = quote(key[:_KEY_CHARACTERS], safe="/:@", errors="backslashreplace") if key is not None else ""
    return f"[{policy} {shown}] " if shown else f"[{policy}] "


def owned(text: str, prefix: str) -> str:
    """The text with this in front of each line, and with what cannot be seen written out."""
    return "".join([f"{prefix}{visible(line)}\n" for line in text.splitlines()])


def visible(line: str) -> str:
    """The line with what cannot be seen written out; tabs may stay."""
    if line.isprintable():
        return line
    return "".join(
        character
        if character.isprintable() or character == "\t"
        else character.encode("unicode_escape").decode("ascii")
        for character in line
    )
